"""The kit: every check of a format at several sizes, or of a model's layers on its own inputs, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit.array import QuantArray
from lowbit.formats.format import Format
from lowbit.kernels.choice import KERNELS
from lowbit.nn import kernels
from lowbit.passes.pipeline import PIPELINES
from lowbit.planning import LoweringError, plan, watching
from lowbit.quant_type import QuantType
from lowbit.quantizers.quantizer import Quantizer, has_default
from lowbit.testing import checks
from lowbit.testing.quantizing import check_quantizer

SHAPES = ((3, 256), (2, 141), (1, 1))
"""Sizes (n, k) to check a format at: one that suits every word and group, one that suits none, and the least."""
ROWS = 4
"""Rows of a model's own inputs that a product is checked on: the oracle is slow."""


@dataclass(frozen=True)
class Check:
    """One property of one array: `run()` raises if it does not hold."""

    where: str
    name: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"


@dataclass(frozen=True)
class Checked:
    """What was checked and holds. `str()` is a list.

    Attributes:
      what: the format or the model.
      passed: the names of the checks, by the size or the layer.
      refused: sizes that the format does not store, each with its own words.
    """

    what: str
    passed: dict[str, tuple[str, ...]]
    refused: dict[str, str]

    def __str__(self) -> str:
        count = sum(map(len, self.passed.values()))
        lines = [f"{where}: {', '.join(names)}" for where, names in self.passed.items()]
        lines += [f"{where}: refused, {reason}" for where, reason in self.refused.items()]
        return "\n  ".join([f"{self.what}: {count} checks passed", *lines])


def check_format(
    fmt: Format,
    shapes: Sequence[tuple[int, int]] | None = None,
    lowerings: Sequence[str] | None = None,
    quantizer: Quantizer | None = None,
    seed: int = 0,
) -> Checked:
    """Check a format, yours or one of lowbit's, in everything that the library does with it.

    At each size the stored arrays are filled at random from the types and ranges of the decode's leaves. Then these
    must hold: the decode is the numpy oracle's; its text and its type parse back; `lb.matmul` is the oracle's product
    in every lowering, for one vector, no rows, bfloat16 and under `jax.vmap`; the gradients of x and of every float
    field are those of the transposed term and of `jax.vjp` through the decode; a file gives the same bits back, and so
    does an exported program; `lb.report` counts what is stored. A quantizer must cope with zero, constant and huge
    weights, and put codes and scales where the decode looks for them. Floats are compared within bounds that follow
    from the arithmetic (`lowbit.testing.tolerance`).

    Args:
      fmt: the format, with its options.
      shapes: sizes (n, k) of the weight, n outputs and k inputs; by default `SHAPES`, of which the format may refuse
        some by a ValueError. Small ones do: the bounds hold for any.
      lowerings: names of the forms to check, each a form of its own at one of the sizes at least; all by default.
      quantizer: the one to check; the format's default by default, and none if it has none.
      seed: of the random arrays.

    Every check runs, whatever failed before, but for those of an array whose decode is wrong. Raises AssertionError
    listing what failed, each with the size, the check, the worst element, both values and the bound; LoweringError for
    a lowering that no size has, and ValueError when the format refuses every size.

    >>> import lowbit as lb
    >>> done = lb.testing.check_format(lb.uniform(2), shapes=[(2, 9)], lowerings=["decode", "join"])
    >>> done.passed["n=2 k=9"][:4]
    ('decode', 'text', 'product decode', 'product join')
    """
    found, refused = format_checks(fmt, shapes, lowerings, quantizer, seed)
    return _run(str(fmt), found, refused)


