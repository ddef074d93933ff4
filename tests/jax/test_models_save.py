"""Models in folders of lowbit's own: saved, replaced and opened again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.models.switches import abstract_switches
from lowbit.nn.checkpoint import held
from lowbit.nn.switch import SETTINGS
from tests.llama_folder import W, assert_same, tensors, written

RULES = {"layers/*/mlp/*": lb.uniform(4, group=16), "embed": lb.uniform(4, group=16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "llama", tensors())


@pytest.mark.parametrize("rules", [None, RULES])
def test_a_saved_folder_comes_back_bit_by_bit(folder: Path, tmp_path: Path, rules: Any) -> None:
    model = lb.models.load(folder, rules, dtype=jnp.bfloat16)
    lb.models.save(model, tmp_path / "saved", folder)
    again = lb.models.load(tmp_path / "saved")
    assert_same(again, model)
    assert hash(nnx.graphdef(again)) == hash(nnx.graphdef(model))  # so that both run in the same programs


def test_a_saved_folder_has_what_text_needs_and_says_who_wrote_it(tmp_path: Path) -> None:
    source = "examples/tinylm/model"
    lb.models.save(lb.models.load(source), tmp_path / "saved", source)
    assert {f.name for f in (tmp_path / "saved").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    j = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert j.pop("quantization_config") == {"quant_method": "lowbit", "version": 1, "dtype": "float16"}
    assert j == json.loads(Path(source, "config.json").read_text())
    assert lb.models.tokenizer(tmp_path / "saved").encode("a").ids == [97]
    lb.models.save(lb.models.load(tmp_path / "saved"), tmp_path / "again", tmp_path / "saved")  # its own source
    rules = {"layers/0/mlp/up": lb.uniform(4)}
    assert_same(lb.models.load(tmp_path / "again", rules), lb.models.load(source, rules))


def test_a_save_replaces_only_what_it_is_told_to(folder: Path, tmp_path: Path) -> None:
    model, saved = lb.models.load(folder), tmp_path / "saved"
    lb.models.save(model, saved, folder)
    with pytest.raises(FileExistsError, match=r"saved' exists: choose another name, or say overwrite=True"):
        lb.models.save(model, saved, folder)
    with pytest.raises(FileExistsError, match=r"llama' is no folder that lowbit saved: choose another name, or delete"):
        lb.models.save(model, folder, folder, overwrite=True)
    model.norm.scale[...] = jnp.zeros(W)
    lb.models.save(model, saved, folder, overwrite=True)
    assert_same(lb.models.load(saved), model)
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "saved"}
    (saved / "notes.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"saved' holds 'notes\.md', which lowbit did not save: choose another"):
        lb.models.save(model, saved, folder, overwrite=True)
    assert (saved / "notes.md").read_text() == "mine"


@pytest.mark.parametrize("when", ["write", "kill"])
def test_a_save_that_fails_leaves_the_old_folder(folder: Path, tmp_path: Path, when: str) -> None:
    """The disk is full (a limit on the size of files, that raises as a full disk does), or the process is killed."""
    lb.models.save(lb.models.load(folder), tmp_path / "saved", folder)
    old = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    kill = "save.save_model = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    code = f"""
import os, resource, signal, sys
import lowbit as lb
from lowbit.models import save
save = sys.modules["lowbit.models.save"]
model = lb.models.load({str(folder)!r})
{limit if when == "write" else kill}
lb.models.save(model, {str(tmp_path / "saved")!r}, {str(folder)!r}, overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    if when == "write":
        assert f"OSError: [Errno 27] cannot write {str(tmp_path / 'saved')!r}: File too large" in done.stderr
        assert {p.name for p in tmp_path.iterdir()} == {"llama", "saved"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == old


def test_a_model_that_load_would_not_make_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = lb.models.load(folder)
    with pytest.raises(ValueError, match=r"config\.json describes another model: name the folder that this one came"):
        lb.models.save(model, tmp_path / "saved", "examples/tinylm/model")
    model.extra = nnx.Param(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"the model is not as one that is loaded, in 'extra': write it with lb\.save"):
        lb.models.save(model, tmp_path / "saved", folder)
    with pytest.raises(
        TypeError, match=r"^cannot save a Linear as a folder: give a model of lb\.models, or use lb\.save"
    ):
        lb.models.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "saved", folder)  # type: ignore[arg-type]
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f, j: j["quantization_config"].update(version=3),
            r"states version 3 of lowbit's folders, and this library reads 1 and 2: upgrade",
        ),
        (
            lambda f, j: j["quantization_config"].update(dtype="int8"),
            r"saved/config\.json states dtype = 'int8', which is no type of floats: get the file again",
        ),
        (lambda f, j: j["quantization_config"].update(dtype="half a float"), r"dtype = 'half a float', which is no ty"),
        (lambda f, j: (f / "model.safetensors").unlink(), r"saved holds no model\.safetensors: get the file again"),
        (
            lambda f, j: j.update(num_hidden_layers=3),
            r"model\.safetensors does not fit Decoder: the file lacks 'layers/2",
        ),
        (
            lambda f, j: j.update(intermediate_size=80),
            r"'layers/0/mlp/down/kernel' is stored as float32\[64, 32\], but th",
        ),
    ],
)
def test_a_folder_of_lowbit_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    saved = tmp_path / "saved"
    lb.models.save(lb.models.load(folder), saved, folder)
    j = json.loads((saved / "config.json").read_text())
    spoil(saved, j)
    (saved / "config.json").write_text(json.dumps(j))
    with pytest.raises(lb.CheckpointError, match=message):
        lb.models.load(saved)


