"""Fine-tuning of what is continuous in a model of any size, which goes on where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from os import PathLike
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lowbit.nn.checkpoint import variables
from lowbit.nn.kernel import Scale, expect_arrays, expect_module
from lowbit.nn.progress import bar
from lowbit.tune.alpha import AlphaTuning
from lowbit.tune.digest import digest, of_tree
from lowbit.tune.kept import Kept, Progress
from lowbit.tune.step import How, Loss, added, computing, evaluated, expect_floats, like, parts, updated, zeros
from lowbit.tune.text import next_token_loss

M = TypeVar("M", bound=nnx.Module)
Record = dict[str, Any]


class Batches(Protocol):
    """Batches by number, pytrees of arrays: a list, a `TextBatches`, a repeated `grain.MapDataset`."""

    def __getitem__(self, number: int, /) -> Any: ...


class Finite(Batches, Protocol):
    """Batches of which there are so many."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Trained(Generic[M]):
    """What `train` returns.

    Attributes:
      model: with what did best in evaluations, or without any with what trained last, in the dtypes of before.
      records: the log: for each step its number `step`, the mean `loss` and the `seconds` since the run began or went
        on, and after evaluations `eval_loss`.
    """

    model: M
    records: tuple[Record, ...]


@dataclass(frozen=True)
class _Plan:
    """When what is done."""

    steps: int
    accumulate: int
    eval_every: int
    patience: int | None
    save_every: int
    keep: int

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "eval_every", "patience", "save_every", "keep"):
            value = getattr(self, name)
            if not (type(value) is int and value > 0) and (name, value) != ("patience", None):
                raise ValueError(f"{name} must be an int, 1 or more, not {value!r}")


def train(
    model: M | AlphaTuning[M],
    data: Batches,
    *,
    tx: optax.GradientTransformation,
    steps: int,
    wrt: Any = Scale,
    loss: Loss = next_token_loss,
    accumulate: int = 1,
    remat: str | Sequence[str] = (),
    compute_dtype: Any = None,
    eval_data: Finite | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    folder: str | PathLike[str] | None = None,
    save_every: int = 100,
    keep: int = 2,
    log: Callable[[Record], None] | None = None,
    progress: bool | None = None,
) -> Trained[M]:
    """Train what `wrt` selects of a model, on batches of text or of anything else.

    The scales of `lb.tune.alpha_tuning`, the codebooks (`wrt=lb.Codebook`) or scales of any quantized model, or the
    adapters of `lb.nn.lora` (`wrt=nnx.LoRAParam`). What trains is held and updated in float32, and the model computes
    with that rounded to the dtypes it is stored in.

    Args:
      model: left as it is. Of an AlphaTuning the gradients are divided by the group size first.
      data: `data[i]` is batch i, counted from 0, of which a step takes `accumulate`: `lb.tune.text_batches`, or a list.
      tx: of optax, and with it whatever is done to gradients: `optax.chain(optax.clip_by_global_norm(1.0), adamw)`.
      steps: in all, those of an earlier run in `folder` included.
      wrt: a filter for what trains, as `nnx.Optimizer` takes it.
      loss: `loss(model, batch)` gives the sum of the losses of a batch, and their number or weight. It is compiled.
      accumulate: batches in one step. Their sums are added before they are divided, so the step is that of one large
        batch, whatever share of its weight each part has.
      remat: patterns over the paths of blocks, "layers/*": of what a block computes only what it returns is held for
        the gradients, and the rest computed again: the same gradients with less memory and a third more time. With jax
        0.10 it saves nothing on a CPU.
      compute_dtype: what layers compute in, such as bfloat16; what they say themselves if None.
      eval_data: batches to evaluate on, all of them each time, at the start, every `eval_every` steps and at the end,
        as after `model.eval()`.
      patience: stop after so many evaluations without a smaller loss.
      folder: of this run: a line of `log.jsonl` for each step, and in `checkpoints`, every `save_every` steps and at
        the end, what trains, the optimizer's state and random counts; never codes. The latest `keep` stay. A run that
        was killed, started again with the same arguments, goes on from the latest, and ends with the same bits. What
        `tx`, `loss` and the model compute cannot be told: after changing them, give another folder.
      log: called with each record; `lb.tune.tensorboard(folder)`, for one.
      progress: show a progress bar; by default when standard error is a terminal.

    Raises ValueError when nothing trains or what trains are no floats, for patterns without blocks, an abstract model,
    too little data, and the folder of another run, with what differs; FloatingPointError for a loss or an update that
    is NaN or inf, with the step: the checkpoint before it stays. TypeError for what is no module. OSError when the
    folder cannot be written.

    >>> from flax import nnx
    >>> import lowbit as lb, optax
    >>> model = nnx.Sequential(nnx.Embed(256, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 256, rngs=nnx.Rngs(1)))
    >>> tuning = lb.tune.alpha_tuning(lb.quantize(model, {"layers/1": lb.bcq(2)}))
    >>> text = ["to be or not to be, that is the question"]
    >>> data = lb.tune.text_batches(text, str.encode, vocab=256, length=8, batch=4)
    >>> trained = lb.tune.train(tuning, data, tx=optax.adam(1e-2), steps=5)
    >>> trained.records[-1]["loss"] < trained.records[0]["loss"]
    True
    """
    plan = _Plan(steps, accumulate, eval_every, patience, save_every, keep)
    if patience is not None and eval_data is None:
        raise ValueError(f"patience={patience} counts evaluations: give eval_data")
    prepared, tx = _prepared(model, wrt, tx)
    blocks = [remat] if isinstance(remat, str) else list(remat)
    run = _Run(prepared, wrt, loss, tx, plan, computing(prepared, compute_dtype, blocks), data, eval_data)
    if folder is not None:
        run.keep(folder, {"compute_dtype": str(compute_dtype), "remat": blocks})
    run.log = log or run.log
    with bar(progress, max(0, steps - run.at.step), "training") as advance:
        while run.at.step < steps and not run.is_over:
            run.step()
            advance()
    return Trained(run.trained(), tuple(run.records))


