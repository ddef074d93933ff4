"""`lowbit tune --dp`: from a dense folder to one whose layers choose their widths, and what it says to bad input."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the command line reads tokenizer.json with tokenizers: lowbit[models]")

import tokenizers

import lowbit as lb
from lowbit.cli import run
from lowbit.cli.main import FAILED, INTERRUPTED, MISUSED
from lowbit.nn.switch import switched_kernels, switches
from tests.llama_folder import assert_same, tensors, written

CHARACTERS = "\n" + string.ascii_lowercase + string.digits + " .,:;()+-="
LAYERS = "layers/*/mlp/*"
TINY = ["--layers", LAYERS, "--format", "any_precision(2, 3)", "--steps=2", "--length=16", "--projection_steps=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random llama that spells."""
    made = written(tmp_path_factory.mktemp("models") / "llama", tensors())
    vocab = {c: i for i, c in enumerate(CHARACTERS)}
    spelled = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    spelled.decoder = tokenizers.decoders.Fuse()
    spelled.save(str(made / "tokenizer.json"))
    return str(made)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    file.write_text("".join(CHARACTERS[i] for i in rng.integers(0, len(CHARACTERS), 2000)))
    return str(file)


def said(capsys: Any, argv: list[str], code: int = 0) -> str:
    """What a command prints; to standard error where it fails."""
    capsys.readouterr()
    assert run(argv) == code, capsys.readouterr()
    out = capsys.readouterr()
    return out.err if code else out.out


