"""Text generation: what it adds is what the whole model says of prompt and continuation together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.models import Config, Decoder, DenseCache, DenseKV, Rope, Sampling, generate, stream
from lowbit.models.steps import Runner, bucket

CONFIG = Config(
    vocab=48, width=32, layers=2, heads=4, kv_heads=2, head=8, hidden=32, context=32, ropes=(Rope(10_000.0, 8),) * 2
)
PROMPTS = [[5, 6, 7], [1], list(range(40))]
CHUNK = 16
"""With three prompts and 64 slots in most tests, so that they share what is compiled."""


@cache
def tiny(quantized: bool = False) -> Decoder:
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    return lb.quantize(model, {"layers/**": lb.uniform(4, group=16), "**": None}) if quantized else model


def likeliest(model: Decoder, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest token after each one of each text, by the whole model at once."""
    size = bucket(max(map(len, texts)))
    tokens = np.array([[*t, *[0] * (size - len(t))] for t in texts], np.int32)
    mask = np.arange(size) < np.array([[len(t)] for t in texts])
    found = nnx.jit(lambda model, tokens, mask: model(tokens, mask).argmax(-1))(model, tokens, mask)
    return [row[: len(t)] for row, t in zip(np.asarray(found).tolist(), texts, strict=True)]


@pytest.mark.parametrize("quantized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_greedy_tokens_are_the_likeliest_of_the_whole_model(quantized: bool) -> None:
    model = tiny(quantized)
    new = generate(model, PROMPTS, 6, chunk=CHUNK)
    assert [len(tokens) for tokens in new] == [6, 6, 6] and len({t for tokens in new for t in tokens}) > 4
    texts = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, new, strict=True)]
    for prompt, text, after in zip(PROMPTS, texts, likeliest(model, texts), strict=True):
        assert after[len(prompt) - 1 : -1] == text[len(prompt) :]


def test_a_stream_is_what_is_generated_and_arrays_are_prompts_too() -> None:
    steps = list(stream(tiny(), [np.array(p) for p in PROMPTS], 6, chunk=CHUNK))
    assert all(s.shape == (3,) and s.dtype == np.int32 for s in steps)
    assert np.stack(steps, axis=1).tolist() == generate(tiny(), PROMPTS, 6, chunk=CHUNK)


def test_a_stop_token_ends_its_sequence_and_all_ends_end_the_run() -> None:
    plain = generate(tiny(), PROMPTS, 6, chunk=CHUNK)
    stop = plain[0][2]
    want = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in plain]
    assert want != plain and any(want)
    assert generate(tiny(), PROMPTS, 6, chunk=CHUNK, stop=(stop,)) == want
    assert len(list(stream(tiny(), PROMPTS, 6, chunk=CHUNK, stop=[t[1] for t in plain]))) <= 1
    ended = [s[0] for s in stream(tiny(), PROMPTS, 6, chunk=CHUNK, stop=(stop,))]
    assert ended[len(want[0]) :] == [-1] * (len(ended) - len(want[0]))


def test_a_sequence_follows_from_its_prompt_and_seed() -> None:
    def run(prompts: Sequence[Sequence[int]], seed: int | list[int]) -> list[list[int]]:
        return generate(tiny(), prompts, 5, sampling=Sampling(1.5, top_k=30), seed=seed, slots=64, chunk=CHUNK)

    together = run(PROMPTS, 7)
    assert together == run(PROMPTS, [7, 8, 9])
    assert together[::-1] == run(PROMPTS[::-1], [9, 8, 7])
    same = run([PROMPTS[0]] * 3, 7)
    assert same[0] == together[0] and same[0] != same[1]


@pytest.mark.slow
def test_nothing_is_compiled_for_a_length_or_a_step() -> None:
    model = Decoder(replace(CONFIG, vocab=40, layers=1, ropes=CONFIG.ropes[:1]), rngs=nnx.Rngs(0))
    compiled = Runner(model, DenseKV(), Sampling()).program

    def run(sizes: Sequence[int], n: int) -> tuple[int, int]:
        generate(model, [[1] * size for size in sizes], n, slots=64, chunk=32)
        return compiled.store._cache_size(), compiled.step._cache_size()

    assert run([3, 1], 2) == (1, 1)
    assert run([17, 5], 9) == (1, 1)  # 16 tokens are read, the last one takes the first step
    assert run([18, 2], 3) == (2, 1)
    assert run([60, 40], 3) == (2, 1)  # in pieces of 32
    assert Runner(nnx.clone(model), DenseKV(), Sampling(1.0)).program is compiled


