"""The nodes of a term: frozen, interned, and typed at birth.

Dims are names, so there is no transpose and no broadcast: order exists only where an array is stored. Structurally
equal terms are one object, which makes equality an `is` test and a term a cheap cache key.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast
from weakref import WeakValueDictionary

import numpy as np

from lowbit.ir.dims import Dims, Shape
from lowbit.ir.dtypes import Bounds, DType, converts_exactly, numpy_dtype

if TYPE_CHECKING:
    from lowbit.ir.typing import Type

Ring = Literal["real", "gf2"]
CONST_LIMIT = 4096
"""Entries a Const may have; a larger table is a Param."""


class Interned(type):
    """Calling a node class returns the one object of that structure. The pool is weak and locked."""

    _pool: ClassVar[WeakValueDictionary[Any, Any]] = WeakValueDictionary()
    _lock: ClassVar[threading.RLock] = threading.RLock()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        new = super().__call__(*args, **kwargs)
        key = (cls, *new._values())
        with Interned._lock:
            return Interned._pool.setdefault(key, new)


@dataclass(frozen=True, eq=False)
class Base(metaclass=Interned):
    """What every node has: a type, its operands, and a way to rebuild it over other operands."""

    def __post_init__(self) -> None:
        self.type  # noqa: B018  an ill-formed node cannot exist

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __copy__(self) -> Base:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        return self

    @cached_property
    def type(self) -> Type:
        from lowbit.ir.typing import typeof  # the reading knows the nodes, so it cannot be imported first

        return typeof(cast(Expr, self))

    @property
    def dims(self) -> Dims:
        return self.type.dims

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def bounds(self) -> Bounds | None:
        return self.type.bounds

    @cached_property
    def args(self) -> tuple[Expr, ...]:
        """Operands in field order; a repeated operand is repeated."""
        out: list[Expr] = []
        for value in self._values():
            out += [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Base)]  # type: ignore[misc]
        return tuple(out)

    def map(self, fn: Callable[[Expr], Expr]) -> Expr:
        """The same node over `fn(operand)`; the same object when no operand changed."""
        new = {a: fn(a) for a in self.args}
        if all(a is b for a, b in new.items()):
            return cast(Expr, self)

        def go(v: Any) -> Any:
            if isinstance(v, Base):
                return new[cast(Expr, v)]
            return tuple(map(go, v)) if isinstance(v, tuple) and v and isinstance(v[0], Base) else v

        return cast(Expr, type(self)(*map(go, self._values())))

    def __add__(self, other: Expr | float) -> Expr:
        from lowbit.ir.build import add, lift

        return add(cast(Expr, self), lift(other, cast(Expr, self)))

    def __mul__(self, other: Expr | float) -> Expr:
        from lowbit.ir.build import contract, lift

        return contract((cast(Expr, self), lift(other, cast(Expr, self))), ())

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return self * -1

    def __sub__(self, other: Expr | float) -> Expr:
        return self + -other

    def sum(self, *over: str) -> Expr:
        from lowbit.ir.build import contract

        return contract((cast(Expr, self),), over)

    def __str__(self) -> str:
        from lowbit.ir.text import text

        return text(cast(Expr, self), short=True)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.type}>"


@dataclass(frozen=True, eq=False, repr=False)
class Param(Base):
    """A stored array, or the activation. `within` narrows the value range of an integer array."""

    name: str
    shape: Shape
    element: DType
    within: Bounds | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Const(Base):
    """A small compile-time table: little-endian bytes, so 1, 1.0, True, 0.0, -0.0 and NaN stay apart."""

    shape: Shape
    element: DType
    data: bytes

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()[:8]

    @property
    def values(self) -> np.ndarray[Any, Any]:
        flat = np.frombuffer(self.data, dtype=numpy_dtype(self.element).newbyteorder("<"))
        return flat.reshape([n for _, n in self.shape])


@dataclass(frozen=True, eq=False, repr=False)
class Unpack(Base):
    """A word becomes `count` fields of `width` bits, least significant first, along the new dim."""

    x: Expr
    width: int
    dim: str
    count: int


@dataclass(frozen=True, eq=False, repr=False)
class Bitcast(Base):
    """Reinterpret bits. With `dim`: a wider dtype joins the elements along it, a narrower one makes it."""

    x: Expr
    to: DType
    dim: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Gather(Base):
    """`table[..., index[...], ...]` along `dim`; dims of the same name are batch."""

    table: Expr
    index: Expr
    dim: str


@dataclass(frozen=True, eq=False, repr=False)
class Bucket(Base):
    """`out[c]` is the sum of x over `over` where index == c: the transpose of Gather."""

    x: Expr
    index: Expr
    dim: str
    size: int
    over: frozenset[str]


@dataclass(frozen=True, eq=False, repr=False)
class Add(Base):
    a: Expr
    b: Expr


@dataclass(frozen=True, eq=False, repr=False)
class Contract(Base):
    """The sum over dims of a product, accumulated in `acc`; over GF(2) the xor of ands."""

    factors: tuple[Expr, ...]
    over: frozenset[str]
    ring: Ring
    acc: DType


@dataclass(frozen=True, eq=False, repr=False)
class Split(Base):
    """One dim becomes several, outermost first."""

    x: Expr
    dim: str
    into: Shape


@dataclass(frozen=True, eq=False, repr=False)
class Merge(Base):
    """Several dims become one, outermost first."""

    x: Expr
    parts: tuple[str, ...]
    into: str


@dataclass(frozen=True, eq=False, repr=False)
class Cast(Base):
    """A conversion that is exact, or says that it rounds (to nearest even)."""

    x: Expr
    to: DType
    rounds: bool = False

    def map(self, fn: Callable[[Expr], Expr]) -> Expr:
        x = fn(self.x)  # its range may be narrower, and the conversion exact
        return Cast(x, self.to, self.rounds and not converts_exactly(x.dtype, x.bounds, self.to))


@dataclass(frozen=True, eq=False, repr=False)
class Slice(Base):
    x: Expr
    dim: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False, repr=False)
class Pad(Base):
    """Zeros before and after, along a dim: the transpose of Slice."""

    x: Expr
    dim: str
    before: int
    after: int


@dataclass(frozen=True, eq=False, repr=False)
class Concat(Base):
    parts: tuple[Expr, ...]
    dim: str


@dataclass(frozen=True, eq=False, repr=False)
class Call(Base):
    """An opaque step: its type, oracle, cost and lowerings are registered under its name (`lowbit.ir.call`)."""

    name: str
    operands: tuple[Expr, ...]

    def map(self, fn: Callable[[Expr], Expr]) -> Expr:
        from lowbit.ir.build import in_order

        return super().map(lambda a: in_order(fn(a), a.dims))  # a step sees arrays, so the order of dims is its input


Expr = (
    Param | Const | Unpack | Bitcast | Gather | Bucket | Add | Contract
    | Split | Merge | Cast | Slice | Pad | Concat | Call
)  # fmt: skip
"""The closed union of nodes: every reading matches it in full."""
