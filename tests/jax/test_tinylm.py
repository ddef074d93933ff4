"""The example's model, corpus, evaluation and shipped weights."""

import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from examples.tinylm import corpus, train, weights
from examples.tinylm.batches import Windows
from examples.tinylm.evaluate import bits_per_byte, windows
from examples.tinylm.generate import generate
from examples.tinylm.model import Config, TinyLM, attend, causal_attend, rope
from examples.tinylm.optim import kinds, orthogonalize, trapezoid

ROOT = pathlib.Path(__file__).parents[2]
SMALL = Config(layers=2, width=128, hidden=128, head=32, context=16)
EPS = float(jnp.finfo(jnp.float32).eps)


def small(seed: int = 0) -> TinyLM:
    """A small model whose every parameter is random: at birth o and down are 0 and attention would not show."""
    model = TinyLM(SMALL, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)

    def draw(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[0]), x.dtype)

    nnx.update(model, jax.tree.map(draw, state))
    return model


def tokens(batch: int, length: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(256, size=(batch, length)))


# ---- corpus


def test_the_split_is_a_pure_function_of_content() -> None:
    for domain, byte in corpus.HASH_BYTE.items():
        for text in (b"", b"x", b"import os\n" * 7):
            expected = hashlib.sha256(text).digest()[byte] < corpus.THRESHOLD[domain]
            assert corpus.held_out(text, domain) == expected


@pytest.mark.parametrize("domain", ["code", "topics"])
def test_every_listed_text_is_held_out_by_the_rule(domain: str) -> None:
    here = corpus.stdlib_files() if domain == "code" else corpus.topics()
    by_hash = {corpus.digest(text): text for text in here.values()}
    wanted = corpus.listed(domain)
    assert len({item.sha256 for item in wanted}) == len(wanted) > 0
    for item in wanted:
        assert int(item.sha256[2 * corpus.HASH_BYTE[domain] :][:2], 16) < corpus.THRESHOLD[domain]
        if item.sha256 in by_hash:
            assert len(by_hash[item.sha256]) == item.size


def test_no_training_file_is_held_out_by_hash_or_by_name() -> None:
    train = corpus.train_code()
    assert not any(corpus.held_out(content) for content in train.values())
    assert not {item.name for item in corpus.listed("code")} & train.keys()
    assert not {item.sha256 for item in corpus.listed("code")} & {corpus.digest(c) for c in train.values()}
    assert not any(name.startswith(("pydoc_data", "encodings", "test/")) or "/tests/" in name for name in train)
    assert train == corpus.train_code()


def test_no_held_out_paragraph_is_tuned_on() -> None:
    held = corpus.match_listed("topics").text
    tune = corpus.tune_prose()
    shared = {p for p in tune.split(b"\n\n") if len(p) > 60 and p in held}
    assert not shared
    assert len(tune) > 100_000


def test_match_counts_what_this_python_has(tmp_path: pathlib.Path) -> None:
    everything = corpus.match_listed("code")
    one = next(item for item in corpus.listed("code") if (corpus.library_path() / item.name).exists())
    copy = tmp_path / one.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes((corpus.library_path() / one.name).read_bytes())
    alone = corpus.match_listed("code", tmp_path)
    assert (alone.files, len(alone.text)) == (1, one.size)
    assert (alone.of_files, alone.of_bytes) == (everything.of_files, everything.of_bytes)
    assert f"matched 1 of {alone.of_files} texts" in str(alone)
    copy.write_bytes(b"changed\n")
    with pytest.raises(ValueError, match="has none of the"):
        corpus.match_listed("code", tmp_path)


def test_xz_is_worse_than_entropy_and_better_than_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    assert 8 < corpus.xz_bits(noise) < 8.3
    assert corpus.xz_bits(bytes(4096)) < 0.25


# ---- model


