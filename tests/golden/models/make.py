"""Makes the golden models with `transformers`: random checkpoints of every family and what they compute in float32.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python -m tests.golden.models.make [CASE ...]

A golden is a folder: config.json and model.safetensors as `save_pretrained` writes them, and expected.safetensors:
`tokens` and `mask` [3, T], whose sequences are whole, padded at the left and padded at the right, and `logits`
[3, T, vocab]. Positions count the tokens of a sequence, as in `generate`. An encoder has `types`
too, `hidden`, and `pooled` where it has a pooler. A case that shares the weights of another has no model.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.golden.models.cases import CASES, ENCODERS, SHARED, config

HERE = Path(__file__).parent
LENGTH = 10
PADDING = 3


def model(name: str, seed: int | None = None, **changes: Any) -> Any:
    """Random weights in which every term matters: norms far from 1, biases far from 0, logits of several units."""
    import torch
    import transformers

    stated = config(name) | changes
    made = transformers.AutoConfig.for_model(**stated)
    torch.manual_seed(sorted(CASES).index(SHARED.get(name, name)) if seed is None else seed)
    kind = "AutoModelForPreTraining" if stated["model_type"] in ENCODERS else "AutoModelForCausalLM"
    made._attn_implementation = made._experts_implementation = "eager"  # the only one with soft caps
    new = getattr(transformers, kind).from_config(made).eval()
    zero_based = stated["model_type"].startswith("gemma")
    with torch.no_grad():
        for key, value in new.named_parameters():
            noise = torch.randn_like(value)
            if value.ndim == 1 and "bias" not in key:
                value.copy_(0.3 * noise + (0.0 if zero_based else 1.0))
            elif value.ndim == 1:
                value.copy_(0.3 * noise)
            else:
                value.copy_(1.5 * noise / value.shape[-1] ** 0.5)
    return new


def inputs() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, :PADDING] = mask[2, -PADDING:] = False
    return {"tokens": torch.randint(3, 64, (3, LENGTH)) * mask, "mask": mask}


def expected(new: Any) -> dict[str, Any]:
    """What the model computes, each sequence in its own batch, as `generate` would call it."""
    import torch

    given = inputs()
    encoder = new.config.model_type in ENCODERS
    first = new.config.pad_token_id + 1 if new.config.model_type == "roberta" else 0  # of positions
    if encoder:
        given["types"] = torch.arange(LENGTH).expand(3, -1) // 4 % new.config.type_vocab_size
    rows: list[dict[str, Any]] = []
    for i in range(3):
        mask = given["mask"][i : i + 1]
        extra = {"token_type_ids": given["types"][i : i + 1]} if encoder else {"use_cache": False}
        out = new(
            given["tokens"][i : i + 1],
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0) + first,
            output_hidden_states=encoder,
            **extra,
        )
        if encoder:
            hidden = out.hidden_states[-1]
            pooler = new.base_model.pooler
            pooled = {} if pooler is None else {"pooled": pooler(hidden)}
            logits = out.logits if pooler is None else out.prediction_logits
            rows.append({"hidden": hidden, "logits": logits, **pooled})
        else:
            rows.append({"logits": out.logits})
    return given | {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def make(name: str) -> None:
    import torch
    from safetensors.torch import save_file

    folder = HERE / name
    new = model(name)
    new.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with torch.no_grad():
        results = expected(new)
    save_file({key: value.contiguous() for key, value in results.items()}, folder / "expected.safetensors")
    if name in SHARED:
        (folder / "model.safetensors").unlink()
    for file in folder.iterdir():
        file.chmod(0o644)
    print(f"{name:20} |logits| up to {results['logits'].abs().max():.2f}")


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
    (HERE / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
