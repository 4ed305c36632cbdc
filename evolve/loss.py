"""The three objectives of a night, each a weighted sum over answers or pairs, divided by a number the caller gives.

The invariant: a loss is `Σ w_i·l_i / total`, and `total` counts the whole optimiser batch, never one micro-batch, so
accumulating gradients over micro-batches changes nothing, and neither does a weight cancel in a batch of one. Weights
have mean 1 over all rows (`unit_mean`), so `total` is the plain count: of answer tokens for `weighted_sft_loss`, of
pairs or answers for the others. With all weights 1 they equal trl's `SFTTrainer`, and `DPOTrainer` with `sigmoid` and
`bco_pair`, on the same tensors.

Shapes: (A,) one value an answer, (P,) one a pair. Log-probabilities are sums over the answer's tokens, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def unit_mean(weights: Sequence[float]) -> list[float]:
    """`weights` scaled to mean 1 over the rows that are not 0, so that a row of weight 0 equals its absence."""
    positive = [w for w in weights if w > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    return [max(0.0, w) / mean for w in weights]


def answer_logps(token_logps: Tensor, owner: Tensor, answers: int) -> Tensor:
    """(T,) log-probabilities of tokens, each owned by one of `answers` → (A,) their sums."""
    return token_logps.new_zeros(answers).index_add(0, owner, token_logps)


def weighted_sft_loss(logps: Tensor, weights: Tensor, total: float | Tensor) -> Tensor:
    """`Σ w_i·NLL_i / total`: nats per token, as an answer's NLL is summed over its tokens and `total` counts them."""
    return -(weights * logps).sum() / total


def weighted_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    weights: Tensor,
    beta: float,
    total: float | Tensor,
) -> Tensor:
    """`Σ w_i·[−log σ(β(Δ_i,chosen − Δ_i,rejected))] / total` with Δ = log π − log π_ref (arXiv 2305.18290, eq. 7)."""
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -(weights * F.logsigmoid(beta * margin)).sum() / total


def weighted_bco_loss(
    policy: Tensor,
    reference: Tensor,
    liked: Tensor,
    weights: Tensor,
    beta: float,
    total: float | Tensor,
) -> Tensor:
    """`Σ w_i·[−log σ(±β·Δ_i)] / total`, plus for a liked answer: is it liked, told from its implicit reward.

    The binary classifier objective of arXiv 2404.04656, as trl's `bco_pair` has it: without the paper's shift of the
    boundary between liked and disliked.
    """
    sign = torch.where(liked, 1.0, -1.0)
    return -(weights * F.logsigmoid(sign * (beta * (policy - reference)))).sum() / total