def test_config_names_the_size_it_refuses() -> None:
    with pytest.raises(ValueError, match="hidden=700 is not a multiple of 128"):
        Config(hidden=700)
    with pytest.raises(ValueError, match="head=48"):
        Config(head=48)


def test_linear_inputs_are_whole_groups_and_names_are_usual() -> None:
    names = weights.named(TinyLM(SMALL, rngs=nnx.Rngs(0)))
    kernels = {name: x.shape for name, x in names.items() if name.endswith("kernel")}
    blocks = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert set(kernels) == {f"layers.{i}.{part}.kernel" for i in range(SMALL.layers) for part in blocks}
    assert all(shape[0] % 128 == 0 for shape in kernels.values())
    assert names["embed.embedding"].shape == (256, SMALL.width)
    assert not any("bias" in name for name in names)


@pytest.mark.slow
def test_logits_are_float32_and_causal() -> None:
    model, given = small(), tokens(2, 12)
    logits = model(given)
    assert logits.shape == (2, 12, 256) and logits.dtype == jnp.float32
    changed = model(given.at[:, 7].set((given[:, 7] + 1) % 256))
    # Positions before the change run the very same arithmetic on the same numbers: equal to the bit.
    np.testing.assert_array_equal(np.asarray(logits[:, :7]), np.asarray(changed[:, :7]))
    assert all(np.any(np.asarray(logits[:, t] != changed[:, t])) for t in range(7, 12))


@pytest.mark.slow
def test_blocked_attention_equals_the_full_square() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 10, 2, 8)), jnp.float32) for _ in range(3))
    full = attend(q, k, v, jnp.tril(jnp.ones((10, 10), dtype=bool)))
    blocked = causal_attend(q, k, v, block=4)
    # Two sums of at most 10 terms follow a softmax whose scores (8 products each) are off by a few eps of |q||k|.
    scale = float(jnp.max(jnp.linalg.norm(q, axis=-1)) * jnp.max(jnp.linalg.norm(k, axis=-1)))
    np.testing.assert_allclose(full, blocked, rtol=0, atol=(8 * scale + 2 * 10) * EPS * float(jnp.max(jnp.abs(v))))


@pytest.mark.slow
def test_rope_depends_on_distance_alone() -> None:
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i: int, j: int) -> float:
        return float(jnp.sum(rope(q, jnp.array([i]), 1e4) * rope(k, jnp.array([j]), 1e4)))

    size = float(jnp.linalg.norm(q) * jnp.linalg.norm(k))
    # An angle below 32 radians is rounded to 32 eps; 16 products follow.
    assert score(9, 4) == pytest.approx(score(25, 20), abs=(2 * 32 + 16) * EPS * size)
    assert abs(score(9, 4) - score(9, 8)) > 1e-2


def test_cached_decode_equals_the_full_forward() -> None:
    model, given = small(), tokens(2, SMALL.context)
    full = np.asarray(model(given))
    step = nnx.jit(lambda model, cache, token, pos: model.decode_step(cache, token, pos))
    cache = model.init_cache(2)
    for pos in range(SMALL.context):
        logits, cache = step(model, cache, given[:, pos], jnp.asarray(pos))
        # The two orders of summation differ by eps at each of about 10 layers of sums over K <= 128 random terms,
        # which err by sqrt(K) eps of their size; the logits are a last such sum, of rows of norm about 8.
        bound = 10 * 128**0.5 * EPS * 8 * np.abs(full).max()
        np.testing.assert_allclose(logits, full[:, pos], rtol=0, atol=bound)


@pytest.mark.slow
def test_generation_continues_what_the_forward_predicts() -> None:
    model, prompt = small(), b"def f("
    text = prompt
    for _ in range(5):
        padded = list(text.ljust(len(prompt) + 5))  # no position sees a later one, and all lengths are compiled once
        text += bytes([int(jnp.argmax(model(jnp.asarray(padded)[None])[0, len(text) - 1]))])
    assert prompt + generate(model, prompt, 5) == text
    assert generate(model, prompt, 30, temperature=1.0, seed=1) != generate(model, prompt, 30, temperature=1.0, seed=2)
    with pytest.raises(ValueError, match="at least one byte"):
        generate(model, b"", 5)


