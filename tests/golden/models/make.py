"""Makes the golden models with `transformers`: random checkpoints of every family and what they compute in float32.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/models/make.py [CASE ...]

A golden is a folder: config.json and model.safetensors as `save_pretrained` writes them, and expected.safetensors:
`tokens` and `mask` [3, T], whose sequences are whole, padded at the left and padded at the right, and `logits`
[3, T, vocab]. Positions count the tokens of a sequence, as in `generate`. An encoder has `types`, and in place of its
logits alone `hidden`, `pooled` and `logits`. A case that shares the weights of another has no model.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import CASES, SHARED, config
from safetensors.torch import save_file

HERE = Path(__file__).parent
LENGTH = 10
PADDING = 3


def model(name: str) -> Any:
    """Random weights in which every term matters: norms far from 1, biases far from 0, logits of several units."""
    stated = config(name)
    made = transformers.AutoConfig.for_model(**stated)
    torch.manual_seed(sorted(CASES).index(SHARED.get(name, name)))
    encoder = stated["model_type"] == "bert"
    create = transformers.BertForPreTraining if encoder else transformers.AutoModelForCausalLM.from_config
    made._attn_implementation = made._experts_implementation = "eager"  # the only one with soft caps
    new = create(made).eval()
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


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, :PADDING] = mask[2, -PADDING:] = False
    return {"tokens": torch.randint(3, 64, (3, LENGTH)) * mask, "mask": mask}


def expected(new: Any) -> dict[str, torch.Tensor]:
    """What the model computes, each sequence in its own batch, as `generate` would call it."""
    given = inputs()
    encoder = new.config.model_type == "bert"
    if encoder:
        given["types"] = torch.arange(LENGTH).expand(3, -1) // 4 % 2
    rows: list[dict[str, torch.Tensor]] = []
    for i in range(3):
        mask = given["mask"][i : i + 1]
        extra = {"token_type_ids": given["types"][i : i + 1]} if encoder else {"use_cache": False}
        out = new(
            given["tokens"][i : i + 1],
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=encoder,
            **extra,
        )
        if encoder:
            hidden = out.hidden_states[-1]
            rows.append({"hidden": hidden, "pooled": new.bert.pooler(hidden), "logits": out.prediction_logits})
        else:
            rows.append({"logits": out.logits})
    return given | {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def make(name: str) -> None:
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


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
