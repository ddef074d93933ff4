"""Continuous batching: each request gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import lowbit as lb
from lowbit.models import Batcher, Config, Decoder, NewToken, Rope, Sampling, generate

CONFIG = Config(
    vocab=48, width=32, layers=1, heads=4, kv_heads=2, head=8, hidden=32, context=32, ropes=(Rope(10_000.0, 8),)
)
REQUESTS = [([5, 6, 7], 6), ([1], 3), (list(range(40)), 4), ([9, 9], 1), ([30, 2, 4, 8] * 5, 7), ([11], 5)]
SLOTS = 64


@cache
def tiny() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@cache
def nested() -> Decoder:
    return lb.quantize(tiny(), {"layers/**": lb.nested_fp(), "**": None})


@cache
def alone(request: int) -> list[int]:
    prompt, n = REQUESTS[request]
    return generate(tiny(), [prompt], n, slots=SLOTS, chunk=16)[0]


def run(batcher: Batcher, arrivals: dict[int, int], **options: Any) -> dict[int, list[int]]:
    """All tokens of each of REQUESTS, the ones that arrive before a step added before it."""
    out: dict[int, list[int]] = {i: [] for i in range(len(arrivals))}
    done: list[int] = []
    at = 0
    while batcher.busy or len(done) < len(arrivals):
        for request in [r for r, when in arrivals.items() if when == at]:
            prompt, n = REQUESTS[request]
            assert batcher.add(prompt, n, **options) == request
        for new in batcher.step():
            assert new.request not in done
            out[new.request] += [] if new.token is None else [new.token]
            done += [new.request] if new.done else []
        at += 1
    assert sorted(done) == list(arrivals)
    return out


@pytest.mark.parametrize("arrivals", [[0] * 6, [0, 1, 1, 4, 20, 21]])
def test_requests_that_join_and_leave_get_what_each_gets_alone(arrivals: list[int]) -> None:
    batcher = Batcher(tiny(), rows=3, slots=SLOTS, budget=16)
    found = run(batcher, dict(enumerate(arrivals)))
    assert found == {i: alone(i) for i in range(len(REQUESTS))}
    compiled = batcher.runner.program
    counts = [f._cache_size() for f in (compiled.store, compiled.step, compiled.join)]
    found = run(Batcher(tiny(), rows=3, slots=SLOTS, budget=16), {0: 0, 1: 3, 2: 3})
    assert found == {i: alone(i) for i in range(3)}
    assert counts == [f._cache_size() for f in (compiled.store, compiled.step, compiled.join)]
    assert counts[2] == 1


@pytest.mark.slow
def test_the_rows_of_a_quantized_cache() -> None:
    kind = lb.models.Kivi(4, group=8, residual=16)
    batcher = Batcher(tiny(), rows=3, slots=SLOTS, budget=16, cache=kind)
    picked = {0: 2, 1: 4, 2: 2}  # read in the pieces that `generate` reads them in
    for request in picked.values():
        batcher.add(*REQUESTS[request])
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while batcher.busy:
        for new in batcher.step():
            assert new.token is not None
            found[new.request].append(new.token)
    for i, request in picked.items():
        prompt, n = REQUESTS[request]
        assert found[i] == generate(tiny(), [prompt], n, slots=SLOTS, chunk=16, cache=kind)[0]


@pytest.mark.slow
def test_a_step_reads_no_more_than_its_budget_and_others_run_meanwhile() -> None:
    scheduled: list[int] = []
    batcher = Batcher(nested(), rows=3, slots=SLOTS, budget=16, width=lambda tokens: scheduled.append(tokens) or 16)
    batcher.add([1], 6)
    assert [new.request for new in batcher.step()] == [0]
    batcher.add(list(range(40)), 1)
    steps = [[(new.request, new.done) for new in batcher.step()] for _ in range(3)]
    assert steps == [[(0, False)], [(0, False)], [(0, False), (1, True)]]
    assert scheduled == [1, 16 + 1, 16 + 1, 7 + 2]  # 39 tokens of the prompt are read, its last one is a step's


def test_a_stop_token_and_a_seed() -> None:
    sampling = Sampling(1.5)
    want = generate(tiny(), [[5, 6, 7]], 6, sampling=sampling, seed=3, slots=SLOTS)[0]
    batcher = Batcher(tiny(), rows=3, slots=SLOTS, sampling=sampling, budget=16)
    batcher.add([1], 6)
    batcher.add([5, 6, 7], 6, stop=(want[3],), seed=3)
    steps = [[new for new in batcher.step() if new.request == 1] for _ in range(4)]
    assert want[3] not in want[:3]
    assert steps == [*([NewToken(1, token, False)] for token in want[:3]), [NewToken(1, None, True)]]
    assert batcher.rows[1] is None


def test_one_program_reads_weights_at_the_width_of_each_step() -> None:
    def at(width: Callable[[int], int]) -> dict[int, list[int]]:
        return run(Batcher(nested(), rows=3, slots=SLOTS, budget=16, width=width), {0: 0, 1: 0, 2: 1})

    picked = list(enumerate(REQUESTS[:3]))
    compiled = Batcher(nested(), rows=3, slots=SLOTS).runner.program
    fixed = {w: at(lambda _, w=w: w) for w in (8, 16)}  # type: ignore[misc]
    switched = at(lambda tokens: 8 if tokens > 4 else 16)
    assert (compiled.store._cache_size(), compiled.step._cache_size()) == (1, 1)
    for w, found in fixed.items():
        read = lb.at_width(nested(), w)
        assert found == {i: generate(read, [prompt], n, slots=SLOTS, chunk=16)[0] for i, (prompt, n) in picked}
    assert fixed[8] != fixed[16] != switched


def test_logits_that_are_not_finite_end_that_request_and_name_its_layer() -> None:
    model = nnx.clone(tiny())
    model.embed.embedding.set_value(model.embed.embedding.get_value().at[39].set(jnp.inf))
    batcher = Batcher(model, rows=3, slots=SLOTS, budget=16)
    for prompt in [1], [39], [2, 39]:
        batcher.add(prompt, 2)
    for request, tokens in (1, 1), (2, 2):
        match = rf"^the logits of request {request} are .* its {tokens} tokens: .* layer 'embed' returns"
        with pytest.raises(FloatingPointError, match=match):
            batcher.step()
    batcher.add([1], 2)  # into the row of one that failed
    told = [batcher.step() for _ in range(3)]
    found = {request: [new.token for news in told for new in news if new.request == request] for request in range(4)}
    expected = generate(model, [[1]], 2, slots=SLOTS, chunk=16)[0]
    assert found == {0: expected, 1: [], 2: [], 3: expected}
    assert not batcher.busy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "^rows = 0: it must be at least 1$"),
        ({"slots": 0}, "^slots = 0: it must be at least 1$"),
        ({"budget": 0}, "^budget = 0: it must be at least 1$"),
    ],
)
def test_sizes_below_one(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batcher(tiny(), **{"rows": 1, "slots": 16, **options})  # type: ignore[arg-type]


def test_requests_that_are_refused() -> None:
    batcher = Batcher(tiny(), rows=3, slots=SLOTS)
    batcher.add([1], 2)
    for prompt, n, message in [
        ([1] * 64, 2, "^request 1 has 64 tokens, and with n = 2 new ones takes 65 slots of a cache that has 64: give"),
        ([], 2, "^request 1 is empty: give at least one token"),
        ([48], 2, "^request 1 has token 48 at place 0, and the model knows 48"),
        ([1], 0, "^n = 0: generate at least 1 token"),
    ]:
        with pytest.raises(ValueError, match=message):
            batcher.add(prompt, n)
    assert batcher.add([2], 2) == 1