# ---- training parts


def test_windows_follow_the_seed_and_cover_the_text() -> None:
    text = np.arange(1000) % 251
    one, two = Windows(text.astype(np.uint8), 10, seed=0), Windows(text.astype(np.uint8), 10, seed=0)
    two.batch(90, 4)  # a resumed run starts in the middle
    np.testing.assert_array_equal(one.batch(3, 4), two.batch(3, 4))
    epoch = one.batch(0, one.count)
    starts = [int(row[0]) for row in epoch]
    assert epoch.shape == (98, 11) and len({tuple(row) for row in epoch}) == 98
    assert all((np.diff(row.astype(int)) % 251 == 1).all() for row in epoch) and starts != sorted(starts)


def asked(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Config:
    monkeypatch.setattr("sys.argv", ["train", "--out", "out", *flags])
    return train.configured(train.parse())


def test_sizes_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) == Config()
    larger = asked(monkeypatch, "--size", "12M", "--context", "256")
    blocks = larger.layers * (4 * larger.width**2 + 3 * larger.width * larger.hidden)
    assert larger.context == 256 and 11.5e6 < blocks + 256 * larger.width < 12.5e6


@pytest.mark.slow
def test_the_larger_size_takes_a_step(tmp_path: pathlib.Path) -> None:
    sizes = ["--size", "12M", "--context", "32", "--batch", "2", "--micro", "1", "--replicas", "1", "--stop", "1"]
    command = [
        sys.executable,
        "-m",
        "examples.tinylm.train",
        "--out",
        str(tmp_path),
        "--scratch",
        str(tmp_path),
        *sizes,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, step = map(json.loads, (tmp_path / "train_log.jsonl").read_text().splitlines())
    assert head["parameters"] > 11.5e6 and step["step"] == 1 and 0 < step["loss"] < 10


def test_rate_rises_stays_and_falls_to_zero() -> None:
    rate = trapezoid(warmup=4, steps=20, decay=8)
    values = [float(rate(jnp.asarray(i))) for i in range(21)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0] and values[4:13] == [1.0] * 9
    assert values[13:] == [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]


@pytest.mark.parametrize("shape", [(2, 16, 48), pytest.param((1, 48, 16), marks=pytest.mark.slow)])
def test_orthogonalize_sets_singular_values_near_one(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    out = np.asarray(orthogonalize(jnp.asarray(rng.normal(size=shape), jnp.float32)))
    # What the quintic does in exact arithmetic to every singular value above 1e-2 of the norm, give or take bf16.
    values = np.linalg.svd(out, compute_uv=False)
    assert out.shape == shape and 0.6 < values.min() and values.max() < 1.3


def test_muon_takes_the_kernels_only() -> None:
    labels = kinds(nnx.state(TinyLM(SMALL, rngs=nnx.Rngs(0)), nnx.Param))
    flat = {jax.tree_util.keystr(path): label for path, label in jax.tree_util.tree_leaves_with_path(labels)}
    assert all((label == "muon") == ("kernel" in path) for path, label in flat.items())
    assert {"muon", "adam"} == set(flat.values())


# ---- evaluation and weights


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 17, 100])
def test_windows_predict_each_byte_once_from_what_precedes_it(size: int) -> None:
    text = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    inputs, targets, counts = windows(text, 16)
    assert bytes(targets[counts]) == text
    stream = b"\n" + text
    position = 0
    for row in range(len(inputs)):
        for column in np.flatnonzero(counts[row]):
            seen = bytes(inputs[row, : column + 1])
            assert stream[: position + 1].endswith(seen) and len(seen) >= min(8, position + 1)
            position += 1


