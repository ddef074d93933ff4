"""What a format is: a name, a version, its options, and the expression that decodes it.

A format is defined by one function from sizes and options to a decode term. Its stored arrays are the leaves of that
term; its gradients, lowerings, costs and files follow from the term.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from lowbit.ir.expr import Expr
from lowbit.ir.walk import params

Decode = Callable[..., Expr]
Views = tuple[str, Callable[..., Iterable[int]]]
"""An option that chooses how the same stored arrays are read, and its values, from the other options."""
Activations = Callable[..., Expr]
"""From activations, a float term, and a format's options to what its products multiply with."""
TRIAL = (4096, 4096)
"""The size at which new options are tried: a multiple of every usual word, vector and group."""


@dataclass(frozen=True)
class Format:
    """A format with its options filled in: hashable, comparable, printable. Make one with `lb.bcq(...)` and the like.

    Attributes:
      name: the registered name.
      options: sorted (option, value) pairs; values are ints, floats, bools, strings or None.
    """

    name: str
    options: tuple[tuple[str, Hashable], ...] = ()

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]

    @property
    def version(self) -> int:
        return definition(self.name).version

    def decode(self, n: int, k: int) -> Expr:
        """The decode term of an [n, k] weight, k being the summed (input) dim. Its dims are n and k."""
        return definition(self.name).decode(n, k, **dict(self.options))

    def activations(self, x: Expr) -> Expr:
        """What products multiply with in place of activations x [m, k]: a term of the same dims, usually x itself."""
        encode = definition(self.name).activations
        encoded = x if encode is None else encode(x, **dict(self.options))
        if encoded.dims != x.dims:
            raise ValueError(f"format {self} makes activations {encoded.type} of {x.type}: their dims must be the same")
        return encoded

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths at which the same stored arrays can be read; none for a format with one reading."""
        views, options = definition(self.name).views, dict(self.options)
        return () if views is None else tuple(views[1](**{o: v for o, v in options.items() if o != views[0]}))

    def at(self, width: int) -> Format:
        """The reading of the same stored arrays at another width. Raises ValueError for one that there is not.

        >>> import lowbit as lb
        >>> str(lb.any_precision(3, 6).at(4))
        'any_precision(hi=6, width=4)'
        """
        if (views := definition(self.name).views) is None:
            raise ValueError(f"{self} is read at one width only")
        if type(width) is not int or width not in self.widths:
            first, last = self.widths[0], self.widths[-1]
            known = f"{first} to {last}" if self.widths == (*range(first, last + 1),) else f"{self.widths}"
            raise ValueError(f"{self} is read at widths {known}, not {width!r}")
        return Format(self.name, tuple(sorted({**dict(self.options), views[0]: width}.items())))

    def __str__(self) -> str:
        usual = {p.name: p.default for p in inspect.signature(definition(self.name).decode).parameters.values()}
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options if v != usual.get(k))})"


@dataclass(frozen=True)
class Definition:
    """A registered format.

    Attributes:
      decode: `decode(n, k, **options)` gives the term; it raises ValueError for options or sizes it cannot store.
      version: goes up whenever stored arrays of an older version would decode differently.
      views: how else the same arrays can be read.
      activations: what products multiply with in place of x.
    """

    decode: Decode
    version: int
    views: Views | None = None
    activations: Activations | None = None


_DEFINITIONS: dict[str, Definition] = {}


def register_format(
    name: str, *, version: int = 1, views: Views | None = None, activations: Activations | None = None
) -> Callable[[Decode], Callable[..., Format]]:
    """Define a format by its decode function; the decorated name becomes the constructor of `Format`s.

    `views=(option, values)` is for stored arrays that can be read in several ways: the option that says how, and a
    function from the other options to its values, in order. The arrays are those that any of the readings has.

    `activations(x, **options)` is for products that also encode what the weight is multiplied with: a term of the
    activations x [m, k], with the same dims, or x itself for options that leave them as they are. The gradient of x
    goes straight through it, as if it were x.

    The function takes the sizes `n` (outputs) and `k` (inputs), then keyword options, and returns a term with the
    dims n and k. Integer leaves are codes and never trained; float leaves are scales, or codebooks where a code
    selects from them. A leaf is not called `x` or `dy`, which are the activation and a cotangent.

    Raises ValueError for a name that is taken, or when a format is made for such a leaf; TypeError for what is no
    expression, and for options that a file cannot hold.

    >>> import lowbit as lb
    >>> from lowbit.ir import const, param
    >>> @lb.register_format("int8_rows")
    ... def int8_rows(n, k):
    ...     return param("scale", "f32", n=n) * param("codes", "i8", n=n, k=k)
    >>> str(int8_rows())
    'int8_rows()'
    """

    def wrap(decode: Decode) -> Callable[..., Format]:
        if name in _DEFINITIONS:
            raise ValueError(f"format {name!r} is already registered")
        signature = inspect.signature(decode)
        options = inspect.Signature([p for p in signature.parameters.values() if p.name not in ("n", "k")])

        def make(*args: Any, **kwargs: Any) -> Format:
            bound = options.bind(*args, **kwargs)
            bound.apply_defaults()
            _check_term(name, decode(*TRIAL, **bound.arguments))  # wrong options are an error here, not layers later
            _check_storable(name, bound.arguments)
            return Format(name, tuple(sorted(bound.arguments.items())))

        make.__name__, make.__doc__ = name, decode.__doc__
        make.__signature__ = options  # type: ignore[attr-defined]
        _DEFINITIONS[name] = Definition(decode, version, views, activations)
        return make

    return wrap


def _check_storable(name: str, options: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if type(value) not in (int, float, bool, str, NoneType):
            what = f"option {option} of format {name!r} is {value!r}, a {type(value).__name__}"
            raise TypeError(f"{what}: files hold ints, floats, bools, strings and None")


def _check_term(name: str, term: Any) -> None:
    if not isinstance(term, Expr):
        raise TypeError(f"format {name!r} decodes to a {type(term).__name__}, not an expression of lowbit.ir")
    if taken := params(term).keys() & {"x", "dy"}:
        raise ValueError(f"format {name!r} stores {sorted(taken)}: x and dy name what weights meet, so rename them")


def definition(name: str) -> Definition:
    if name not in _DEFINITIONS:
        known = ", ".join(sorted(_DEFINITIONS)) or "none"
        what = f"format {name!r} is not registered (known: {known})"
        raise UnknownFormatError(f"{what}: import the module that defines it")
    return _DEFINITIONS[name]


class UnknownFormatError(KeyError):
    """A format name that nothing has registered."""

    def __str__(self) -> str:  # KeyError would show the message quoted
        return str(self.args[0])