@pytest.fixture(scope="module")
def quantized(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("models") / "nested")
    rules = {path: lb.any_precision(2, 3) for path in ("layers/0/mlp/up", "embed")}
    lb.models.save(lb.models.load(folder, rules), out, folder)
    return out


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("--target=2.5", MISUSED, "--target: only with --dp"),
        ("", MISUSED, "takes 3 arguments without --dp, not 1: lowbit tune MODEL TEXT TASK"),
        ("--dp", MISUSED, "--dp needs --target"),
        ("--dp --target=2.5 --method=lora", MISUSED, "--method: not with --dp"),
        ("a b c --dp --target=2.5", MISUSED, "takes 1 to 3 arguments, not 4"),
        ("--dp --target=2.9", FAILED, "--target=2.9 is out of reach: here widths are from 3 to 6 bits"),
        ("--dp --target=3.1 --format=any_precision(2,3)", FAILED, "--target=3.1 is out of reach"),
        ("--dp --target=4.8 --budget=4.5", FAILED, "--target=4.8 is out of reach: here widths are from 3 to 4.5 bits"),
        ("--dp --target=4 --format=uniform(4)", FAILED, "is read at one width: give a nested one"),
        ("--dp --target=3.5 --budget=2.5", FAILED, "--budget=2.5 is too small: the least widths take 3 bits a weight"),
        ("--dp --target=3.5 --layers=nothing/*", FAILED, "rule 'nothing/*' matches none of the 16 layers that can be"),
        ("--dp --target=3.5 --layers=**", FAILED, "--layers=**: 'embed' is Embed, and Linear layers alone choose"),
        ("--dp --target=3.5 --dense=other", MISUSED, "--dense is of a quantized MODEL, and"),
        ("TEXT --dp --target=3.5 --length=1", FAILED, "the text gives 40 tokens to find thresholds with, and their"),
    ],
)
def test_command_lines_that_nothing_is_trained_for(
    capsys: Any, monkeypatch: Any, tmp_path: Path, folder: str, text: str, line: str, code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = said(capsys, ["tune", folder, *line.replace("TEXT", text).split()], code)
    assert message in shown and shown.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_quantized_models_that_cannot_be_taken(capsys: Any, tmp_path: Path, folder: str, quantized: str) -> None:
    argv = ["tune", quantized, "--dp", "--target=2.5"]
    assert "'embed' (Embed as any_precision(hi=3, lo=2)) cannot ch" in said(capsys, [*argv, "--layers=**"], FAILED)
    assert "name that folder with --dense" in said(capsys, argv, FAILED)
    assert "is quantized too: name the folder of the dense" in said(capsys, [*argv, f"--dense={quantized}"], FAILED)
    assert "leave it out" in said(capsys, [*argv, "--format=any_precision(2, 4)"], MISUSED)
    (tmp_path / "there").mkdir()
    assert "there exists" in said(capsys, [*argv, "text", str(tmp_path / "there")], FAILED)
    assert "no folder that lowbit saved" in said(capsys, [*argv, "text", str(tmp_path / "there"), "--force"], FAILED)
    other = written(tmp_path / "other", tensors(), rms_norm_eps=1e-6)
    shown = said(capsys, [*argv, f"--dense={other}"], FAILED)
    assert f"--dense={other} has eps = 1e-06, and {quantized} has 1e-05: name the folder that it" in shown


def test_a_model_that_has_nothing_to_begin_a_text_with(capsys: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "llama", tensors())
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    shown = said(capsys, ["tune", str(folder), "--dp", "--target=4", f"--run={tmp_path / 'run'}"], FAILED)
    assert "has no token that begins a text, nor one for the end of a line: give a TEXT" in shown


@pytest.mark.slow
def test_a_folder_whose_layers_choose_their_widths(
    capsys: Any, monkeypatch: Any, tmp_path: Path, folder: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["tune", folder, text, "out", "--dp", "--target=2.4", "--budget=2.5", "--asynchronous", *TINY]
    shown = said(capsys, argv)
    assert "phase 1: within 2.5 bits, 3 layers of up to 2 bits, 3 layers of up to 3 bits" in shown
    assert "for a target of 2.4" in shown and "effective bits" in shown and "next: lowbit eval out" in shown
    made = lb.models.load("out")
    held = {path: k.type.format for path, k in switched_kernels(made).items()}
    assert len(held) == 6 and {fmt["hi"] for fmt in held.values()} == {2, 3}
    older = {path for path, switch in switches(made).items() if switch.asynchronous is not None}
    assert older == held.keys() & made.fed and older
    assert "out exists" in said(capsys, argv, FAILED)
    found = json.loads(said(capsys, ["eval", "out", f"--text={text}", "--length=16", "--json"]))
    assert 2 <= found["effective_bits"] <= 2.5
    assert "effective bits" in said(capsys, ["eval", "out", f"--text={text}", "--length=16"])
    assert "effective bits, from 2" in said(capsys, ["generate", "out", "--prompt=abc", "--tokens=4", "--bits"])
    assert "choose their widths already" in said(capsys, ["tune", "out", "--dp", "--target=2.4"], FAILED)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_and_writes_its_own_text(
    capsys: Any, monkeypatch: Any, tmp_path: Path, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["tune", folder, "--dp", "--target=2.5", *TINY]
    whole = said(capsys, [*argv, "--run=whole.run"])
    assert "no TEXT: the model writes 128 sequences of 16 tokens itself, at temperature 1 with the seed 0" in whole
    expected = lb.models.load("llama-dp-2.5")
    (tmp_path / "llama-dp-2.5").rename(tmp_path / "whole")
    module, update, steps = sys.modules["lowbit.tune.run"], sys.modules["lowbit.tune.run"].updated, []

    def stopped(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(module, "updated", stopped)
    assert "llama-dp-2.5.run: the same command goes on" in said(capsys, argv, INTERRUPTED)
    assert not (tmp_path / "llama-dp-2.5").exists()
    assert said(capsys, argv) == whole.replace("whole.run", "llama-dp-2.5.run") and len(steps) >= 3
    assert_same(lb.models.load("llama-dp-2.5"), expected)


@pytest.mark.slow
def test_a_quantized_folder_and_its_dense_model(
    capsys: Any, monkeypatch: Any, tmp_path: Path, folder: str, quantized: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["tune", quantized, text, "--dp", "--target=2.5", "--dense", folder]
    said(capsys, [*argv, "--steps=1", "--length=16", "--projection_steps=2"])
    made = lb.models.load("nested-dp-2.5")
    assert list(switches(made)) == ["layers/0/mlp/up"]
    assert_same(made.embed, lb.models.load(quantized).embed)
