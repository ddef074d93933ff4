"""`lowbit tune`."""

from __future__ import annotations

import optax
from absl import flags

from lowbit.cli import dp
from lowbit.cli.command import Command, UsageError, expect_free
from lowbit.cli.tasks import METHODS, prepared
from lowbit.models import load, tokenizer
from lowbit.tune import extract, text_batches, train


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum(
        "method", "alpha", METHODS, "What trains: the scales of the first planes (AlphaTuning), codebooks, or low-rank "
        "adapters (QLoRA).", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("rank", 8, "Of adapters.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "steps", 200, "In all. For --dp published are 5000, each of a sequence of 512 tokens.", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "rate", 1e-3, "Of Adam, at its highest: it falls to 0 along a cosine. With --dp of AdamW, 0.01 if not "
        "given, and it stays.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("batch", 8, "Windows at a time; with --dp 1 if not given.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("accumulate", 1, "Batches in a step.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "length", 512, "Tokens in a window; with --dp at most the model's context if not given.", lower_bound=1,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float("held_out", 0.05, "Share of the text that is for evaluation only.", flag_values=values)
    flags.DEFINE_integer("eval_every", 50, "Steps between evaluations.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("patience", None, "Stop after so many evaluations that gain nothing.", flag_values=values)
    flags.DEFINE_bool(
        "remat", False, "Less memory and a third more time: blocks are computed again.", flag_values=values
    )
    flags.DEFINE_string("run", None, "Folder of log and checkpoints; TASK.run if not given.", flag_values=values)
    flags.DEFINE_bool("force", False, "Replace the file or folder if there is one.", flag_values=values)
    dp.define(values)


def _run(given: flags.FlagValues, folder: str, *rest: str) -> None:
    odd = [f"--{name}" for name in (("method", "rank") if given.dp else dp.OWN) if given[name].present]
    if odd:
        raise UsageError(f"{' and '.join(odd)}: {'not with --dp' if given.dp else 'only with --dp'}")
    if given.dp:
        dp.run(given, folder, *rest)
    elif len(rest) == 2:
        _tuned(given, folder, *rest)
    else:
        raise UsageError(f"takes 3 arguments without --dp, not {1 + len(rest)}: lowbit tune MODEL TEXT TASK [--flags]")


def _tuned(given: flags.FlagValues, folder: str, text: str, task: str) -> None:
    expect_free(task, given.force)
    model, spelled = load(folder), tokenizer(folder)
    data = text_batches(
        text,
        lambda part: spelled.encode(part, add_special_tokens=False).ids,
        vocab=model.config.vocab,
        length=given.length,
        batch=given.batch,
    )
    seen, held = data.split(given.held_out)
    start, wrt = prepared(model, given.method, given.rank)
    trained = train(
        start,
        seen,
        tx=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(given.rate, given.steps))
        ),
        steps=given.steps,
        wrt=wrt,
        accumulate=given.accumulate,
        remat="layers/*" if given.remat else (),
        eval_data=held,
        eval_every=given.eval_every,
        patience=given.patience,
        folder=given.run or f"{task}.run",
    )
    found = extract(trained.model, wrt)
    found.save(task)
    losses = [record["eval_loss"] for record in trained.records if "eval_loss" in record]
    print(f"held-out loss {losses[0]:.4f} -> {min(losses):.4f} nats a token in {trained.records[-1]['step']} steps")
    print(f"wrote {task}: {found.bytes:,} bytes; give it as --task to lowbit generate and lowbit eval")


COMMAND = Command(
    "tune",
    ("MODEL", "[TEXT]", "[TASK]"),
    "Adapt a quantized model to a text, or to a .jsonl file of {text} or {prompt, completion}, and write what trained, "
    "a small file beside the model. With --dp make a model whose layers choose their widths token by token, and write "
    "its folder. The same command goes on where it was stopped.",
    (
        "lowbit quantize examples/tinylm/model build/b --format 'bcq(3, group=128)'",
        "lowbit tune build/b README.md build/readme.safetensors --steps 20 --length 128",
        "lowbit eval build/b --text README.md --task build/readme.safetensors",
        "lowbit tune examples/tinylm/model --dp --target 3.5",
    ),
    _define,
    _run,
)