class _Run:
    """A model on its way through the steps."""

    def __init__(
        self, model: Any, wrt: Any, loss: Loss, tx: Any, plan: _Plan, computing: Any, data: Batches, held: Finite | None
    ) -> None:
        self.model, self.tx, self.plan, self.data, self.held = model, tx, plan, data, held
        self.graph, self.stored, changing, self.rest = parts(model, wrt)
        masters = _masters(self.stored, wrt)
        self.how = How(loss, nnx.graphdef(computing), wrt)
        computing.eval()
        self.how_held = replace(self.how, graph=nnx.graphdef(computing))
        self.at = Progress(0, masters, tx.init(masters), changing, None if held is None else masters)
        self.records: list[Record] = []
        self.kept: Kept | None = None
        self.log: Callable[[Record], None] = lambda record: None
        self.began = time.monotonic()

    def keep(self, folder: str | PathLike[str], told: Mapping[str, Any]) -> None:
        """Begins in a folder, or goes on from what is in it."""
        shapes = sorted((name, str(a.dtype), a.shape) for name, a in self.at.values.items())
        of = {
            "model": digest({name: jnp.asarray(v.get_value()) for name, v in variables(nnx.state(self.model)).items()}),
            "first batch": of_tree(self._batch(0)),
            "first evaluation batch": None if self.held is None else of_tree(self.held[0]),
            "accumulate": self.plan.accumulate,
            **told,
            "what trains": digest({}, repr(shapes)),
        }
        self.kept = Kept(folder, of, self.at, self.plan.keep)
        self.at, self.records = self.kept.at, self.kept.records
        if self.at.step > self.plan.steps:
            raise ValueError(
                f"{folder} is at step {self.at.step}, and steps={self.plan.steps}: give more steps or another folder"
            )

    @property
    def is_over(self) -> bool:
        return self.plan.patience is not None and self.at.since >= self.plan.patience

    def step(self) -> None:
        """One update, and what is due after it."""
        if self.held is not None and self.at.least is None:
            self._note(self._evaluated({"step": 0}))
        at, each = self.at, self.plan.accumulate
        sums, changing = zeros(at.masters), at.changing
        for i in range(at.step * each, (at.step + 1) * each):
            sums, changing = added(self.how, at.masters, self.stored, changing, self.rest, sums, self._batch(i))
        masters, moments, loss, norm = updated(self.tx, at.masters, at.moments, sums)
        step = at.step + 1
        advice = (
            f"lower the rate, clip with optax.clip_by_global_norm, or look at the data from batch {at.step * each} on"
        )
        self._expect_finite(step, float(loss), "loss", advice)
        self._expect_finite(step, float(norm), "norm of the update", advice)
        self.at = replace(at, step=step, masters=masters, moments=moments, changing=changing)
        record = {"step": step, "loss": float(loss), "seconds": round(time.monotonic() - self.began, 3)}
        is_last = step == self.plan.steps
        if self.held is not None and (is_last or step % self.plan.eval_every == 0):
            record = self._evaluated(record)
        self._note(record)
        if self.kept is not None and (is_last or self.is_over or step % self.plan.save_every == 0):
            self.kept.save(self.at)

    def trained(self) -> Any:
        masters = self.at.masters if self.at.best is None else self.at.best
        return nnx.merge(self.graph, like(masters, self.stored), self.at.changing, self.rest, copy=True)

    def _batch(self, number: int) -> Any:
        try:
            return self.data[number]
        except IndexError as err:
            raise ValueError(
                f"step {number // self.plan.accumulate + 1} needs batch {number}, counted from 0, which data does not "
                f"have: {self.plan.steps} steps take {self.plan.steps * self.plan.accumulate}"
            ) from err

    def _evaluated(self, record: Record) -> Record:
        """The record with the mean loss over all evaluation batches; the best of them is taken note of."""
        assert self.held is not None
        at, total, count = self.at, 0.0, 0.0
        for i in range(len(self.held)):
            sums = evaluated(self.how_held, at.masters, self.stored, at.changing, self.rest, self.held[i])
            total, count = total + float(sums[0]), count + float(sums[1])
        if count == 0:
            raise ValueError(f"the {len(self.held)} evaluation batches have no targets: give others")
        mean = total / count
        self._expect_finite(at.step, mean, "evaluation loss", "look at eval_data, or lower the rate")
        if at.least is None or mean < at.least:
            self.at = replace(at, best=at.masters, least=mean, since=0)
        else:
            self.at = replace(at, since=at.since + 1)
        return record | {"eval_loss": mean}

    def _expect_finite(self, step: int, value: float, what: str, advice: str) -> None:
        if not isfinite(value):
            kept = "" if self.kept is None else f"; {self.kept.folder} has the checkpoint of step {self.kept.latest}"
            raise FloatingPointError(f"step {step}: the {what} is {value}: {advice}{kept}")

    def _note(self, record: Record) -> None:
        if self.kept is None:
            self.records.append(record)
        else:
            self.kept.add(record)
        self.log(record)


def _prepared(model: Any, wrt: Any, tx: optax.GradientTransformation) -> tuple[Any, optax.GradientTransformation]:
    """The model itself, and how its gradients become updates."""
    if isinstance(model, AlphaTuning):
        if wrt is not Scale:
            raise ValueError(f"wrt={wrt!r}: an AlphaTuning trains lb.Scale; give its .model to train something else")
        model, tx = model.model, optax.chain(model.scaling, tx)
    expect_module(model, "train")
    expect_arrays(model, "train")
    return model, tx


def _masters(stored: Any, wrt: Any) -> Any:
    leaves = jax.tree.leaves(stored)
    if not leaves:
        raise ValueError(f"the model has nothing of {wrt!r}: there is nothing to train")
    expect_floats(leaves, wrt)
    return jax.tree.map(lambda a: a.astype(jnp.float32), stored)