@pytest.mark.parametrize(("size", "want"), [(1, 16), (16, 16), (17, 32), (512, 512), (513, 1024)])
def test_buckets(size: int, want: int) -> None:
    assert bucket(size) == want


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there are no prompts: give at least one"),
        ([[1], []], {}, "prompt 1 is empty: give at least one token, such as the one that begins a text"),
        (
            [[1], [2, 48]],
            {},
            "prompt 1 has token 48 at place 1, and the model knows 48, from 0 to 47: use the tokenizer",
        ),
        ([[-1]], {}, "prompt 0 has token -1 at place 0, and the model knows 48"),
        ([[1]], {"stop": (99,)}, "stop has token 99 at place 0, and the model knows 48"),
        ([[1]], {"n": 0}, "n = 0: generate at least 1 token"),
        ([[1]], {"chunk": 0}, "chunk = 0: read at least 1 token at once"),
        ([[1]], {"seed": -1}, "seed = -1: it must be from 0 to 4294967295"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 numbers for 1 prompts: give one for each, or one integer"),
        (
            [[1], [1] * 30],
            {"slots": 32},
            "prompt 1 has 30 tokens, and with n = 4 new ones takes 33 slots of a cache that has 32: give slots=33",
        ),
    ],
)
def test_refusals(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        stream(tiny(), prompts, **{"n": 4, **options})


def test_learned_positions_end() -> None:
    model = Decoder(replace(CONFIG, layers=1, ropes=None), rngs=nnx.Rngs(0))
    message = "^prompt 0 has 30 tokens, and with n = 4 new ones takes 33 positions of a model that has learned 32: give"
    with pytest.raises(ValueError, match=message):
        stream(model, [[1] * 30], 4)
    stream(model, [[1] * 30], 3)


def test_what_is_no_token_and_no_model() -> None:
    with pytest.raises(TypeError, match=r"^prompt 0 is float64\[1\]: give a sequence of integers, the tokens"):
        generate(tiny(), [[0.5]], 4)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^prompt 0 is int64\[1, 1\]: give a sequence"):
        generate(tiny(), [np.ones((1, 1), np.int64)], 4)
    with pytest.raises(TypeError, match=r"^prompt 0 is int64\[\]: give a sequence"):
        generate(tiny(), [1, 2], 4)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^prompt 0 is <U3\[\]: give a sequence of integers, the tokens"):
        generate(tiny(), ["def"], 4)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^cannot generate with a Linear: give an lb.models.Decoder"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [[1]], 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["n", "slots", "chunk", "seed"])
def test_what_is_no_integer(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} = 32\.0: give an integer$"):
        stream(tiny(), [[1]], **{"n": 4, name: 32.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path",
    ["layers/0/attn/k", pytest.param("layers/1/mlp/down", marks=pytest.mark.slow), "layers/1/mlp_norm", "norm", "head"],
)
def test_logits_that_are_not_finite_name_the_layer(path: str) -> None:
    model = nnx.clone(tiny())
    layer: Any = model
    for key in path.split("/"):
        layer = layer[int(key)] if key.isdigit() else getattr(layer, key)
    weight = layer.scale if "norm" in path else layer.kernel
    weight.set_value(weight.get_value().at[(3,) * weight.ndim].set(jnp.nan))
    message = (
        f"^the logits of prompt 0 are not finite after its 3 tokens: the first NaN or inf is what layer '{path}' ret"
    )
    with pytest.raises(FloatingPointError, match=message):
        generate(model, PROMPTS, 6, chunk=CHUNK)


def test_one_prompt_whose_logits_are_not_finite_is_named() -> None:
    model = nnx.clone(tiny())
    model.embed.embedding.set_value(model.embed.embedding.get_value().at[39].set(jnp.inf))
    with pytest.raises(
        FloatingPointError, match=r"^the logits of prompt 2 are .* its 40 tokens: .* layer 'embed' returns"
    ):
        generate(model, PROMPTS, 6, chunk=CHUNK)


def test_a_quantized_layer_that_is_not_finite_is_named() -> None:
    model = nnx.clone(tiny(True))
    scale = model.layers[1].attn.o.kernel.scale
    scale.set_value(jnp.full_like(scale.get_value(), jnp.inf))
    with pytest.raises(FloatingPointError, match="is what layer 'layers/1/attn/o' returns"):
        generate(model, PROMPTS, 6, chunk=CHUNK)


@dataclass(frozen=True)
class Spoiled(DenseKV):
    def empty(self, config: Config, batch: int, slots: int, dtype: Any) -> tuple[DenseCache, ...]:
        layers = super().empty(config, batch, slots, dtype)
        return tuple(replace(c, k=jnp.full_like(c.k, jnp.nan), positions=c.positions + 1) for c in layers)


def test_a_cache_that_is_not_finite_is_named() -> None:
    with pytest.raises(
        FloatingPointError, match="without a cache those of all layers are, so look at what the cache st"
    ):
        generate(tiny(), PROMPTS, 6, cache=Spoiled(), chunk=CHUNK)