def format_checks(
    fmt: Format,
    shapes: Sequence[tuple[int, int]] | None = None,
    lowerings: Sequence[str] | None = None,
    quantizer: Quantizer | None = None,
    seed: int = 0,
) -> tuple[list[Check], dict[str, str]]:
    """The checks of a format, not run yet, and the sizes that it refuses. Arguments and errors as in `check_format`."""
    accepted, refused = _sizes(fmt, shapes)
    forms = {where: _forms((2, t.shape[0]), t) for where, t in accepted.items()}
    _expect_some(lowerings, forms, str(fmt))
    out: list[Check] = []
    for where, t in accepted.items():
        run = _properties(t, [name for name in forms[where] if lowerings is None or name in lowerings], seed)
        if quantizer is not None or has_default(fmt):
            k, n = t.shape
            run["quantizer"] = partial(check_quantizer, fmt, n, k, quantizer)
        wanted = run if _is_a_term(t) else {"decode": run["decode"]}  # which says why it is none
        out += [Check(where, name, function) for name, function in wanted.items()]
    return out, refused


def _sizes(fmt: Format, shapes: Sequence[tuple[int, int]] | None) -> tuple[dict[str, QuantType], dict[str, str]]:
    """The types to check, and of the default sizes those that the format refuses."""
    if not isinstance(fmt, Format):
        raise TypeError(f"{fmt!r} is not a format such as lb.bcq(3, group=128)")
    accepted: dict[str, QuantType] = {}
    refused: dict[str, str] = {}
    for n, k in SHAPES if shapes is None else shapes:
        where = f"n={n} k={k}"
        accepted[where] = QuantType((("k", k), ("n", n)), "f32", fmt)
        try:
            fmt.decode(n, k)
        except ValueError as err:
            if shapes is not None:
                raise
            del accepted[where]
            refused[where] = str(err)
        except Exception:  # not a refusal: the check of the decode fails with it
            continue
    if not accepted:
        raise ValueError(f"{fmt} refuses every size: {refused}; name some that it stores, shapes=[(n, k), ...]")
    return accepted, refused


def _is_a_term(t: QuantType) -> bool:
    try:
        return t.decode is not None
    except Exception:
        return False


def _properties(t: QuantType, lowerings: Sequence[str], seed: int) -> dict[str, Callable[[], None]]:
    """The checks of one array of a type. It is made when they run: a wrong decode is the failure of the first."""
    k = t.shape[0]
    x, narrow = checks.random_rows(2, k), checks.random_rows(2, k, dtype="bfloat16")

    def array(more: int = 0) -> QuantArray:
        return checks.random_array(t, seed + more)

    def product(form: str) -> None:
        checks.check_product(x, array(), form)

    return {
        "decode": lambda: checks.check_decode(array()),
        "text": lambda: checks.check_text(t),
        **{f"product {name}": partial(product, name) for name in lowerings},
        "batches": lambda: checks.check_batches(x, array()),
        "bfloat16": lambda: checks.check_product(narrow, array()),
        "vmap": lambda: checks.check_vmap(np.stack([x, -x]), [array(), array(1)]),
        "gradients": lambda: checks.check_gradients(x, array()),
        "file": lambda: checks.check_file(array()),
        "report": lambda: checks.check_report(array()),
        "export": lambda: checks.check_export(x, array()),
    }


def check_model(
    model: nnx.Module,
    batch: Any,
    call: Callable[[Any, Any], Any] | None = None,
    lowerings: Sequence[str] | None = None,
) -> Checked:
    """Check every quantized weight of a model, its rows if it is a table, and its products with the model's own inputs.

    Args:
      model: a quantized model.
      batch: what `call` takes.
      call: `call(model, batch)`, uncompiled; `model(batch)` by default. Products that it compiles are not seen.
      lowerings: names of the forms to check, each a form of one product at least; all by default.

    Of the first input that a weight is multiplied with, the first `ROWS` rows are multiplied in each form; each slice
    of a stack is checked on its own, and of experts only the weights. Raises AssertionError listing what failed as
    `check_format` does, LoweringError for a lowering that no product has, ValueError for a model that has no quantized
    weight or whose batch reaches none. The oracle holds some hundred bytes for each weight of a layer: check a small
    model.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> small = lb.quantize(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), lb.uniform(2))
    >>> print(lb.testing.check_model(small, jnp.ones((2, 8)), lowerings=["decode"]))
    Sequential: 2 checks passed
      layers/0/kernel: decode, product decode
    """
    return _run(type(model).__name__, model_checks(model, batch, call, lowerings), {})


