"""Passages as tensors, and the one forward pass of training: log-probabilities of answers.

The invariant: an answer's log-probability does not depend on what else stands in its passage or batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .lessons import Lesson, Passage, chains
from .loss import answer_logps

if TYPE_CHECKING:
    from peft import PeftModel

Batch = dict[str, Tensor]
INPUTS = ("input_ids", "position_ids", "attention_mask")


def collate(passages: Sequence[Passage], lessons: Sequence[Lesson], pad: int, tree: bool) -> Batch:
    """Passages as tensors: S sequences of L tokens, T predicted tokens of A answers, P pairs.

    `predict` (T,) indexes the flattened (S·L) position that predicts `target` (T,); `owner` (T,) is the answer.
    """
    rows = [row for p in passages for row in ([p] if tree or not p.branches else chains(p, lessons))]
    width = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    predict: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    answers: list[tuple[int, int]] = []
    for s, row in enumerate(rows):
        size = len(row.tokens)
        ids[s, :size], positions[s, :size] = torch.tensor(row.tokens), torch.tensor(row.depths)
        for placed in row.placed:
            predict += [s * width + row.parents[node] for node in placed.nodes]
            target += [row.tokens[node] for node in placed.nodes]
            owner += [len(answers)] * len(placed.nodes)
            answers.append((placed.lesson, placed.answer))
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": _attention(rows, width)}
    batch |= {"predict": torch.tensor(predict), "target": torch.tensor(target), "owner": torch.tensor(owner)}
    return batch | _roles(answers, lessons, torch.bincount(batch["owner"], minlength=len(answers)))


def _attention(rows: Sequence[Passage], width: int) -> Tensor:
    """(S, L) of what is not padding where all rows are chains; else (S, 1, L, L), each token sees its ancestors."""
    if not any(row.branches for row in rows):
        lengths = torch.tensor([len(row.tokens) for row in rows])
        return (torch.arange(width) < lengths[:, None]).long()
    mask = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself, so that no row is empty
    for s, row in enumerate(rows):
        seen = mask[s].numpy()
        for node, parent in enumerate(row.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
    return mask[:, None]


def _roles(answers: list[tuple[int, int]], lessons: Sequence[Lesson], lengths: Tensor) -> Batch:
    """Which answers are imitated, replayed, thumbs or pairs; `totals`: tokens imitated, rows, tokens replayed."""
    place = {key: i for i, key in enumerate(answers)}
    kinds = [lessons[lesson].kind for lesson, _ in answers]
    replayed = torch.tensor([kind == "replay" for kind in kinds])
    imitated = torch.tensor([kind == "imitate" for kind in kinds])
    thumbs = [i for i, kind in enumerate(kinds) if kind in ("liked", "disliked")]
    chosen = [i for i, kind in enumerate(kinds) if kind == "pair" and answers[i][1] == 0]
    rows = torch.tensor(len(thumbs) + len(chosen))
    return {
        "weight": torch.tensor([lessons[lesson].weight for lesson, _ in answers]),
        "imitated": imitated,
        "replayed": replayed,
        "thumb": torch.tensor(thumbs, dtype=torch.long),
        "liked": torch.tensor([kinds[i] == "liked" for i in thumbs], dtype=torch.bool),
        "chosen": torch.tensor(chosen, dtype=torch.long),
        "rejected": torch.tensor([place[answers[i][0], 1] for i in chosen], dtype=torch.long),
        "answer": torch.tensor(answers),
        "totals": torch.stack([(lengths * imitated).sum(), rows, (lengths * replayed).sum()]).float(),
    }


def logps(model: torch.nn.Module, batch: Batch) -> Tensor:
    """(A,) log-probability of each answer."""
    logits = _predictions(model, batch)
    tokens = -F.cross_entropy(logits, batch["target"], reduction="none")
    return answer_logps(tokens, batch["owner"], len(batch["weight"]))


def anchored_logps(model: PeftModel, batch: Batch) -> Tensor:
    """As `logps`, but a replayed answer's is minus KL(base ‖ model), in nats, summed over its tokens.

    Its gradient is the mean of what tokens drawn from the base would give, without their noise; and it is 0 where the
    base is not left, so that a loss shows how far it was.
    """
    logits = _predictions(model, batch)
    tokens = -F.cross_entropy(logits, batch["target"], reduction="none")
    replayed = batch["replayed"][batch["owner"]].nonzero()[:, 0]
    if len(replayed):
        base = _base_distribution(model, batch, replayed)
        kept = torch.special.entr(base).sum(-1) - F.cross_entropy(logits[replayed], base, reduction="none")
        tokens = tokens.index_copy(0, replayed, kept)
    return answer_logps(tokens, batch["owner"], len(batch["weight"]))


@torch.no_grad()
def _base_distribution(model: PeftModel, batch: Batch, chosen: Tensor) -> Tensor:
    """(T', V) probabilities by the base, without the adapter, for the T' `chosen` of the T predicted tokens."""
    width = batch["input_ids"].shape[1]
    places = batch["predict"][chosen]
    rows, row = torch.unique(places // width, return_inverse=True)
    part = {key: batch[key][rows] for key in INPUTS} | {"predict": row * width + places % width}
    with model.disable_adapter():
        return _predictions(model, part).softmax(-1)


def _predictions(model: torch.nn.Module, batch: Batch) -> Tensor:
    """(T, V) logits in fp32. Only the predicting positions meet the vocabulary."""
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_: torch.nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor]:
        return (hidden[0].flatten(0, 1)[batch["predict"]],)

    hook = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(**{key: batch[key] for key in INPUTS}, use_cache=False).logits
    finally:
        hook.remove()
    return logits.float()
