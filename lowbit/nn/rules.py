"""Which layer gets which format: ordered rules over layer paths, the first match wins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Literal, get_args

from lowbit.formats import Format
from lowbit.passes.in_int8 import Numerics, checked_numerics
from lowbit.quantizers import Quantizer
from lowbit.quantizers.quantizer import default_quantizer, takes_gram, weighs_by

Statistic = Literal[
    "second_moment", "largest", "magnitude", "gradient_square", "output_gradient", "gram", "guided_gram",
    "hessian_trace",
]  # fmt: skip
STATISTICS: tuple[str, ...] = get_args(Statistic)
GRAMS = ("gram", "guided_gram")
"""Of each two inputs."""
OF_MATRICES = ("hessian_trace",)
"""A number for each matrix, by which its errors cannot be told apart."""


@dataclass(frozen=True)
class Rule:
    """Layers whose path matches get `format`, or stay dense when it is None.

    Attributes:
      path: a pattern over paths such as "layers/0/mlp/up": `*` and `?` match within a part, `**` any number of parts.
      format: such as `lb.bcq(3, group=128)`; None leaves the layer dense.
      quantizer: how codes and scales are found; the format's default when None.
      numerics: what the layers' products are made of, "float", "int8" or "int8x2": see `lb.matmul`.

    >>> import lowbit as lb
    >>> rule = lb.Rule("layers/*/mlp/**", lb.bcq(3, group=128), lb.greedy())
    >>> rule.matches("layers/0/mlp/up"), rule.matches("layers/0/attention/query")
    (True, False)
    """

    path: str
    format: Format | None
    quantizer: Quantizer | None = None
    numerics: Numerics = "float"

    def matches(self, path: str) -> bool:
        return _pattern(self.path).fullmatch(path) is not None


Rules = Format | Mapping[str, Format | None] | Iterable[Rule]


@lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    out = re.escape(glob)
    for token, regex in (("**/", "(?:.*/)?"), ("/**", "(?:/.*)?"), ("**", ".*"), ("*", "[^/]*"), ("?", "[^/]")):
        out = out.replace(re.escape(token), regex.replace("*", "\0"))
    return re.compile(out.replace("\0", "*"))


def as_rules(rules: Rules) -> tuple[Rule, ...]:
    """Rules from a format for every layer, a dict of path to format, or Rules. Raises TypeError for anything else."""
    if isinstance(rules, Format):
        return (Rule("**", rules),)
    if isinstance(rules, Rule) or not isinstance(rules, Iterable):
        raise TypeError(f"{rules!r} is not a list of rules: give a format, a dict of path to format, or [lb.Rule(...)]")
    given = [Rule(path, fmt) for path, fmt in rules.items()] if isinstance(rules, Mapping) else list(rules)
    for rule in given:
        if not (isinstance(rule, Rule) and isinstance(rule.path, str) and isinstance(rule.format, Format | None)):
            raise TypeError(f"{rule!r} is not a rule: give lb.Rule(path, format), or a dict of path to format or None")
        if rule.quantizer is not None and not callable(rule.quantizer):
            raise TypeError(f"{rule!r}: {rule.quantizer!r} is not a quantizer such as lb.greedy()")
        checked_numerics(rule.numerics)
    if not given:
        raise ValueError("no rules were given: nothing would be quantized")
    return tuple(given)


def assign(
    rules: tuple[Rule, ...], paths: list[str], hints: Mapping[str, str], what: str = "layers that can be quantized"
) -> dict[str, Rule]:
    """The rule of each path that one matches. `hints` says what is at other paths that a rule might mean, and `what`
    the paths are.

    Raises ValueError for a rule that is never used: it matches no path, or an earlier rule takes every one it matches.
    """
    out: dict[str, Rule] = {}
    for path in paths:
        first = next((r for r in rules if r.matches(path)), None)
        if first is not None:
            out[path] = first
    for rule in rules:
        if not any(used is rule for used in out.values()):
            raise ValueError(_unused(rule, out, paths, hints, what))
    return out


def _unused(rule: Rule, taken: dict[str, Rule], paths: list[str], hints: Mapping[str, str], what: str) -> str:
    matched = [p for p in paths if rule.matches(p)]
    if matched:
        first, shown = taken[matched[0]].path, ", ".join(map(repr, matched[:3]))
        return f"rule {rule.path!r} is never used: {first!r} comes first and takes {shown}"
    close = get_close_matches(rule.path, paths, n=3, cutoff=0.3) or paths[:3]
    such = f"none of the {len(paths)} {what}, such as {', '.join(map(repr, close))}"
    meant = next((f"; {path!r} {hint}" for path, hint in hints.items() if rule.matches(path)), "")
    return f"rule {rule.path!r} matches {such}{meant}"


def needed(rule: Rule) -> tuple[str, ...]:
    """The statistics that a rule's quantizer weighs errors by. Raises ValueError for a format without a quantizer, and
    for what is no statistic."""
    assert rule.format is not None
    quantizer = rule.quantizer or default_quantizer(rule.format)
    known = [n for n in STATISTICS if (n in GRAMS) == takes_gram(quantizer) and n not in OF_MATRICES]
    names = weighs_by(quantizer)
    if isinstance(names, str) or not set(names) <= set(known):
        raise ValueError(f"rule {rule.path!r}: weighs_by={names!r} must be a tuple of some of {', '.join(known)}")
    return names