def model_checks(
    model: nnx.Module,
    batch: Any,
    call: Callable[[Any, Any], Any] | None = None,
    lowerings: Sequence[str] | None = None,
) -> list[Check]:
    """The checks of a model, not run yet; arguments and errors as in `check_model`."""
    whole = {path: kernel.array for path, kernel in kernels(model).items()}
    if not whole:
        raise ValueError(f"{type(model).__name__} holds no quantized weight: there is nothing to check")
    slices = {f"{path}{list(at) if at else ''}": (path, at) for path, w in whole.items() for at in np.ndindex(w.stack)}
    arrays = {where: jax.tree.map(itemgetter(at), whole[path]) for where, (path, at) in slices.items()}
    seen = _inputs(model, batch, call, whole)
    inputs = {where: seen[path][at] for where, (path, at) in slices.items() if path in seen}
    forms = {path: _forms(x.shape, arrays[path].type) for path, x in inputs.items()}
    _expect_some(lowerings, forms, type(model).__name__)
    out: list[Check] = []
    for path, w in arrays.items():
        out.append(Check(path, "decode", partial(checks.check_decode, w)))
        if w.type.dims[0][0] == "n":
            out.append(Check(path, "rows", partial(checks.check_rows, w)))
        for name in forms.get(path, ()):
            if lowerings is None or name in lowerings:
                out.append(Check(path, f"product {name}", partial(checks.check_product, inputs[path], w, name)))
    return out


def _inputs(model: Any, batch: Any, call: Any, arrays: dict[str, QuantArray]) -> dict[str, Any]:
    """The first rows that each weight is multiplied with."""
    path_of = {id(next(iter(w.fields.values()))): path for path, w in arrays.items()}
    found: dict[str, Any] = {}

    def seen(x: jax.Array, w: QuantArray) -> None:
        path = path_of.get(id(next(iter(w.fields.values()))))
        if path is not None and x.size and not isinstance(x, jax.core.Tracer):
            found.setdefault(path, np.asarray(x).reshape(*w.stack, -1, x.shape[-1])[..., :ROWS, :])

    with watching(seen):
        (call or (lambda m, b: m(b)))(model, batch)
    if not found:
        raise ValueError(
            f"the batch reaches no quantized weight of this {type(model).__name__}: give one that does, and a call "
            "that does not compile"
        )
    return found


def _forms(x_shape: Sequence[int], t: QuantType) -> tuple[str, ...]:
    try:
        found = plan(x_shape, t).names
        return tuple(name for name in (*PIPELINES, *KERNELS) if name in found)
    except Exception:  # a wrong decode or pass: the checks, one for each name, say what
        return tuple(PIPELINES)


def _expect_some(lowerings: Iterable[str] | None, forms: dict[str, tuple[str, ...]], what: str) -> None:
    known = dict.fromkeys(name for names in forms.values() for name in names)
    for name in lowerings or ():
        if name not in known:
            raise LoweringError(f"lowering {name!r} cannot run {what}: use one of {', '.join(known)}")


def _run(what: str, found: Sequence[Check], refused: dict[str, str]) -> Checked:
    passed: dict[str, tuple[str, ...]] = {}
    failed: dict[Check, Exception] = {}
    for check in found:
        if any(f.where == check.where and f.name == "decode" for f in failed):
            continue  # it follows
        try:
            check.run()
        except Exception as err:
            failed[check] = err
        else:
            passed[check.where] = (*passed.get(check.where, ()), check.name)
    if failed:
        lines = [f"{check}: {_said(err)}" for check, err in failed.items()]
        count = f"{what}: {len(failed)} of {len(found)} checks failed"
        raise AssertionError("\n".join([count, *lines])) from next(iter(failed.values()))
    return Checked(what, passed, refused)


def _said(err: Exception) -> str:
    return str(err) if isinstance(err, AssertionError) else f"{type(err).__name__}: {err}"
