"""Every command of `lowbit` on the tiny language model, and what it says to bad input."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="the command line reads tokenizer.json with tokenizers: lowbit[models]")

import lowbit as lb
from lowbit.cli import run, spelling
from lowbit.cli.main import COMMANDS, FAILED, INTERRUPTED, MISUSED
from lowbit.models import load

TINY = str(Path(__file__).parents[2] / "examples/tinylm/model")
LAYERS = [f"layers/0/attn/{name}" for name in "koqv"]
TEXT = "def double(x):\n    return x + x\n\n\n" * 8
FEW = "--layers=layers/0/attn/*"  # of one shape


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "code.py"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A quantized folder; a few layers, for they take time."""
    folder = str(tmp_path_factory.mktemp("models") / "q")
    assert run(["quantize", TINY, folder, "--format=uniform(4, group=128)", FEW]) == 0
    return folder


def said(capsys, argv, code=0):
    """What a command prints; to standard error where it fails."""
    capsys.readouterr()
    assert run(argv) == code
    out = capsys.readouterr()
    return out.err if code else out.out


def test_overview_names_every_command_and_each_has_an_example(capsys):
    assert all(name in said(capsys, []) for name in COMMANDS)
    for name in COMMANDS:
        shown = said(capsys, [name, "--help"])
        assert f"lowbit {name}" in shown.partition("For example:")[2] and "--" in shown


def test_quantize_report_and_explain(capsys, small):
    assert "uniform(bits=4, group=128)" in said(capsys, ["report", small])
    found = json.loads(said(capsys, ["report", small, "--json"]))
    quantized = [row["layer"] for row in found["layers"] if row["format"].startswith("uniform")]
    assert quantized == LAYERS
    assert "on gpu" in said(capsys, ["explain", small, quantized[0], "--batch=8", "--platform=gpu"])
    assert "layers/0/attn/q" in said(capsys, ["explain", small, "layers/0/attn/p"], FAILED)
    assert not Path(f"{small}.unfinished").exists()


@pytest.mark.slow
def test_within_a_budget(capsys, tmp_path):
    target = str(tmp_path / "q")
    shown = said(capsys, ["quantize", TINY, target, "--bits=3.25", FEW])
    assert f"wrote {target}" in shown
    rows = [row for row in lb.report(load(target)).rows if row.format.startswith("uniform")]
    assert 3.0 < 8 * sum(r.bytes for r in rows) / sum(r.weights for r in rows) <= 3.25


@pytest.mark.slow
def test_allocate_writes_rules_that_quantize_takes(capsys, tmp_path, text):
    rules, target = str(tmp_path / "rules.json"), str(tmp_path / "q")
    argv = ["allocate", TINY, rules, "--bits=3", FEW, "--choice=uniform(2)", "--choice=uniform(4)"]
    measured = [f"--calibration={text}", "--length=32", "--by=loss"]
    assert "together" in said(capsys, [*argv, *measured])
    assert {rule["path"] for rule in json.loads(Path(rules).read_text())["rules"]} == {*LAYERS}
    said(capsys, ["quantize", TINY, target, f"--rules={rules}"])
    assert "exists" in said(capsys, [*argv, *measured], FAILED)


def test_a_table_is_a_layer_too(capsys, tmp_path):
    argv = ["allocate", TINY, str(tmp_path / "rules.json"), "--bits=4", "--layers=embed", "--choice=uniform(3)"]
    assert "embed: uniform(bits=3)" in said(capsys, argv)


