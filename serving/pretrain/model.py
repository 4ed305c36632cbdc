"""The seedling's shape, and what makes it train fast on a CPU: DeepSeek-V3's layers, with kernels of our own.

Matrix products run in bfloat16 over float32 weights, or in float32; attention, norms and the loss stay in float32. The
invariant: the kernels here compute what transformers' own do, so the checkpoint means the same everywhere.
"""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ExpertsInterface

from .tokens import SPECIAL, VOCABULARY

KERNELS = "nightschool_pretrain"


def seedling_config() -> Any:
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        kv_lora_rank=128,
        q_lora_rank=None,
        # keys and values of one width: the fused attention of the CPU wants that
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_nextn_predict_layers=0,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
    )


def build_model(seed: int) -> Any:
    torch.manual_seed(seed)
    AttentionInterface.register(KERNELS, causal_attention)
    ExpertsInterface.register(KERNELS, padded_experts)
    model = DeepseekV3ForCausalLM(seedling_config())
    model.set_attn_implementation(KERNELS)
    model.set_experts_implementation(KERNELS)
    return model.train()


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float = 1.0,
    **_: object,
) -> tuple[Tensor, None]:
    """On a CPU in float32 also under autocast: the fused kernel is faster so, and more exact."""
    kind = torch.float32 if query.device.type == "cpu" else value.dtype
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query.to(kind),
            key.to(kind),
            value.to(kind),
            attn_mask=None if mask is None else mask.to(kind),
            is_causal=mask is None,
            scale=scaling,
        )
    return out.transpose(1, 2).contiguous(), None


def apart(talks: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of conversations, numbered (rows, length): the mask that is added to their attention, and positions.

    (rows, 1, length, length) with 0 where a token may look, itself and before in the same conversation; (rows, length)
    counted anew from the beginning of each.
    """
    length = talks.shape[1]
    seen = (talks[:, :, None] == talks[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    return mask[:, None], seen.sum(-1) - 1


def padded_experts(module: Any, hidden: Tensor, picked: Tensor, weight: Tensor) -> Tensor:
    """One expert after another over its own tokens, their number padded to a multiple of 128 by rows of weight 0.

    The products' kernels are compiled for each new shape; without padding nearly every call would have a new one.
    """
    out = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        token, rank = torch.where(picked == expert)
        pad = -len(token) % 128
        scale = F.pad(weight[token, rank], (0, pad))[:, None]
        token = F.pad(token, (0, pad))
        gate, up = F.linear(hidden[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
        said = F.linear(F.silu(gate) * up, module.down_proj[expert])
        out = out.index_add(0, token, (said * scale).to(out.dtype))
    return out


class TiedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ embedding.T`, each row by its share; its gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embedding: Tensor, target: Tensor, share: Tensor, kind: torch.dtype
    ) -> Tensor:
        narrow, words = hidden.to(kind), embedding.to(kind)
        grad_hidden, grad_embedding = torch.empty_like(hidden), torch.zeros_like(embedding)
        loss = hidden.new_zeros(())
        for at in range(0, len(hidden), 1024):
            part = slice(at, at + 1024)
            logits = (narrow[part] @ words.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            aim = target[part, None]
            loss += ((norm - logits.gather(1, aim)) * share[part, None]).sum()
            grad = logits.sub_(norm).exp_()
            grad.scatter_(1, aim, grad.gather(1, aim) - 1)
            grad = grad.mul_(share[part, None]).to(kind)
            grad_hidden[part] = (grad @ words).float()
            grad_embedding += (grad.T @ narrow[part]).float()
        ctx.save_for_backward(grad_hidden, grad_embedding)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_embedding = ctx.saved_tensors
        return grad_hidden * grads[0], grad_embedding * grads[0], None, None, None


class Balancer:
    """Counts which experts the routers pick, and moves each expert's bias against its load: no auxiliary loss."""

    def __init__(self, model: torch.nn.Module, step_size: float = 0.0) -> None:
        self.step_size = step_size
        self.routers: list[Any] = [m for m in model.modules() if type(m).__name__ == "DeepseekV3TopkRouter"]
        self.loads = [torch.zeros(m.num_experts, device=m.weight.device) for m in self.routers]
        self._counting = Lock()
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(partial(self._count, load))

    def _count(self, load: Tensor, _module: object, _inputs: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        with self._counting:
            load += torch.bincount(out[2].flatten(), minlength=len(load))

    def worst(self) -> float:
        """The load of the busiest expert of any layer, over the mean of its layer."""
        return max(float(load.max() / load.mean().clamp(min=1e-9)) for load in self.loads)

    def step(self, rate: float = 1.0) -> float:
        """Moves the biases by `rate` times the step size, forgets the counts and returns the worst load."""
        worst = self.worst()
        for router, load in zip(self.routers, self.loads, strict=True):
            router.e_score_correction_bias += rate * self.step_size * torch.sign(load.mean() - load)
            router.e_score_correction_bias -= router.e_score_correction_bias.mean()
            load.zero_()
        return worst
