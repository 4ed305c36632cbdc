"""LoRA adapters beside the base: read, checked, and any mixture of them applied in one batch.

The invariant: the base's modules and weights are never touched. While a forward pass runs, each linear layer's output
gains x·A·B of the row's own adapter (LoRA, arXiv 2106.09685, the arithmetic of PEFT's plain layer), so rows with
different adapters share a batch, a row of the base gains exactly nothing, and an adapter is gone when nobody holds it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ServingError
from .engine import CONFIG, MANIFEST, WEIGHTS, of_another_base

LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# settings of PEFT under which an adapter is more, or other, than x·A·B at one scale
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # what they begin with is taken out of the base's weights
OTHER_KINDS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "alora_invocation_tokens"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "arrow_config", "kasa_config", "monteclora_config"),
)


@dataclass(frozen=True, eq=False)
class Lora:
    """By the name of a linear layer: A (in, rank) and B (rank, out), the scale already in B. Equal only to itself."""

    weights: Mapping[str, tuple[Tensor, Tensor]]


BASE = Lora({})
SHORT = 4  # positions a row


# -- reading; `ServingError` before anything serves ---


def read(adapter_id: str, path: Path, base_id: str, modules: Mapping[str, nn.Module], device: str) -> Lora:
    """The adapter in `path`, or the reason why it cannot serve on this base. On a card in bfloat16, as it computes."""
    for file in (CONFIG, WEIGHTS):
        if not os.path.exists(path / file):  # unlike Path.exists it takes what one may not enter for missing
            raise ServingError(f"adapter {adapter_id}: {path} has no {file}; run `nightschool audit verify`")
    made_for = _json(adapter_id, path / MANIFEST).get("base_id") if (path / MANIFEST).exists() else base_id
    if made_for != base_id:
        raise ServingError(of_another_base(adapter_id, made_for, base_id))
    config = _json(adapter_id, path / CONFIG)
    tensors = _tensors(adapter_id, path)
    rank, scale = _rank_and_scale(adapter_id, config)
    _check_shapes(adapter_id, tensors, rank, modules)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        tensors = {key: value.to(device, dtype) for key, value in tensors.items()}
        names = sorted({key.removesuffix(f".lora_{part}.weight") for key in tensors for part in "AB"} - set(tensors))
        return Lora({_bare(name): _pair(adapter_id, name, tensors, scale) for name in names})
    except RuntimeError as error:  # as where the card is full
        raise ServingError(f"adapter {adapter_id} cannot be put on {device}: {error}") from error


def _json(adapter_id: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ServingError(f"adapter {adapter_id}: {path} is damaged or not ours: {error}") from error
    if not isinstance(data, dict):
        raise ServingError(f"adapter {adapter_id}: {path} is damaged: it holds no object")
    return data


def _tensors(adapter_id: str, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ServingError(f"adapter {adapter_id}: its weights in {path} are damaged or not ours: {error}") from error
    if not tensors:
        raise ServingError(f"adapter {adapter_id}: {path} holds no weights, so it would change nothing")
    return tensors


def _rank_and_scale(adapter_id: str, config: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ServingError(f"adapter {adapter_id}: r is {rank!r} and lora_alpha {alpha!r} in its {CONFIG}; damaged?")
    other = [name for name in OTHER_KINDS if config.get(name)]
    if str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        other.append(f"init_lora_weights = {config['init_lora_weights']}")
    if other or config.get("peft_type", "LORA") != "LORA":
        kind = ", ".join(other) or config["peft_type"]
        raise ServingError(f"adapter {adapter_id} is more than plain LoRA ({kind}); train it without")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_shapes(adapter_id: str, tensors: Mapping[str, Tensor], rank: int, modules: Mapping[str, nn.Module]) -> None:
    for key, tensor in tensors.items():
        found = LORA_WEIGHT.fullmatch(key)
        module: Any = modules.get(found[1]) if found else None
        if found is None or not hasattr(module, "in_features"):
            raise ServingError(f"adapter {adapter_id}: the base has no module for its weight {key}; wrong base?")
        wanted = (rank, module.in_features) if found[2] == "A" else (module.out_features, rank)
        if tuple(tensor.shape) != wanted:
            raise ServingError(f"adapter {adapter_id}: {key} is {tuple(tensor.shape)}, the base needs {wanted}")


def _pair(adapter_id: str, name: str, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
    down, up = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
    if down is None or up is None:
        raise ServingError(f"adapter {adapter_id}: its weights are damaged: {name} has only one of lora_A and lora_B")
    return down.T.contiguous(), up.T.contiguous() * scale


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


# -- applying ---


@dataclass(frozen=True)
class Delta:
    """What a linear layer's output gains in a batch of mixed adapters.

    For a position or two a row, one product with all adapters' A and B side by side costs least; for more, each
    adapter's own rows alone.
    """

    down: Tensor  # (in, ranks)
    up: Tensor  # (ranks, out)
    own: Tensor  # (rows, 1, ranks), 1 in the columns of the row's adapter
    parts: Sequence[tuple[Tensor, Tensor, Tensor]]  # A, B and the rows of each adapter; may be empty

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # some layers see (rows · length, in) or more dimensions; a row's positions are together in any case
        inputs = args[0].reshape(len(self.own), -1, args[0].shape[-1]).to(self.down.dtype)
        if inputs.shape[1] <= SHORT or not self.parts:
            gain = ((inputs @ self.down) * self.own) @ self.up
            return output + gain.reshape(output.shape).to(output.dtype)
        result = output.reshape(len(self.own), inputs.shape[1], -1).clone()
        for down, up, rows in self.parts:
            result.index_add_(0, rows, ((inputs[rows] @ down) @ up).to(output.dtype))
        return result.reshape(output.shape)


@dataclass(frozen=True)
class Same:
    """What a linear layer's output gains where all rows have one adapter."""

    down: Tensor
    up: Tensor

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.is_cuda and output.dtype == self.down.dtype:  # fewer kernels; a short step is made of little else
            inputs = args[0].reshape(-1, args[0].shape[-1])
            return torch.addmm(output.reshape(-1, output.shape[-1]), inputs @ self.down, self.up).reshape(output.shape)
        return output + ((args[0].to(self.down.dtype) @ self.down) @ self.up).to(output.dtype)


Deltas = Mapping[str, Delta | Same]


def blended(rows: Sequence[Lora]) -> Deltas:
    """By layer, what a batch gains whose rows have these adapters."""
    distinct = list(dict.fromkeys(rows))
    if len(distinct) == 1:
        return {name: Same(*parts) for name, parts in distinct[0].weights.items()}
    names = sorted({name for lora in distinct for name in lora.weights})
    return {name: _delta(name, rows, [lora for lora in distinct if name in lora.weights]) for name in names}


def _delta(name: str, rows: Sequence[Lora], loras: Sequence[Lora]) -> Delta:
    pairs = [lora.weights[name] for lora in loras]
    down, up = torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs])
    has = torch.tensor([[row is lora for lora in loras] for row in rows])
    own = has.to(down.dtype).repeat_interleave(torch.tensor([len(b) for _, b in pairs]), 1)[:, None].to(down.device)
    where = [column.nonzero()[:, 0].to(down.device) for column in has.T]
    return Delta(down, up, own, [(a, b, at) for (a, b), at in zip(pairs, where, strict=True)])


@contextmanager
def applied(modules: Mapping[str, nn.Module], deltas: Deltas) -> Iterator[None]:
    handles = [modules[name].register_forward_hook(delta) for name, delta in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
