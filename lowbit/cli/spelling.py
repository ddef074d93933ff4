"""Formats, quantizers and rules as they are written on a command line and in JSON files."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lowbit as lb
from lowbit import quantizers
from lowbit.formats.format import definition
from lowbit.nn.rules import Rule
from lowbit.quantizers import Quantizer

FORMATS: Mapping[str, Any] = {name: getattr(lb, name) for name in (
    "any_bcq", "any_precision", "bcq", "codebook", "k_quant", "nested_fp", "scaled_fp8", "uniform",
)}  # fmt: skip
QUANTIZERS: Mapping[str, Any] = {name: getattr(quantizers, name) for name in (
    "additive_codebooks", "alternating", "gptq", "greedy", "lnq", "nested_kmeans", "progressive", "refitted_kmeans",
    "residual_kmeans", "round_to_nearest", "AdditiveCodebooks", "BinarySolver", "Gptq", "Lnq", "MinMax", "NestedKMeans",
    "ProgressiveSolver", "RefittedKMeans", "ResidualKMeans", "RoundToNearest", "TwoLevelRounding",
)}  # fmt: skip
"""The second half is their classes, as `lb.allocate` writes them."""
RULE = '{"path": "layers/**", "format": "uniform(4, group=128)", "quantizer": "gptq()"}'


def format_of(text: str) -> lb.Format:
    """The format that a call such as "uniform(4, group=128)" makes. Raises ValueError for what is none."""
    made = _called(text, FORMATS, "format")
    assert isinstance(made, lb.Format)
    return made


def quantizer_of(text: str) -> Quantizer:
    """The quantizer that "gptq()" or "lnq(rounds=2)" makes, or its own text, "Gptq(act_order=True, ...)".

    Raises ValueError for what is none.
    """
    made: Quantizer = _called(text, QUANTIZERS, "quantizer")
    return made


def _called(text: str, known: Mapping[str, Any], what: str) -> Any:
    """Only calls of these names with plain constants: nothing else of a text is ever run."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in known:
            raise ValueError(f"known are {', '.join(known)}")
        args = [ast.literal_eval(arg) for arg in call.args]
        return known[call.func.id](*args, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, TypeError, ValueError) as err:
        raise ValueError(f"{text!r} is no {what}: {err}") from err


def read_rules(path: str) -> list[Rule]:
    """The rules of a JSON file: a list, or an object with "rules", of objects like `RULE`.

    A rule's format is a text, null to leave layers dense, or the name beside its "options", as `lb.allocate` saves it.
    Raises ValueError that names the file and the rule.
    """
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is no JSON ({err})") from err
    found = data.get("rules") if isinstance(data, Mapping) else data
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no list of rules: write [{RULE}]")
    return [_rule(path, i, given) for i, given in enumerate(found)]


def _rule(path: str, i: int, given: Any) -> Rule:
    where = f"{path}: rule {i} is {json.dumps(given)}"
    if not isinstance(given, Mapping) or not isinstance(given.get("path"), str) or "format" not in given:
        raise ValueError(f"{where}: it needs a path and a format, as {RULE} has them")
    if unknown := sorted(given.keys() - {"path", "format", "options", "quantizer", "numerics"}):
        raise ValueError(f"{where}: {unknown[0]!r} is not known")
    try:
        fmt, quantizer = given["format"], given.get("quantizer")
        return Rule(
            given["path"],
            None if fmt is None else _format(fmt, given.get("options")),
            None if quantizer is None else quantizer_of(quantizer),
            given.get("numerics", "float"),
        )
    except (TypeError, ValueError, KeyError) as err:
        raise ValueError(f"{where}: {err}") from err


def _format(name: str, options: Mapping[str, Any] | None) -> lb.Format:
    if options is None:
        return format_of(name)
    definition(name)
    return lb.Format(name, tuple(sorted(options.items())))
