"""Checkpoints that `lb.models.load` refuses, paths that are none, and the tokenizer beside them."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lowbit as lb
from tests.llama_folder import CONFIG, H, W, assert_same, tensors, written

RULES = {"layers/*/mlp/*": lb.uniform(4, group=16), "embed": lb.uniform(4, group=16)}
SOLVING = import_module("lowbit.nn.resume")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "llama", tensors())


def _without(name: str) -> dict[str, np.ndarray]:
    return {n: a for n, a in tensors().items() if name not in n}


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("arrays", "config", "message"),
    [
        (
            _without("up_proj"),
            {},
            r"it lacks 2 tensors \('model\.layers\.0\.mlp\.up_proj\.weight', .*\), and the mo.* nothing",
        ),
        (_without("layers.1"), {}, r"it lacks 9 tensors \('model\.layers\.1\.input.* and 6 more\), and"),
        (
            tensors() | {"a.b": np.zeros(2)},
            {},
            r"it lacks nothing, and the model has no place for 1 tensors \('a\.b'\)",
        ),
        (tensors(), {"num_hidden_layers": 1}, r"no place for 9 tensors \('model\.layers\.1\..* and 6 more\)"),
        (tensors(), {"intermediate_size": 80}, r"float32\[64, 32\], but config\.json makes it \[80, 32\]: get both"),
        (
            tensors() | {UP: np.zeros((H, W), np.int8)},
            {},
            rf"'{re.escape(UP)}' is int8\[64, 32\], not floats, and config",
        ),
        (
            tensors(),
            {"model_type": "rwkv"},
            r"llama: config\.json states model_type = 'rwkv'; this library loads llama, ",
        ),
        (tensors(), {"hidden_size": None}, r"llama: config\.json "),
        (
            tensors(),
            {"num_key_value_heads": 3},
            r"llama: config\.json describes no model: 4 heads of queries cannot sh",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(lb.CheckpointError, match=message):
        lb.models.load(written(tmp_path / "llama", arrays, **config), RULES)


def test_what_a_family_does_not_need_may_be_there(tmp_path: Path) -> None:
    stored = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    model = lb.models.load(written(tmp_path / "llama", stored, tie_word_embeddings=True))
    assert not hasattr(model, "head")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "golden/models/gpt2"
    stored = load_file(source / "model.safetensors")
    stored |= {name.removeprefix("transformer."): array for name, array in stored.items() if "ln_f" in name}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(
        lb.CheckpointError, match=r"ln_f\.bias', '.*ln_f\.weight' is there under two names: leave one of"
    ):
        lb.models.load(tmp_path)


def test_shards_that_are_missing_or_truncated_are_named(tmp_path: Path) -> None:
    at = written(tmp_path / "llama", tensors(), shards=3)
    shard = at / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(
        lb.CheckpointError, match=r"model-1\.safetensors is truncated: it has \d+ bytes, and its header"
    ):
        lb.models.load(at)
    shard.unlink()
    with pytest.raises(lb.CheckpointError, match=r"1 of 3 files .* are missing, the first is 'model-1\.safetensors'"):
        lb.models.load(at)


def test_nan_in_a_layer_that_is_quantized_is_named(tmp_path: Path) -> None:
    stored = tensors()
    stored[UP][3, 5] = np.nan
    with pytest.raises(ValueError, match=r"^layer 'layers/0/mlp/up' has 1 NaN or inf among its 2048 entries"):
        lb.models.load(written(tmp_path / "llama", stored), RULES)


def test_a_rule_without_a_layer_is_refused_before_anything_is_read(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(SOLVING, "quantize_array", None)
    with pytest.raises(ValueError, match=r"rule 'layers/\*/ffn' matches none of the 16 layers that can be quantized"):
        lb.models.load(folder, {"**": lb.uniform(4), "layers/*/ffn": lb.uniform(4)})


def test_numbers_beyond_a_dtype_are_refused(tmp_path: Path) -> None:
    stored = tensors()
    stored[UP][0, 0] = 1e5
    with pytest.raises(
        lb.CheckpointError, match=r"up_proj\.weight' has numbers beyond float16's 65504.*: load it with dty"
    ):
        lb.models.load(written(tmp_path / "llama", stored), dtype=jnp.float16)


def test_a_full_disk_while_quantizing_is_said_and_leaves_no_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write '.*resume.*safetensors': No space left on device"):
        lb.models.load(folder, RULES, resume=tmp_path / "resume")
    assert not list((tmp_path / "resume").iterdir())


# ---------------------------------------------------------------- paths, the hub, tokenizers


def test_paths_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^there is no folder '/a/b/c', and a model of the hub is 'organization/"
    ):
        lb.models.load("/a/b/c")
    with pytest.raises(lb.CheckpointError, match=r"safetensors' is a file: name the folder that holds it"):
        lb.models.load(folder / "model.safetensors")
    with pytest.raises(
        lb.CheckpointError, match=r" holds no config\.json: name a checkpoint's folder, or get that file"
    ):
        lb.models.load(tmp_path)


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    code = "import lowbit as lb; lb.models.load('organization/model')"
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert re.search(
        r"OSError: there is no folder 'organization/model', and the hub does not give it \(.*\): download the folder "
        r"by other means and give its path\n$",
        done.stderr,
    )
    assert time.monotonic() - start < 60


def test_a_model_of_the_hub_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def snapshot(name: str, *, revision: Any, **_: Any) -> str:
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert_same(lb.models.load("organization/model", revision="v2"), lb.models.load(folder))
    assert asked == [("organization/model", "v2")]


@pytest.mark.parametrize(
    ("package", "call"),
    [("huggingface_hub", "load('organization/model')"), ("tokenizers", "tokenizer('examples/tinylm/model')")],
)
def test_packages_that_are_missing_are_named(package: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'lowbit\[models\]'"):
        eval(f"lb.models.{call}")


def test_tokenizers_and_what_ends_a_text(folder: Path) -> None:
    with pytest.raises(
        lb.CheckpointError, match=r"llama holds no tokenizer\.json: get it with the rest of the checkpoint"
    ):
        lb.models.tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        lb.CheckpointError, match=r"tokenizer\.json is no tokenizer that the library tokenizers can read"
    ):
        lb.models.tokenizer(folder)
    assert lb.models.stop_tokens(folder) == ()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 2}))
    assert lb.models.stop_tokens(folder) == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert lb.models.stop_tokens(folder) == (3, 4)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(
        lb.CheckpointError, match=r"generation_config\.json states eos_token_id = 'x': give an int or a l"
    ):
        lb.models.stop_tokens(folder)
