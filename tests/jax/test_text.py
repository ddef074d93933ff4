"""Windows of tokens from texts and files: what they hold, their order, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.testing.tolerance import assert_within, unit

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def batches(source: Any, **kwargs: Any) -> lb.tune.TextBatches:
    return lb.tune.text_batches(source, str.encode, **({"vocab": 256, "length": 5, "batch": 2} | kwargs))


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_every_token_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(ALPHABET)
    data = batches(tmp_path / "a.txt")
    assert data.tokens.shape == data.mask.shape == (5, 6)
    assert bytes(data.tokens[0].tolist()) == b"abcdef" and bytes(data.tokens[1].tolist()) == b"fghijk"
    assert bytes(data.tokens[:, 1:][data.mask[:, 1:]].tolist()).decode() == ALPHABET[1:]
    longer = batches([ALPHABET + "!"])
    assert len(longer.tokens) == 6 and longer.mask[-1].tolist() == [True, True] + 4 * [False]


def test_an_epoch_has_every_window_once_and_depends_on_seed_and_number_alone() -> None:
    data = batches([ALPHABET], batch=2)
    assert len(data) == 3
    epochs = []
    for epoch in range(3):
        found = [data[3 * epoch + i] for i in range(3)]
        tokens = np.concatenate([b["tokens"] for b in found])
        assert tokens.shape == (6, 6)
        assert not found[2]["mask"][1].any(), "the last batch is filled with windows without targets"
        assert sorted(map(tuple, tokens[:5])) == sorted(map(tuple, data.tokens))
        epochs.append(tokens)
    assert any((epochs[0] != other).any() for other in epochs[1:])
    again = batches([ALPHABET], batch=2)
    np.testing.assert_array_equal(again[7]["tokens"], data[7]["tokens"])  # asked for out of order
    np.testing.assert_array_equal(again[0]["tokens"], data[0]["tokens"])
    other = batches([ALPHABET], batch=2, seed=1)
    assert any((other[i]["tokens"] != data[i]["tokens"]).any() for i in range(6))
    with pytest.raises(IndexError, match="counted from 0, and -1"):
        data[-1]


def test_only_completions_and_ends_are_targets(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}, "", {"prompt": "1+1=", "completion": "2"})
    data = batches(path, length=11, end=0)
    assert len(data.tokens) == 1
    assert bytes(data.tokens[0].tolist()) == b"2+2=4\x001+1=2\x00"
    assert data.mask[0].tolist() == [*4 * [False], True, True, *4 * [False], True, True]
    same = batches([{"prompt": "2+2=", "completion": "4"}, {"prompt": "1+1=", "completion": "2"}], length=11, end=0)
    np.testing.assert_array_equal(same.mask, data.mask)
    texts = batches(jsonl(tmp_path / "b.jsonl", {"text": "abc", "id": 7}, {"text": "def"}), length=5)
    assert bytes(texts.tokens[0].tolist()) == b"abcdef" and texts.mask.all()


def test_windows_without_targets_are_left_out() -> None:
    data = batches([{"prompt": ALPHABET, "completion": "!"}])
    assert len(data.tokens) == 1
    assert bytes(data.tokens[0][data.mask[0]].tolist()) == b"!"


def test_split() -> None:
    data = batches([ALPHABET])
    train, held = data.split(0.4)
    assert (len(train.tokens), len(held.tokens)) == (3, 2)
    np.testing.assert_array_equal(np.concatenate([train.tokens, held.tokens]), data.tokens)
    for share, many in ((0.05, 0), (0.99, 5)):
        with pytest.raises(ValueError, match=rf"{share} of 5 windows is {many}: both parts need one"):
            data.split(share)


REFUSED = [
    (["abc"], {}, "the text has 3 tokens, but one window takes 6, length + 1: give more text"),
    ([], {}, "the text has 0 tokens, but one window takes 6"),
    ([ALPHABET], {"vocab": 100}, "text 0: vocabulary mismatch: it has token 122, but the model knows 100 tokens"),
    ([ALPHABET], {"end": 256}, "end: vocabulary mismatch: it has token 256, but the model knows 256 tokens"),
    ([ALPHABET, {"txt": "a"}], {}, "text 1 lacks 'text' and has 'txt': give {\"text\": ...} or"),
    ([{"prompt": "a"}], {}, "text 0 lacks 'completion' and has 'prompt'"),
    ([{"completion": "a"}], {}, "text 0 lacks 'prompt' and has 'completion'"),
    ([{"text": 5}], {}, "text 0: 'text' is 5: it must be a string"),
    ([{"prompt": "a", "completion": ""}], {}, "text 0: 'completion' is empty: leave the line out"),
    ([["a"]], {}, "text 0 is ['a']: give"),
    ([ALPHABET], {"length": 0}, "length must be at least 1, not 0"),
    ([{"prompt": "", "completion": "a"}, {"prompt": "abcde", "completion": "é"}], {"vocab": 128}, "token 195"),
]


@pytest.mark.parametrize(("source", "kwargs", "message"), REFUSED, ids=[r[2][:30] for r in REFUSED])
def test_refusals(source: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        batches(source, **kwargs)


def test_a_file_that_cannot_be_used_is_named_with_the_line(tmp_path: Path) -> None:
    broken = jsonl(tmp_path / "a.jsonl", {"text": "a"}, '{"text": "b')
    with pytest.raises(ValueError, match=re.escape(f"{broken}:2 is no JSON (")):
        batches(broken)
    with pytest.raises(ValueError, match=re.escape(f"{jsonl(broken, {'text': 'a'}, '', '7')}:3 is 7: give")):
        batches(broken)
    with pytest.raises(ValueError, match=re.escape(f"{jsonl(broken, {'text': 'ab'})} has 2 tokens")):
        batches(broken)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'b.txt'} is no UTF-8 text")):
        batches(tmp_path / "b.txt")
    with pytest.raises(FileNotFoundError):
        batches(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="the text has no token to predict"):
        lb.tune.text_batches([{"prompt": ALPHABET, "completion": "?"}], lambda t: t.encode() if t != "?" else [],
                             vocab=256, length=5, batch=1)  # fmt: skip


def test_the_loss_is_that_of_the_targets() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    tokens = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])
    mask = np.array([[True, False, True, True], [False, False, False, True]])
    total, count = lb.tune.next_token_loss(lambda given: jnp.asarray(logits), {"tokens": tokens, "mask": mask})
    assert int(count) == 3
    exact = logits.astype(np.float64)
    losses = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, tokens[:, 1:, None], -1)[..., 0]
    want = losses[mask[:, 1:]]
    # Eight exponentials, their sum, a logarithm, two differences: each number at most 8 in size and rounded 20 times.
    assert_within(total, want.sum(), 3 * 20 * 8 * unit("float32"))