@pytest.mark.slow
def test_bits_per_byte_is_the_mean_of_the_log_likelihood() -> None:
    model, text = small(), b"for i in range(3)"[: SMALL.context]
    stream = jnp.asarray(list(b"\n" + text))
    nats = optax.softmax_cross_entropy_with_integer_labels(model(stream[None, :-1])[0], stream[1:]).sum()
    expected = float(nats) / np.log(2) / len(text)
    # Two sums of 16 positive float32 terms, each off by the few eps of a 256-way log-sum-exp of logits below 64.
    assert bits_per_byte(model, text) == pytest.approx(expected, abs=(16 + 64) * 4 * EPS * expected)
    with pytest.raises(ValueError, match="empty"):
        bits_per_byte(model, b"")


def test_weights_survive_the_file(tmp_path: pathlib.Path) -> None:
    model = small()
    weights.save(model, tmp_path / "model")
    back = weights.load(tmp_path / "model")
    assert back.config == SMALL and lb.models.tokenizer(tmp_path / "model").get_vocab_size() == 256
    for name, value in weights.named(model).items():
        loaded = weights.named(back)[name]
        assert loaded.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(value).astype(np.float16).astype(np.float32), np.asarray(loaded))


def test_weights_beyond_half_precision_are_refused(tmp_path: pathlib.Path) -> None:
    model = small()
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], 1e6)
    with pytest.raises(ValueError, match=r"norm\.scale has values beyond fp16"), np.errstate(over="ignore"):
        weights.save(model, tmp_path / "model")


@pytest.mark.slow
def test_the_shipped_folder_is_a_checkpoint_of_the_same_model() -> None:
    mine, theirs = weights.load(), lb.models.load(weights.MODEL, dtype=jnp.float32)
    every = jnp.arange(256)
    # Rows are rounded to halves, by 2^-11 of an entry or half of the least half; before, their norms by some eps.
    np.testing.assert_allclose(
        theirs.embed(every), mine.embed_norm(mine.embed(every)), rtol=2**-11 + 8 * EPS, atol=2**-25
    )
    text = np.frombuffer(corpus.match_listed("code").text[:256], np.uint8)[None].astype(np.int32)
    theirs.embed.embedding[...] = mine.embed_norm(mine.embed.embedding[...])
    ours, other = mine(jnp.asarray(text)), theirs(jnp.asarray(text))
    # With the very rows, what is left is the order of sums: of 768 terms at most, in 3 layers of 7 products.
    assert np.abs(ours - other).max() <= 768 * EPS * 21 * np.abs(ours).max()


def test_the_tokenizer_has_a_token_for_each_byte() -> None:
    tokenizer = lb.models.tokenizer(weights.MODEL)
    for text in ("def f():\n\treturn 'é ∞ 🙂'\r\n", "  two  spaces ", "\x00\x7f\u0080\uffff", "don't 12,345"):
        assert bytes(tokens := tokenizer.encode(text).ids) == text.encode()
        assert tokenizer.decode(tokens) == text
    assert tokenizer.get_vocab_size() == 256 and lb.models.stop_tokens(weights.MODEL) == ()


@pytest.mark.slow
def test_shipped_weights_compress_code_better_than_xz() -> None:
    assert (weights.MODEL / "model.safetensors").stat().st_size <= 8 * 2**20
    held = corpus.match_listed("code").text
    bits = bits_per_byte(weights.load(), held[: 1 << 16])
    assert bits < 0.9 * corpus.xz_bits(held)


def test_the_log_says_how_the_weights_came_about() -> None:
    log = weights.MODEL.with_name("train_log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    parameters = sum(x.size for x in weights.named(weights.load()).values())
    assert all(head["parameters"] == parameters for head in records if "versions" in head)
    steps = [record for record in records if "step" in record]
    assert steps[-1]["step"] == [head for head in records if "versions" in head][-1]["flags"]["steps"]
    assert steps[-1]["bits_per_byte"] < steps[0]["bits_per_byte"]