# ---------------------------------------------------------------- layers that choose their widths

ESTIMATES = {
    "up": {"slope": np.float32(0.5), "offset": np.float32(0.125)},
    "gate": {"projection": jnp.full((3, W), 0.25, jnp.bfloat16)},
    "down": {},
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("models") / "llama", tensors())


@pytest.fixture(scope="module")
def switched(origin: Path) -> Any:
    """A model with each kind of estimator, one of whose layers has lost planes."""
    model = lb.models.load(origin, {"layers/0/mlp/*": lb.any_precision(2, 4)})
    model = lb.tune.narrowed(model, {"layers/0/mlp/down": 3}, layers="layers/0/mlp/down")
    widths = {name: np.int32(b) for name, b in {"low": 2, "high": 3, "most": 3}.items()}
    for name, estimate in ESTIMATES.items():
        values = {**widths, "threshold": np.float32(1.5), **estimate}
        getattr(model.layers[0].mlp, name).kernel.reader = lb.nn.Switch({n: jnp.asarray(v) for n, v in values.items()})
    return model


@pytest.mark.parametrize("by", ["row", "call"])
def test_layers_that_choose_their_widths_come_back_as_they_were(
    origin: Path, tmp_path: Path, switched: Any, by: Any
) -> None:
    model = lb.nn.switching(switched, by)
    lb.models.save(model, tmp_path / "saved", origin)
    again = lb.models.load(tmp_path / "saved")
    assert_same(again, model)
    assert hash(nnx.graphdef(again)) == hash(nnx.graphdef(model))
    stated = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert stated["version"] == 2 and stated["switches"]["layers/0/mlp/up"]["by"] == by
    lb.models.save(again, tmp_path / "again", tmp_path / "saved")  # its own source
    blended = lb.tune.blended(model, {f"layers/0/mlp/{n}": 3 for n in ESTIMATES}, 2.5)
    with pytest.raises(ValueError, match=r"in 'layers/0/mlp/\w+/kernel/reader/z'"):
        lb.models.save(blended, tmp_path / "blended", origin)


def test_all_that_is_static_in_a_switch_is_saved(switched: Any) -> None:
    switch = switched.layers[0].mlp.down.kernel.reader
    has = {n: v for n, v in vars(switch).items() if not n.startswith("_") and v is not None}
    assert {n for n, v in has.items() if not isinstance(v, nnx.Variable)} == SETTINGS.keys()


def test_a_switch_needs_all_that_it_estimates_by(switched: Any) -> None:
    entries = held(switched)
    line = next(name.rpartition("/")[0] for name in entries if name.endswith("/slope"))
    path = line.removesuffix("/kernel/reader")
    assert list(abstract_switches(entries, {path: {"by": "row"}})) == [path]
    for name in ("offset", "low"):
        fewer = {n: v for n, v in entries.items() if n != f"{line}/{name}"}
        with pytest.raises(ValueError, match=f"layer '{path}' chooses its width, and stored are"):
            abstract_switches(fewer, {path: {"by": "row"}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda found: found.clear(), r"the model lacks 'layers/0/mlp/down/kernel/reader/high'"),
        (lambda found: found.update({"layers/1/mlp/up": found["layers/0/mlp/up"]}), r"'layers/1/mlp/up' chooses its w"),
        (
            lambda found: found["layers/0/mlp/up"].update(by="token"),
            r"by = 'token' of layer 'layers/0/mlp/up', which",
        ),
        (lambda found: found["layers/0/mlp/up"].clear(), r"states {} of layer 'layers/0/mlp/up', which are not the se"),
    ],
)
def test_switches_that_do_not_fit_are_refused(
    origin: Path, tmp_path: Path, switched: Any, spoil: Any, message: str
) -> None:
    saved = tmp_path / "saved"
    lb.models.save(switched, saved, origin)
    j = json.loads((saved / "config.json").read_text())
    spoil(j["quantization_config"]["switches"])
    (saved / "config.json").write_text(json.dumps(j))
    with pytest.raises(lb.CheckpointError, match=message):
        lb.models.load(saved)
    j["quantization_config"]["switches"] = 3
    (saved / "config.json").write_text(json.dumps(j))
    with pytest.raises(lb.CheckpointError, match="states switches = 3, which are no settings by layer: get the file"):
        lb.models.load(saved)
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(lb.CheckpointError, match=r"model\.safetensors"):
        lb.models.load(saved)