@pytest.mark.slow
def test_with_a_calibrated_quantizer(capsys, tmp_path, text):
    target = str(tmp_path / "q")
    argv = ["quantize", TINY, target, "--format=uniform(3)", "--layers=layers/0/attn/q", "--quantizer=gptq()"]
    said(capsys, [*argv, f"--calibration={text}", "--length=32"])
    dense = load(TINY)
    rule = lb.Rule("layers/0/attn/q", lb.uniform(3), lb.gptq())
    ids = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    windows = [ids[None, at : at + 32] for at in np.linspace(0, len(ids) - 32, len(ids) // 32).astype(int)]
    stats = lb.calibrate(dense, windows, rules=[rule])
    wanted = lb.quantize(dense, [rule], stats=stats).layers[0].attn.q.kernel
    for name, field in load(target).layers[0].attn.q.kernel.array.fields.items():
        assert np.array_equal(field, wanted.array.fields[name])


def test_eval_and_compare(capsys, small, text):
    dense = json.loads(said(capsys, ["eval", TINY, f"--text={text}", "--length=64", "--json"]))
    ours = json.loads(said(capsys, ["eval", small, f"--text={text}", "--length=64", "--json"]))
    assert dense["tokens"] == len(TEXT) - 1 and dense["bits_per_byte"] < 2 < 8
    assert 0 < abs(ours["bits_per_byte"] - dense["bits_per_byte"]) < 0.2
    found = json.loads(said(capsys, ["compare", TINY, small, f"--text={text}", "--length=32", "--json"]))
    assert [row["layer"] for row in found["layers"]][-1] == "(output)"


@pytest.mark.slow
def test_what_eval_and_generate_print(capsys, small, text):
    assert "bits per byte" in said(capsys, ["eval", TINY, f"--text={text}", "--length=64"])
    argv = ["generate", small, "--prompt=def ", "--tokens=8"]
    shown = said(capsys, argv)
    assert len(shown) == 9 and shown == said(capsys, argv)
    assert shown != said(capsys, [*argv, "--temperature=5", "--seed=3"])


def test_prompts_may_come_from_a_pipe(capsys, monkeypatch, small):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("def "))
    shown = said(capsys, ["generate", small, "--prompt=-", "--tokens=8"])
    assert shown == said(capsys, ["generate", small, "--prompt=def ", "--tokens=8"])


@pytest.mark.slow
def test_tune_writes_a_task_that_generate_and_eval_take(capsys, tmp_path, text):
    base, task = str(tmp_path / "q"), str(tmp_path / "task.safetensors")
    said(capsys, ["quantize", TINY, base, "--format=bcq(2, group=128)", FEW])
    argv = ["tune", base, text, task, "--steps=3", "--length=32", "--batch=4", "--held_out=0.3", "--rate=0.01"]
    assert f"wrote {task}" in said(capsys, argv)
    assert (Path(f"{task}.run") / "log.jsonl").read_text().count("\n") >= 3
    plain, tuned = (
        json.loads(said(capsys, ["eval", base, f"--text={text}", "--length=32", "--json", *more]))["nats"]
        for more in ([], [f"--task={task}"])
    )
    assert tuned < plain
    assert len(said(capsys, ["generate", base, "--prompt=def ", "--tokens=4", f"--task={task}"])) == 5
    assert "exists" in said(capsys, argv, FAILED)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fmt"), [("lora", "uniform(3)"), ("codebook", "any_precision(3, 3)")])
def test_other_methods_of_tuning(capsys, tmp_path, text, method, fmt):
    base, task = str(tmp_path / "q"), str(tmp_path / "task.safetensors")
    said(capsys, ["quantize", TINY, base, f"--format={fmt}", FEW])
    argv = ["tune", base, text, task, "--steps=2", "--length=32", "--batch=4", "--held_out=0.3", f"--method={method}"]
    said(capsys, argv)
    assert "bits per byte" in said(capsys, ["eval", base, f"--text={text}", "--length=32", f"--task={task}"])


def test_convert(capsys, tmp_path, small):
    target = str(tmp_path / "again")
    said(capsys, ["convert", small, target])
    assert (Path(target) / "model.safetensors").read_bytes() == (Path(small) / "model.safetensors").read_bytes()


def test_quantize_goes_on_where_it_was_stopped(capsys, monkeypatch, tmp_path):
    module = sys.modules["lowbit.nn.resume"]
    solve, solved, target = module.quantize_array, [], str(tmp_path / "q")

    def counted(*args, **kwargs):
        if len(solved) == 2 and not Path(f"{target}.stopped").exists():
            Path(f"{target}.stopped").touch()
            raise KeyboardInterrupt
        solved.append(kwargs["name"])
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, "quantize_array", counted)
    argv = ["quantize", TINY, target, "--format=uniform(2)", FEW]
    assert f"{target}.unfinished" in said(capsys, argv, INTERRUPTED)
    assert not Path(target).exists() and len(solved) == 2
    said(capsys, argv)
    assert len(solved) == len(LAYERS) == len(set(solved))
    assert "exists" in said(capsys, argv, FAILED)
    elsewhere = said(capsys, ["quantize", TINY, str(tmp_path), *argv[3:], "--force"], FAILED)
    assert "no folder that lowbit saved" in elsewhere and not Path(f"{tmp_path}.unfinished").exists()
    said(capsys, [*argv, "--force"])


