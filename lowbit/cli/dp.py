"""`lowbit tune --dp`: a model whose layers choose their widths (DP-LLM, Park et al. 2025), from a dense one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

import lowbit as lb
from lowbit.cli.choosing import mean_loss
from lowbit.cli.command import UsageError, expect_free
from lowbit.cli.spelling import format_of
from lowbit.models import Decoder, Sampling, generate, load, save, tokenizer
from lowbit.models.save import expect_replaceable
from lowbit.models.tokens import start_token
from lowbit.nn.kernel import kernels
from lowbit.nn.kinds import layers
from lowbit.nn.rules import Rule, assign, needed
from lowbit.nn.switch import effective_bits, switches
from lowbit.tune import Estimators, TextBatches, Toward, next_token_loss, text_batches
from lowbit.tune.nested import mean_over, nested
from lowbit.tune.thresholds import ALWAYS

OWN = ("target", "format", "budget", "layers", "dense", "projection_steps", "asynchronous")
"""Flags that only `--dp` has."""
RATE, DECAY = 1e-2, 1e-2
"""Of AdamW, as published."""
SAMPLES = 40
"""Windows at most that gradients and thresholds are measured with; published for thresholds."""
SEQUENCES, AT_ONCE = 128, 32
"""Of text that a model writes itself, in windows."""


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "dp", False, "Make a model whose layers choose their widths token by token (DP-LLM). TEXT may be left out, and "
        "the model then writes its own; TASK is a folder, MODEL-dp-TARGET if left out.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float("target", None, "With --dp, effective bits a weight.", flag_values=values)
    flags.DEFINE_string(
        "format", "any_precision(3, 6)", "With --dp, the nested format of a dense MODEL's layers.", flag_values=values
    )
    flags.DEFINE_float(
        "budget", None, "With --dp, index bits a weight that are stored; those of the format if not given.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("layers", "layers/**", "With --dp, pattern of the layers that choose.", flag_values=values)
    flags.DEFINE_string(
        "dense", None, "With --dp, the folder of the dense model that a quantized MODEL was made from.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "projection_steps", 1000, "With --dp, of gradient descent on each projection; published are 10000.",
        lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "asynchronous", False, "With --dp, layers that the residual stream feeds choose by it as it was one sublayer "
        "before.", flag_values=values,
    )  # fmt: skip


def run(given: flags.FlagValues, folder: str, text: str | None = None, target: str | None = None) -> None:
    """Raises ValueError for what cannot be done, before anything is trained."""
    if given.target is None:
        raise UsageError("--dp needs --target, effective bits a weight")
    out = target or f"{Path(folder).resolve().name}-dp-{given.target:g}"
    expect_free(out, given.force)
    expect_replaceable(out, given.force)
    kept = Path(given.run or f"{out}.run")
    model = load(folder)
    is_dense = not kernels(model)
    _check_target(given, folder, model)
    dense = model if is_dense else _dense(given, folder, model)
    try:
        data, held = _data(given, folder, dense, text).split(given.held_out)
        samples = [jnp.asarray(window[None, :-1]) for window in data.tokens[:SAMPLES]]
        _check_samples(samples)
        stats = _measured(given, dense, samples, kept)
        small = _quantized(given, dense, stats, kept) if is_dense else model
        made = _choosing(given, dense, small, stats, data, held, samples, kept)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is done is in {kept}: the same command goes on after it") from None
    save(made, out, source=folder, overwrite=given.force)
    _tell(made, held)
    print(f"wrote {out}: {lb.report(made).bytes:,} bytes; next: lowbit eval {out} --text FILE, lowbit generate {out}")


def _check_target(given: flags.FlagValues, folder: str, model: Decoder) -> None:
    """Raises ValueError for a target that the widths cannot have, and for layers that have none."""
    if kernels(model):
        if given["format"].present:
            raise UsageError(f"--format is of a dense MODEL, and {folder} is quantized: leave it out")
        if switches(model):
            raise ValueError(f"the layers of {folder} choose their widths already: give the folder it was made from")
        found = nested(model, given.layers)
        low, high = (mean_over(found, {p: k.type.format.widths[end] for p, k in found.items()}) for end in (0, -1))
    else:
        if given.dense is not None:
            raise UsageError(f"--dense is of a quantized MODEL, and {folder} is dense: leave it out")
        fmt = format_of(given.format)
        if not fmt.widths:
            raise ValueError(f"--format={fmt} is read at one width: give a nested one, such as 'any_precision(3, 6)'")
        _check_layers(given.layers, model)
        low, high = fmt.widths[0], fmt.widths[-1]
    most = high if given.budget is None else min(high, given.budget)
    if most < low:
        raise ValueError(f"--budget={most:g} is too small: the least widths take {low:g} bits a weight")
    if not low <= given.target <= most:
        raise ValueError(f"--target={given.target:g} is out of reach: here widths are from {low:g} to {most:g} bits")


def _check_layers(pattern: str, dense: Decoder) -> None:
    """Raises ValueError for a pattern of layers that cannot choose, before they are measured and quantized."""
    found = layers(dense)
    chosen = assign((Rule(pattern, None),), list(found), {})
    if wrong := [path for path in chosen if type(found[path]) is not nnx.Linear]:
        raise ValueError(
            f"--layers={pattern}: {wrong[0]!r} is {type(found[wrong[0]]).__name__}, and Linear layers alone choose: "
            "name some without it, such as --layers='layers/*/attn/*'"
        )


def _dense(given: flags.FlagValues, folder: str, model: Decoder) -> Decoder:
    if given.dense is None:
        raise ValueError(
            f"{folder} is quantized, and errors and thresholds are measured with the model that it was made from: "
            "name that folder with --dense"
        )
    dense: Decoder = load(given.dense)
    if kernels(dense):
        raise ValueError(f"--dense={given.dense} is quantized too: name the folder of the dense model")
    ours, theirs = asdict(model.config), asdict(dense.config)
    if differ := [name for name in ours if ours[name] != theirs[name]]:
        raise ValueError(
            f"--dense={given.dense} has {differ[0]} = {theirs[differ[0]]}, and {folder} has {ours[differ[0]]}: name "
            "the folder that it was made from"
        )
    return dense


def _data(given: flags.FlagValues, folder: str, dense: Decoder, text: str | None) -> TextBatches:
    length = given.length if given["length"].present else min(given.length, dense.config.context)
    batch = given.batch if given["batch"].present else 1
    spelled = tokenizer(folder)
    if text is not None:
        return text_batches(
            text,
            lambda part: spelled.encode(part, add_special_tokens=False).ids,
            vocab=dense.config.vocab,
            length=length,
            batch=batch,
        )
    first = start_token(folder)
    starts = spelled.encode("\n", add_special_tokens=False).ids[-1:] if first is None else [first]
    if not starts:
        raise ValueError(f"{folder} has no token that begins a text, nor one for the end of a line: give a TEXT")
    print(
        f"no TEXT: the model writes {SEQUENCES} sequences of {length} tokens itself, at temperature 1 with the seed 0"
    )
    return written(dense, starts[0], length, batch)


def written(model: Decoder, start: int, length: int, batch: int) -> TextBatches:
    """Windows of `length` + 1 tokens that a model writes from a first one, drawn at temperature 1."""
    windows: list[list[int]] = []
    for seed in range(0, SEQUENCES, AT_ONCE):
        prompts = [[start]] * AT_ONCE
        new = generate(model, prompts, length, sampling=Sampling(temperature=1.0), seed=seed)
        windows += [[start, *tokens] for tokens in new]
    tokens = np.array(windows, np.int32)
    return TextBatches(tokens, np.ones_like(tokens, bool), batch, 0)


def _check_samples(samples: list[jax.Array]) -> None:
    if (count := sum(window.size for window in samples)) < (least := ceil(1 / ALWAYS)):
        raise ValueError(
            f"the text gives {count} tokens to find thresholds with, and their quantiles may need {least}: give a "
            "longer one, or a larger --length"
        )


def _measured(given: flags.FlagValues, dense: Decoder, samples: list[jax.Array], kept: Path) -> Mapping[str, Any]:
    """The squared gradients of weights, for the errors of widths and for the codes."""
    return lb.calibrate(dense, samples, statistics=["gradient_square"], loss=mean_loss, resume=kept / "calibration")


def _quantized(given: flags.FlagValues, dense: Decoder, stats: Mapping[str, Any], kept: Path) -> Decoder:
    rule = Rule(given.layers, format_of(given.format))
    weighed = {path: of for path, of in stats.items() if rule.matches(path)}
    can_weigh = {*needed(rule)} <= {"gradient_square"}
    return lb.quantize(dense, [rule], stats=weighed if can_weigh else None, resume=kept / "quantized")


def _choosing(
    given: flags.FlagValues, dense: Decoder, small: Decoder, stats: Mapping[str, Any], data: TextBatches,
    held: TextBatches, samples: list[jax.Array], kept: Path,
) -> Decoder:  # fmt: skip
    """The three phases."""
    found = nested(small, given.layers)
    budget = given.budget or float(max(k.type.format.widths[-1] for k in found.values()))
    most = lb.tune.max_widths(small, dense, stats, bits=budget, layers=given.layers)
    counts = sorted(Counter(most.values()).items())
    print(f"phase 1: within {budget:g} bits, {', '.join(f'{n} layers of up to {b} bits' for b, n in counts)}")
    small = lb.tune.narrowed(small, most, layers=given.layers)
    start = lb.tune.blended(small, most, given.target, layers=given.layers)
    if jax.tree.leaves(nnx.state(start, lb.Threshold)):
        start = _trained(given, start, data, held, kept)
    print(f"phase 2: {float(lb.tune.mean_bits(start)):.3f} bits a weight on average, for a target of {given.target:g}")
    estimators = Estimators(steps=given.projection_steps)
    together = [jnp.concatenate(samples[i : i + 8]) for i in range(0, len(samples), 8)]
    values = lb.tune.thresholds(start, dense, together, estimators=estimators)
    projected = sum(name.endswith("/projection") for name in values.values)
    print(f"phase 3: {len(most)} layers, of which {projected} estimate by a projection and the rest by a line")
    return lb.tune.switched(small, values, asynchronous=given.asynchronous)


def _trained(given: flags.FlagValues, start: Decoder, data: TextBatches, held: TextBatches, kept: Path) -> Decoder:
    rate = given.rate if given["rate"].present else RATE
    trained = lb.tune.train(
        start,
        data,
        tx=optax.adamw(rate, weight_decay=DECAY),
        steps=given.steps,
        wrt=lb.Threshold,
        loss=Toward(given.target),
        accumulate=given.accumulate,
        remat="layers/*" if given.remat else (),
        eval_data=held,
        eval_every=given.eval_every,
        patience=given.patience,
        folder=kept,
    )
    return trained.model


@nnx.jit
def _scored(model: Decoder, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses and targets of one window, and its effective bits."""
    (total, count), bits = effective_bits(next_token_loss, model, batch)
    return total, count, bits.mean


def _tell(made: Decoder, held: TextBatches) -> None:
    windows = TextBatches(held.tokens, held.mask, 1, 0)
    sums = np.array([[float(value) for value in _scored(made, windows[i])] for i in range(len(windows))])
    loss, bits = sums[:, 0].sum() / sums[:, 1].sum(), np.average(sums[:, 2], weights=sums[:, 1])
    print(f"held-out text: {bits:.3f} effective bits, {loss:.4f} nats a token")
