"""Decoding, one token a step for many prompts at once.

The invariant: an answer does not depend on its neighbours in the batch. Padding is masked, each row draws from its own
generator, and a row leaves the batch when its answer has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .engine import Sampling

Forward = Callable[..., tuple[Tensor, Any]]  # inputs → (rows, vocabulary) logits of the last position, cache


class Answer:
    """An answer as it grows: its tokens, its text up to a stop string, and what of it may be shown already."""

    def __init__(self, tokenizer: Any, sampling: Sampling, row: int = 0) -> None:
        self._tokenizer, self._stop = tokenizer, sampling.stop
        self._ids: list[int] = []
        self._shown = 0
        self.text = ""
        self.done = False
        # rows of one call draw differently, and each draws the same whatever it is batched with
        self.generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + row)

    def add(self, token: int) -> None:
        self._ids.append(token)
        self.text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        ends = [at for stop in self._stop if (at := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.done = self.text[: min(ends)], True

    def fresh(self) -> str:
        """The new part of the text that no later token can change."""
        settled = len(self.text) if self.done else len(self.text) - self._unsettled()
        new = self.text[self._shown : settled]
        self._shown = max(self._shown, settled)
        return new

    def _unsettled(self) -> int:
        """The length of a tail that is half a character, or that may be the beginning of a stop string."""
        broken = len(self.text) - len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        starts = [n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return max([broken, *starts])


def decode(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    sampling: Sampling,
    ends: frozenset[int],
    device: str,
) -> Iterator[None]:
    """Grow `answers` by one token each before every yield, until all are done."""
    ids, mask = left_padded(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    growing, cache = list(answers), None
    for _ in range(sampling.max_tokens):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, cache = forward(**{k: v.to(device) for k, v in inputs.items()}, past_key_values=cache)
        tokens = pick(logits.float().cpu(), growing, sampling)
        for answer, token in zip(growing, tokens, strict=True):
            if token in ends:
                answer.done = True
            else:
                answer.add(token)
        kept = [i for i, answer in enumerate(growing) if not answer.done]
        yield
        if not kept:
            return
        if len(kept) < len(growing):
            cache.batch_select_indices(torch.tensor(kept, device=device))
            growing, mask, positions = [growing[i] for i in kept], mask[kept], positions[kept]
        ids = torch.tensor([[tokens[i]] for i in kept])
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    for answer in growing:
        answer.done = True


def pick(logits: Tensor, answers: Sequence[Answer], sampling: Sampling) -> list[int]:
    """The next token of each row of (rows, vocabulary) logits: the likeliest, or drawn from the nucleus of `top_p`."""
    if sampling.temperature <= 0:
        return list(map(int, logits.argmax(-1)))
    chances, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    outside = chances.cumsum(-1) - chances >= sampling.top_p
    outside[:, 0] = False
    chances = chances.masked_fill(outside, 0.0)
    drawn = [torch.multinomial(row, 1, generator=a.generator) for row, a in zip(chances, answers, strict=True)]
    return [int(order[i, at]) for i, at in enumerate(drawn)]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(rows, width) ids, and a mask that is 0 on the padding."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros((2, len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
