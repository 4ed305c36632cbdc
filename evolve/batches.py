"""Passages as tensors, and the one forward pass of training: log-probabilities of answers.

The invariant: an answer's log-probability does not depend on what else stands in its passage or batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lessons import Lesson, Passage, chains
from .loss import answer_logps

Batch = dict[str, Tensor]


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
    """Which answers are imitated, which are thumbs and which are pairs; `totals` counts tokens imitated and rows."""
    place = {key: i for i, key in enumerate(answers)}
    kinds = [lessons[lesson].kind for lesson, _ in answers]
    imitated = torch.tensor(
        [kind != "disliked" and which == 0 for kind, (_, which) in zip(kinds, answers, strict=True)]
    )
    thumbs = [i for i, kind in enumerate(kinds) if kind in ("liked", "disliked")]
    chosen = [i for i, kind in enumerate(kinds) if kind == "pair" and answers[i][1] == 0]
    return {
        "weight": torch.tensor([lessons[lesson].weight for lesson, _ in answers]),
        "imitated": imitated,
        "thumb": torch.tensor(thumbs, dtype=torch.long),
        "liked": torch.tensor([kinds[i] == "liked" for i in thumbs], dtype=torch.bool),
        "chosen": torch.tensor(chosen, dtype=torch.long),
        "rejected": torch.tensor([place[answers[i][0], 1] for i in chosen], dtype=torch.long),
        "answer": torch.tensor(answers),
        "totals": torch.stack([(lengths * imitated).sum(), torch.tensor(len(thumbs) + len(chosen))]).float(),
    }


def logps(model: torch.nn.Module, batch: Batch) -> Tensor:
    """(A,) log-probability of each answer. Only the predicting positions meet the vocabulary."""
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_: torch.nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor]:
        return (hidden[0].flatten(0, 1)[batch["predict"]],)

    hook = head.register_forward_pre_hook(select)
    try:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    tokens = -F.cross_entropy(logits.float(), batch["target"], reduction="none")
    return answer_logps(tokens, batch["owner"], len(batch["weight"]))