@pytest.mark.slow
def test_a_killed_quantize_ends_with_the_same_bytes(tmp_path):
    files = []
    for name, kills in (("whole", 0), ("killed", 2)):
        target = tmp_path / name
        argv = [sys.executable, "-m", "lowbit.cli", "quantize", TINY, str(target), "--format=bcq(2, group=128)"]
        for kill in range(1, kills + 1):
            with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
                while len(list(Path(f"{target}.unfinished").glob("*.safetensors"))) < 3 * kill:
                    assert running.poll() is None, "it came to its end before it was killed"
                    time.sleep(0.01)
                running.kill()
            assert not target.exists()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        files.append((target / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["quantise"], MISUSED, "no command"),
        (["quantize", TINY], MISUSED, "takes 2 arguments, not 1"),
        (["quantize", TINY, "out", "--bits=3", "--format=uniform(3)"], MISUSED, "give one of"),
        (["quantize", TINY, "out", "--bit=3"], MISUSED, "Unknown command line flag 'bit'"),
        (["quantize", TINY, "out", "--bits=much"], MISUSED, "--bits"),
        (["quantize", TINY, "out", "--format=uniform(99)"], FAILED, "1 to 8"),
        (["quantize", TINY, "out", "--format=__import__('os')"], FAILED, "is no format"),
        (["quantize", TINY, "out", "--bits=1", FEW], FAILED, "the smallest formats need"),
        (["quantize", TINY, "out", "--bits=3", "--by=loss"], MISUSED, "--calibration"),
        (["quantize", TINY, "out", "--bits=3", "--layers=head/*"], FAILED, "none of the layers"),
        (["quantize", "nowhere/at/all", "out", "--bits=3"], FAILED, "nowhere/at/all"),
        (["eval", TINY], MISUSED, "give --text"),
        (["eval", TINY, "--text=nowhere.txt"], FAILED, "nowhere.txt"),
        (["generate", TINY, "--prompt="], FAILED, "empty"),
        (["generate", TINY, "--prompt=a", "--top_p=2"], FAILED, "top_p"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, tmp_path, argv, code, message):
    monkeypatch.chdir(tmp_path)
    shown = said(capsys, argv, code)
    assert message in shown and shown.count("\n") == 1 and not Path("out").exists()


def test_texts_that_cannot_be_used(capsys, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    argv = ["quantize", TINY, str(tmp_path / "q"), "--format=uniform(3)", "--quantizer=gptq"]
    assert "has 3 tokens, and a window has 512" in said(capsys, [*argv, f"--calibration={short}"], FAILED)
    short.write_bytes(b"\xff\xfe")
    assert "no UTF-8" in said(capsys, ["eval", TINY, f"--text={short}"], FAILED)
    argv = ["quantize", TINY, str(tmp_path / "q"), "--format=uniform(3)", f"--calibration={text}"]
    assert "none of the quantizers takes statistics" in said(capsys, argv, MISUSED)


def test_a_tokenizer_of_another_model(capsys, tmp_path, text):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] = {token: 3 * i for token, i in data["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert "do not belong together" in said(capsys, ["eval", str(folder), f"--text={text}"], FAILED)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[", "no JSON"),
        ("{}", "no list of rules"),
        ('[{"path": "a"}]', "rule 0"),
        ('[{"path": "a", "format": "uniform(3)", "bits": 3}]', "'bits' is not known"),
        ('[{"path": "a", "format": "nothing", "options": {}}]', "not registered"),
        ('[{"path": "a", "format": "uniform(3)", "quantizer": "best()"}]', "is no quantizer"),
    ],
)
def test_files_of_rules_that_are_none(tmp_path, data, message):
    (tmp_path / "rules.json").write_text(data)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        spelling.read_rules(str(tmp_path / "rules.json"))


def test_rules_as_they_are_written():
    assert spelling.quantizer_of("gptq") == spelling.quantizer_of(repr(lb.gptq())) == lb.gptq()
    assert spelling.format_of(str(lb.bcq(3, group=64))) == lb.bcq(3, group=64)
