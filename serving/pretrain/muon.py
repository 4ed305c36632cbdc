"""Muon (K. Jordan and others, 2024): momentum made orthogonal, over whole stacks of matrices at once.

`torch.optim.Muon` takes 2-D parameters only and so leaves out the experts, which are 3-D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Named = list[tuple[str, Tensor]]

# What makes queries and keys learns more slowly: without a norm on them, faster steps make attention hard before it
# has learnt where to look, and copying from the context is then learnt late or never.
LOOKING = ("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")


def orthogonalise(block: Tensor, rounds: int = 5, kind: torch.dtype = torch.bfloat16) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of (..., m, n), by the method's quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = block.to(kind)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    turned: Tensor = (x.mT if tall else x).float()
    return turned


class Muon:
    def __init__(self, named: Named, momentum: float = 0.95, kind: torch.dtype = torch.bfloat16) -> None:
        self.named, self.momentum, self.kind = named, momentum, kind
        self.buffers = {name: torch.zeros_like(p) for name, p in named}

    @torch.no_grad()
    def step(self, lr: float, decay: float) -> None:
        """Nesterov momentum, orthogonal and of one size whatever the gradient's; `decay` is times the rate."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, p in self.named:
            assert p.grad is not None, name
            buffer = self.buffers[name].mul_(self.momentum).add_(p.grad)
            update = p.grad.add(buffer, alpha=self.momentum)
            halves = 2 if name.endswith("gate_up_proj") else 1  # gate and up are two matrices in one tensor
            rows, columns = p.shape[-2] // halves, p.shape[-1]
            by_shape.setdefault((rows, columns), []).append((p.view(-1, rows, columns), update.view(-1, rows, columns)))
        for (rows, columns), group in by_shape.items():
            turned = orthogonalise(torch.cat([update for _, update in group]), kind=self.kind)
            scale = lr * max(1.0, rows / columns) ** 0.5
            at = 0
            for p, _ in group:
                p.mul_(1 - lr * decay).sub_(turned[at : at + len(p)], alpha=scale)
                at += len(p)


def split_parameters(named: Sequence[tuple[str, Tensor]]) -> tuple[Named, Named, list[Tensor], list[Tensor]]:
    """Hidden matrices, and those that look, for Muon; embeddings with norms, and routers, for AdamW."""
    hidden: Named = []
    looking: Named = []
    rest: list[Tensor] = []
    routers: list[Tensor] = []
    for name, p in named:
        if name.endswith("mlp.gate.weight"):
            routers.append(p)
        elif p.ndim < 2 or "embed" in name or "lm_head" in name:
            rest.append(p)
        else:
            (looking if name.endswith(LOOKING) else hidden).append((name, p))
    return hidden, looking, rest, routers
