"""A model that multiplies in FP8: routed experts by torch's scaled grouped product, attention and dense MLPs alike.

Weights and activations are e4m3 with one scale a row (a token; an output feature); torch's grouped kernel for that
is Hopper's alone. A checkpoint with one scale a block of 128 by 128 is rounded a second time by that; the trainer's
numbers and these differ by it, and the parity check at every load measures by how much. The experts go in by the hook
of transformers, no model file is copied. The invariant: a CPU computes what the card does, from the same rounded
numbers, by dequantising them; it is the reference, and slow.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ServingError

EXPERTS = "nightschool_fp8"
FUSED_EXPERTS = "nightschool_fp8_fused"
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
LEAST_SCALE = 1e-12  # a row of zeros stays one
HOPPER = 9  # major compute capability
MULTIPLE = 16  # of both sides of a weight, for the kernels
PROJECTIONS = ("gate_up_proj", "down_proj")


def supported(device: str) -> bool:
    """Whether torch has the kernels for this device: later generations trap in the grouped one or refuse it."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


# -- numbers ---


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) as e4m3 and a float32 scale for each row of K."""
    wide = values.float()
    scale = (wide.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(FP8), scale


def dequantised(values: Tensor, scale: Tensor) -> Tensor:
    return values.float() * scale[..., None]


def product(inputs: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(M, K) by the rounded (N, K) weight, to (M, N) in the type of the inputs."""
    values, own = rounded(inputs)
    if inputs.device.type == "cpu":
        return (dequantised(values, own) @ dequantised(weight, scale).T).to(inputs.dtype)
    made: Tensor = torch._scaled_mm(
        values, weight.T, own[:, None], scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return made.to(inputs.dtype)


def grouped_product(inputs: Tensor, weight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """(M, K), rows up to `ends[e]` by the rounded weight e of (E, N, K), to (M, N) in the type of the inputs."""
    values, own = rounded(inputs)
    if inputs.device.type == "cpu":
        return _grouped_reference(dequantised(values, own), weight, scale, ends).to(inputs.dtype)
    made: Tensor = torch._scaled_grouped_mm(
        values, weight.transpose(-2, -1), own, scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return made.to(inputs.dtype)


def _grouped_reference(inputs: Tensor, weight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    made = inputs.new_zeros(len(inputs), weight.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            made[start:end] = inputs[start:end] @ dequantised(weight[expert], scale[expert]).T
        start = end
    return made


# -- modules ---


class RoundedLinear(nn.Module):
    """A linear layer whose weight is e4m3 with a scale for each output feature."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, device: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight.detach().to(device))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(device))

    def forward(self, inputs: Tensor) -> Tensor:
        made = product(inputs.reshape(-1, self.in_features), self.weight, self.scale)
        made = made.reshape(*inputs.shape[:-1], self.out_features)
        return made if self.bias is None else made + self.bias


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for a module of routed experts; nothing of it waits for the device."""
    tokens, chosen = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort()
    every = torch.arange(self.gate_up_proj.shape[0], device=expert.device)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)
    made = grouped_product(hidden_states[order // chosen], self.gate_up_proj, self.gate_up_proj_scale, ends)
    made = grouped_product(self._apply_gate(made), self.down_proj, self.down_proj_scale, ends)
    made = made * top_k_weights.reshape(-1)[order][:, None]
    made = torch.empty_like(made).index_copy(0, order, made)
    return made.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


def register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


def fuse(model: Any, backend: str = "inductor") -> None:
    """Compile what is many small kernels, each function once for all layers: norms, rounding, the experts' sorting.

    Adapters are added outside of it. A model stays as it is where it has nothing of the kind.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    compiled: dict[type[nn.Module], Any] = {}
    for module in model.modules():
        kind = type(module)
        if kind is RoundedLinear or kind.__name__.endswith("RMSNorm"):
            compiled.setdefault(kind, torch.compile(kind.forward, backend=backend))
            module.forward = partial(compiled[kind], module)
    if any(map(_has_rounded_experts, model.modules())):
        ALL_EXPERTS_FUNCTIONS.register(FUSED_EXPERTS, torch.compile(experts_forward, backend=backend))
        model.set_experts_implementation(FUSED_EXPERTS)


def _has_rounded_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "gate_up_proj_scale", None), Tensor)


# -- conversion ---


def convert(model: Any, linear: str, device: str) -> Any:
    """The model on `device`, its experts and the linear layers whose names match the pattern `linear` in FP8.

    Module by module, so that the device never holds more of the full weights than one of them.
    """
    register()
    modules = dict(model.named_modules())
    experts = {name: module for name, module in modules.items() if _is_experts(module)}
    _check(model, experts)
    for module in experts.values():
        for name in PROJECTIONS:
            _round_parameter(module, name, device)
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and re.fullmatch(linear, name) and _fits(module.weight):
            owner, _, leaf = name.rpartition(".")
            setattr(modules[owner], leaf, RoundedLinear(module, device))
    if experts:
        model.set_experts_implementation(EXPERTS)
    return model.to(device)


def _is_experts(module: nn.Module) -> bool:
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def _check(model: Any, experts: dict[str, Any]) -> None:
    for name, module in experts.items():
        other = [flag for flag in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(module, flag, False)]
        if other or not all(_fits(getattr(module, part)) for part in PROJECTIONS):
            shapes = " and ".join(str(tuple(getattr(module, part).shape)) for part in PROJECTIONS)
            why = ", ".join(other) or f"{shapes} are not multiples of {MULTIPLE}"
            raise ServingError(
                f"{name} of a {model.config.model_type} cannot be served in FP8 ({why}); set serving.weights to full"
            )


def _fits(weight: Tensor) -> bool:
    return weight.shape[-1] % MULTIPLE == 0 and weight.shape[-2] % MULTIPLE == 0


def _round_parameter(module: Any, name: str, device: str) -> None:
    weight, scale = rounded(getattr(module, name).detach().to(device))
    delattr(module, name)
    module.register_buffer(name, weight)
    module.register_buffer(f"{name}_scale", scale)
