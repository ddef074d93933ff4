"""Which layers of a model choose between widths, and whether they are those that something was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from flax import nnx

from lowbit.array import own
from lowbit.nn.kernel import Kernel, expect_arrays, expect_module, joined, layer_kernels
from lowbit.nn.layers import Linear
from lowbit.nn.rules import Rule, assign
from lowbit.tune.digest import digest


def nested(model: nnx.Module, layers: str | Sequence[str] = "**") -> dict[str, Kernel]:
    """The weights of the quantized layers that patterns name, by layer path.

    Raises ValueError, which names them, for layers that are no `lb.nn.Linear` of one matrix in a nested format; and for
    a pattern without layers. One whose planes were dropped up to its least width is nested still.
    """
    expect_module(model, "choose widths of")
    expect_arrays(model, "choose widths of")
    modules = {joined(path): m for path, m in nnx.iter_modules(model)}
    held = layer_kernels(model)
    rules = tuple(Rule(p, None) for p in ([layers] if isinstance(layers, str) else layers))
    chosen = assign(rules, list(held), {}, "quantized layers")
    wrong = [path for path in chosen if type(modules[path]) is not Linear or not _is_nested(held[path])]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        told = ", ".join(f"{p!r} ({type(modules[p]).__name__} as {held[p].type.encoding})" for p in wrong[:3])
        raise ValueError(
            f"{told}{more} cannot choose between widths: quantize Linear layers with a nested format such as "
            'lb.any_precision(3, 6), or leave others out with layers="..."'
        )
    return {path: held[path] for path in chosen}


def _is_nested(kernel: Kernel) -> bool:
    return bool(kernel.type.format.widths) and not kernel.array.stack


def largest(path: str, kernel: Kernel, most: int | Mapping[str, int]) -> int:
    """The largest width that a layer may have. Raises ValueError for one that it does not have, or is not given."""
    if not isinstance(most, int) and path not in most:
        raise ValueError(f"most has no width for layer {path!r}: lb.tune.max_widths gives one for each")
    width = most if isinstance(most, int) else most[path]
    if width not in kernel.type.format.widths:
        raise ValueError(f"layer {path!r} is {kernel.type.format}, of widths {kernel.type.format.widths}, not {width}")
    return width


def weights(kernel: Kernel) -> int:
    return prod(kernel.shape)


def mean_over(kernels: Mapping[str, Kernel], values: Mapping[str, float]) -> float:
    """Of a number for each layer, by their weights."""
    return sum(weights(k) * values[p] for p, k in kernels.items()) / sum(map(weights, kernels.values()))


def fingerprint(held: Mapping[str, Kernel], paths: Iterable[str]) -> str:
    """Of the stored arrays of these layers, whatever width they are read at and however they are laid out."""
    arrays = {path: own(held[path].array).fields for path in paths}
    return digest({f"{path}/{name}": value for path, fields in arrays.items() for name, value in fields.items()})
