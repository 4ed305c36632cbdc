"""A trained checkpoint as a Hugging Face folder in the block-FP8 layout that DeepSeek-V3 is published in.

Linear weights are float8_e4m3fn with one float32 scale for each block of 128 by 128 (`weight = fp8 * scale`); experts
are 2-D tensors, one by one; embeddings, norms and routers stay in bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .model import seedling_config

BLOCK = 128
WEIGHTS = "model.safetensors"


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A (m, n) matrix as fp8 and its scales, (⌈m/128⌉, ⌈n/128⌉)."""
    rows, columns = math.ceil(weight.shape[0] / BLOCK), math.ceil(weight.shape[1] / BLOCK)
    padded = F.pad(weight.float(), (0, columns * BLOCK - weight.shape[1], 0, rows * BLOCK - weight.shape[0]))
    tiles = padded.view(rows, BLOCK, columns, BLOCK)
    scale = (tiles.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-12)
    packed = (tiles / scale[:, None, :, None]).view(rows * BLOCK, columns * BLOCK)
    return packed[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scale


def export(checkpoint: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    tensors = fp8_tensors(load_file(checkpoint / WEIGHTS))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt", "state": origin(checkpoint)})
    (out / WEIGHTS).chmod(0o644)
    _write_json(out / "config.json", fp8_config())
    config = seedling_config()
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id, "do_sample": False}
    _write_json(out / "generation_config.json", ends)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out)


def origin(folder: Path) -> str:
    """The state of the run, as JSON, that made a checkpoint or what was exported of it; empty if none is told."""
    with safe_open(folder / WEIGHTS, "pt") as weights:
        return str((weights.metadata() or {}).get("state", ""))


def fp8_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        for key, matrix in _per_expert(name, value):
            if matrix.ndim == 2 and not key.endswith(("embed_tokens.weight", "mlp.gate.weight")):
                tensors[key], tensors[key + "_scale_inv"] = quantise(matrix)
            else:
                tensors[key] = matrix if key.endswith("e_score_correction_bias") else matrix.bfloat16()
    return {name: value.contiguous() for name, value in tensors.items()}


def fp8_config() -> dict[str, Any]:
    shape = seedling_config()
    kept = ["lm_head", "model.embed_tokens"]
    kept += [f"model.layers.{i}.mlp.gate" for i in range(shape.first_k_dense_replace, shape.num_hidden_layers)]
    config: dict[str, Any] = shape.to_diff_dict()
    return config | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "dtype": "bfloat16",
        "topk_method": "noaux_tc",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        },
    }


def _per_expert(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    stem, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        for i, both in enumerate(value):
            gate, up = both.chunk(2)
            yield f"{stem}.{i}.gate_proj.weight", gate
            yield f"{stem}.{i}.up_proj.weight", up
    elif last == "down_proj":
        yield from ((f"{stem}.{i}.down_proj.weight", down) for i, down in enumerate(value))
    else:
        yield name, value


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
