"""From a format's expression to what runs: the decode, one weight, its decoder, the layout, and the plans.

    python examples/explain.py [--format bcq3] [--size 4096]

Needs no GPU: the plans for one are predictions.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import lowbit as lb
from lowbit.kernels.layout import Layout, layout
from lowbit.passes.scalar import Element, Lookup, Node, Number, Product, Scalar, Step, Sum

FORMATS = {"uniform4": lb.uniform(4, group=128), **{f"bcq{b}": lb.bcq(b, group=128) for b in (2, 3, 4)}}
BATCHES = (1, 16, 2048)


def shown(x: Scalar) -> str:
    """A scalar as a formula of stored elements."""
    sign, node = x
    return ("-" if sign < 0 else "") + _node(node)


def _node(node: Node) -> str:
    match node:
        case Number(value):
            return f"{value:g}"
        case Element(leaf, at):
            fixed = [str(w.values[0, 0]) for w in at if w.shape == (1, 1)]
            return leaf.name + "".join(f"[{i}]" for i in fixed)
        case Sum(a, b, minus):
            return f"({_node(a)} {'-' if minus else '+'} {_node(b)})"
        case Step(name, codes):
            return f"{name}({', '.join(e.leaf.name for e in codes)})"
        case Lookup(table, code=code):
            return f"{table.name}[{', '.join(dict.fromkeys(e.leaf.name for e, _ in code))}]"
        case Product(a, b):
            return f"{_node(a)} {_node(b)}"


def explained(of: Layout) -> str:
    """What a kernel makes of a format."""
    codes = ", ".join(f"{e.leaf.name} bit {i}" for i, e in enumerate(of.codes))
    lines = [f"A weight's code has {of.bits} bits ({codes}), and by its value the weight is"]
    lines += [f"  {value:2d}  {shown(entry)}" for value, entry in enumerate(of.weights[-1].entries)]
    lines += [f"{type(of.decoder).__name__}: {type(of.decoder).__doc__}", "As kernels read it:"]
    lines += [f"  {name:6} {leaf.type}" for name, leaf in of.fields.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=FORMATS, default="bcq3")
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    given = parser.parse_args()
    own = lb.QuantType((("k", given.size), ("n", given.size)), "bf16", FORMATS[given.format])
    print(own.decode, explained(layout(own.decode)), sep="\n\n")
    prepared = replace(own, layout="mma")  # that of weights after lb.prepare
    for platform in ("gpu", "cpu"):
        for batch in BATCHES:
            print(f"\n{lb.plan((batch, given.size), prepared, platform, 'bfloat16')}")


if __name__ == "__main__":
    main()
