"""A model cut at its blocks: what each one is called with follows from what those before it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal, get_opaque_trace_state

from lowbit.nn.kernel import joined
from lowbit.nn.reached import Inputs
from lowbit.nn.rules import Rule, assign


class Stage(nnx.Module):
    """Stands for a block in a model that is cut."""

    def __init__(self, path: str, visit: Callable[..., Any]) -> None:
        self.path = path
        self.visit = visit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.visit(self.path, args, kwargs)


@dataclass(frozen=True)
class Survey:
    """How a model runs its blocks, for batches of one shape.

    Attributes:
      returned: what each block returns, abstract, in the order in which they run.
      needs: for each block the earlier ones from whose outputs its inputs are computed.
    """

    returned: dict[str, Any]
    needs: dict[str, frozenset[str]]

    def live_after(self, path: str) -> frozenset[str]:
        """The blocks up to this one whose outputs later ones need."""
        order = list(self.needs)
        at = order.index(path) + 1
        return frozenset().union(*(self.needs[later] for later in order[at:])) & set(order[:at])


class Cut:
    """A model in parts: its blocks, and what runs between them.

    The latter is traced from the model itself, with every block standing for what it returned. So a block may be called
    with anything, and whatever lies between blocks may use the outputs of all before.
    """

    def __init__(self, model: nnx.Module, patterns: str | Sequence[str], run: Callable[[Any, Any], Any]) -> None:
        self.blocks = found = find(model, patterns)
        self.run = run

        def stage(path: tuple[Any, ...], node: Any) -> Any:
            return Stage(joined(path), self._visit) if joined(path) in found else node

        self.graph, self.state = nnx.split(nnx.recursive_map(stage, nnx.clone(model)))
        self.surveys: dict[Any, Survey] = {}
        self.before = jax.jit(self._inputs, static_argnums=0)

    def survey(self, batch: Any) -> Survey:
        """How batches like this one run. Raises ValueError for blocks that do not run once and by themselves."""
        shapes = _shapes(batch)
        if shapes not in self.surveys:
            order: list[str] = []

            def whole(state: Any, batch: Any) -> dict[str, Any]:
                returned = self._run(state, batch, None)[1]
                order.extend(returned)
                return returned

            found = jax.eval_shape(whole, self.state, batch)
            if missed := self.blocks.keys() - found.keys():
                raise ValueError(f"block {min(missed)!r} does not run: leave it out of blocks=, or give another call=")
            returned = {path: found[path] for path in order}
            self.surveys[shapes] = Survey(returned, self._needs(batch, returned))
        return self.surveys[shapes]

    def inputs(self, path: str, batch: Any, outputs: Mapping[str, Any]) -> Inputs:
        """What a block is called with, given the outputs of those that it needs."""
        needs = self.survey(batch).needs[path]
        made: Inputs = self.before(path, self.state, batch, {p: outputs[p] for p in needs})
        return made

    def _inputs(self, path: str, state: Any, batch: Any, outputs: Mapping[str, Any]) -> Inputs:
        abstract = self.surveys[_shapes(batch)].returned
        unused = {path: a for path, a in abstract.items() if path not in outputs}
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), unused)
        return self._run(state, batch, {**zeros, **outputs})[0][path]

    def _run(self, state: Any, batch: Any, given: Mapping[str, Any] | None) -> tuple[dict[str, Inputs], dict[str, Any]]:
        """Inputs and outputs of all blocks, the latter those given or else those computed."""
        self.called: dict[str, Inputs] = {}
        self.returned: dict[str, Any] = {}
        self.given = given
        self.trace = get_opaque_trace_state(convention="nnx")
        self.run(nnx.merge(self.graph, state), batch)
        return self.called, self.returned

    def _visit(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if get_opaque_trace_state(convention="nnx") != self.trace:
            raise ValueError(
                f"block {path!r} runs within a transformation, such as nnx.scan or jax.jit: name blocks that are not "
                "transformed, and leave the compiling to this function"
            )
        if path in self.called:
            raise ValueError(f"block {path!r} runs twice for a batch: it has no one input and output; leave it out")
        self.called[path] = inputs = Inputs.of(args, kwargs)
        if self.given is None:
            self.returned[path] = inputs.call(nnx.merge(*nnx.split(self.blocks[path]), copy=True))
        else:
            self.returned[path] = self.given[path]
        return self.returned[path]

    def _needs(self, batch: Any, returned: dict[str, Any]) -> dict[str, frozenset[str]]:
        given = self.state, batch, returned
        made, called = jax.make_jaxpr(lambda *given: self._run(*given)[0], return_shape=True)(*given)
        at = len(jax.tree.leaves((self.state, batch)))
        owner: dict[Any, str] = {}
        for path in sorted(returned):  # as the leaves of a dict are
            for _ in jax.tree.leaves(returned[path]):
                owner[made.jaxpr.invars[at]] = path
                at += 1
        needs, first = {}, 0
        for path in sorted(called):
            last = first + len(called[path].arrays)
            needs[path] = frozenset(owner[v] for v in _sources(made.jaxpr, first, last) if v in owner)
            first = last
        return {path: needs[path] for path in returned}


class Stream:
    """A model on its way through all batches, block after block. What blocks take and return is held by the host."""

    def __init__(self, cut: Cut, batches: Sequence[Any]) -> None:
        self.cut = cut
        self.batches = batches
        self.outputs: list[dict[str, Any]] = [{} for _ in batches]

    def inputs(self, path: str, at: int) -> Inputs:
        """What a block is called with for one batch, after `go_on` with all blocks before it."""
        found: Inputs = jax.device_get(self.cut.inputs(path, self.batches[at], self.outputs[at]))
        return found

    def go_on(self, path: str, returned: Sequence[Any]) -> None:
        """Takes note of what a block returned for each batch, and forgets what no later one needs."""
        for batch, outputs, value in zip(self.batches, self.outputs, returned, strict=True):
            outputs[path] = value
            for done in outputs.keys() - self.cut.survey(batch).live_after(path):
                del outputs[done]


def find(model: nnx.Module, patterns: str | Sequence[str]) -> dict[str, nnx.Module]:
    """The modules that patterns over paths name. Raises ValueError for a pattern without any, blocks within blocks, and
    blocks that share parameters with another or with the rest of the model."""
    modules = {joined(path): m for path, m in nnx.iter_modules(model) if path}
    rules = tuple(Rule(p, None) for p in ([patterns] if isinstance(patterns, str) else patterns))
    if not rules:
        raise ValueError("no blocks were named: give patterns over the paths of modules, such as 'layers/*'")
    found = {path: modules[path] for path in assign(rules, list(modules), {}, "modules of the model")}
    for path in found:
        if outer := next((p for p in found if path.startswith(f"{p}/")), None):
            raise ValueError(f"block {path!r} lies within block {outer!r}: name one of them")
    nodes = dict(nnx.iter_graph(model))
    for group in nnx.find_duplicates(model):
        shared = next(nodes[path] for path in group if path in nodes)
        places = {_block_of(joined(path), found): joined(path) for path in group}
        if len(places) > 1 and (isinstance(shared, nnx.Param) or jax.tree.leaves(nnx.state(shared, nnx.Param))):
            block = next(p for p in places if p is not None)
            other = next(where for p, where in places.items() if p != block)
            raise ValueError(
                f"{places[block]!r} of block {block!r} is {other!r} too, outside of the block: tuned here, it would be "
                "another one there; leave the block out"
            )
    return found


def _block_of(path: str, found: Mapping[str, nnx.Module]) -> str | None:
    return next((p for p in found if path == p or path.startswith(f"{p}/")), None)


def _sources(jaxpr: Any, first: int, last: int) -> set[Any]:
    """The variables that some outputs of a program are computed from."""
    live = {v for v in jaxpr.outvars[first:last] if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not live.isdisjoint(eqn.outvars):
            live.update(v for v in eqn.invars if not isinstance(v, Literal))
    return live


def _shapes(batch: Any) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
