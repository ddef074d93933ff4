"""`lb.models.load`: a checkpoint's folder as a model, its layers quantized as they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from lowbit.models.hub import local
from lowbit.models.save import is_saved, reopened
from lowbit.models.source import Source, abstract, described
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kinds import layers
from lowbit.nn.progress import bar
from lowbit.nn.quantize import quantize, quantized
from lowbit.nn.rules import Rules


def load(
    path: str | os.PathLike[str],
    rules: Rules | None = None,
    *,
    dtype: Any = None,
    stats: Mapping[str, LayerStats] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    revision: str | None = None,
) -> Any:
    """The model in a checkpoint's folder, its layers quantized as they are read.

    The result is bit for bit `lb.quantize(load(path), rules)`, but no more than the quantized model and two dense
    layers in float32 are ever in memory: files are mapped, and each layer is quantized as soon as it is read. That
    holds for rounding to nearest; solvers that search take scratch memory of their own beside. Returns a
    `Decoder`, or an `Encoder` for families of encoders such as BERT.

    Args:
      path: a folder with config.json and safetensors files, as the library transformers writes it, as GPTQ, AWQ,
        compressed-tensors, AQLM and any-precision-llm do (see `lb.read_checkpoint`), or as `lb.models.save` does. Or,
        where there is no such folder, a name on the Hugging Face hub, "organization/model", which is downloaded.
      rules: as in `lb.quantize`, for the layers that are stored dense; None leaves them so.
      dtype: what weights are cast to, and layers compute in; that of the stored embedding if None. Norms are float32.
        Where the folder is lowbit's own, arrays are as they were saved, and it is what layers compute in.
      stats, resume: as in `lb.quantize`. With the same `resume` a run that was killed goes on where it was.
      progress: show a progress bar; by default when standard error is a terminal.
      revision: of a model of the hub: a branch, a tag or a commit.

    Raises CheckpointError for a folder without config.json or of an unknown family, for tensors that are missing, left
    over, of another shape than config.json says or of integers, for fused tensors that are quantized, and as
    `lb.read_checkpoint` does for files, before any layer is quantized; FileNotFoundError and OSError for a path that is
    no folder and cannot be downloaded; and what `lb.quantize` raises.

    >>> import lowbit as lb
    >>> model = lb.models.load("examples/tinylm/model", lb.uniform(4, group=128))
    >>> type(model.layers[0].mlp.up.kernel.array).__name__, model.config.width
    ('QuantArray', 256)
    """
    folder = local(path, revision)
    j, kind, config = described(folder)
    more: dict[str, Any] = {"stats": stats, "progress": progress, "resume": resume}
    if is_saved(j):
        model = reopened(folder, j, kind, config, dtype)
        return model if rules is None else quantize(model, rules, **more)
    source = Source(folder, kind, config)
    dtype = jax.dtypes.canonicalize_dtype(source.dtype if dtype is None else dtype)
    model = abstract(kind, config, dtype, dtype)
    source.check(model)
    model = source.with_quantized(model)
    source.fill_rest(model)
    if rules is not None:
        return quantized(model, rules, stats or {}, fill=source.fill, progress=progress, resume=resume)
    with bar(progress, len(found := layers(model)), "loading") as advance:
        for at, layer in found.items():
            source.fill(at, layer)
            advance()
    return model
