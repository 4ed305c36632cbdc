"""Decoding, one token a step for many answers at once.

The invariant: an answer does not depend on its neighbours in the batch. Padding is masked, each row draws from its own
generator and has its own adapter and sampling, and rows join and leave between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ServingError
from .adapters import BASE, Deltas, Lora, blended
from .engine import Sampling
from .graphs import Lent, is_plain

Layers = list[tuple[Tensor, Tensor]]  # keys and values a layer: (rows, heads, width, size)
LIKELY = 256  # tokens; a nucleus that is no larger is found without sorting the vocabulary
HALF = "\N{REPLACEMENT CHARACTER}"  # of a character, the rest of which may come
# what the adapters add, inputs → (rows, vocabulary) logits of the last position, cache
Forward = Callable[..., tuple[Tensor, Any]]


class Answer:
    """An answer as it grows: its tokens, its text up to a stop string, and what of it may be shown already."""

    def __init__(self, tokenizer: Any, sampling: Sampling, row: int = 0, ends: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self.sampling, self._ends = tokenizer, sampling, ends
        self._shown = 0
        self._bytewise = _decodes_bytes(tokenizer)
        self._settled, self._read = "", 0  # the text of so many first tokens, which need not be decoded again
        self.ids: list[int] = []
        self.text = ""
        self.done = False
        self.ended = False  # by itself, not for want of tokens
        self.error: ServingError | None = None
        # rows of one call draw differently, and each draws the same whatever it is batched with
        self.generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + row)

    def add(self, token: int) -> None:
        if token in self._ends:
            self.done = self.ended = True
            return
        self.ids.append(token)
        self.text = self._settled + self._tokenizer.decode(self.ids[self._read :], skip_special_tokens=True)
        if self._bytewise and not self.text.endswith(HALF):
            self._settled, self._read = self.text, len(self.ids)
        stops = [at for stop in self.sampling.stop if (at := self.text.find(stop)) >= 0]
        if stops:
            self.text, self.ended = self.text[: min(stops)], True
        self.done = self.ended or len(self.ids) >= self.sampling.max_tokens
        if self.done and not self.ended:
            self.text = self.text.rstrip(HALF)  # its rest does not come any more

    def fail(self, error: ServingError) -> None:
        self.error, self.done = error, True

    def fresh(self) -> str:
        """The new part of the text that no later token can change."""
        settled = len(self.text) if self.done else len(self.text) - self._unsettled()
        new = self.text[self._shown : settled]
        self._shown = max(self._shown, settled)
        return new

    def _unsettled(self) -> int:
        """The length of a tail that may be the beginning of a stop string, with half a character after it."""
        whole = self.text.rstrip(HALF)
        starts = [n for stop in self.sampling.stop for n in range(1, len(stop)) if whole.endswith(stop[:n])]
        return len(self.text) - len(whole) + max([0, *starts])


def _decodes_bytes(tokenizer: Any) -> bool:
    """Whether a text is no more than the bytes of its tokens: then nothing after a whole character hangs on those
    before it. Others strip a first space, look at runs of byte tokens, or tidy up the whole.
    """
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.decoder, ByteLevel) and not tokenizer.clean_up_tokenization_spaces


@dataclass(eq=False)
class Row:
    """An answer with what the model reads for it and the adapter it is read with."""

    prompt: Sequence[int]
    answer: Answer
    lora: Lora = BASE

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer.ids]

    @property
    def size(self) -> int:
        """Tokens at most."""
        return len(self.prompt) + self.answer.sampling.max_tokens


class Batch:
    """Rows that go through the model together, their caches side by side and padded on the left.

    All of it follows from the rows, so a batch whose forward pass failed can be made anew.
    """

    def __init__(self, rows: Sequence[Row], device: str, past: Any = None) -> None:
        """`past` is a cache of the first tokens of a single row."""
        self.rows, self._device, self._cache = list(rows), device, past
        read = past.get_seq_length() if past is not None else 0
        ids, self._mask = left_padded([row.ids for row in rows])
        self._ids, self._positions = ids[:, read:], (self._mask.cumsum(1) - 1).clamp(min=0)[:, read:]
        self._deltas = blended([row.lora for row in rows])

    @property
    def padded(self) -> int:
        """Tokens, with padding, when every answer has its full length."""
        left = max(row.answer.sampling.max_tokens - len(row.answer.ids) for row in self.rows)
        return len(self.rows) * (self._mask.shape[1] + left)

    def step(self, forward: Forward) -> None:
        """One more token for every answer. A row that cannot go on fails alone."""
        inputs = {"input_ids": self._ids, "attention_mask": self._mask, "position_ids": self._positions}
        on_device = {name: value.to(self._device) for name, value in inputs.items()}
        logits, self._cache = forward(self._deltas, **on_device, past_key_values=self._cache)
        best, at = (found.tolist() for found in logits.max(-1))  # on the device: of most rows no more is asked
        heated = [
            i for i, row in enumerate(self.rows) if row.answer.sampling.temperature > 0 and math.isfinite(best[i])
        ]
        if heated:
            for i, token in zip(heated, drawn(logits[heated], [self.rows[i].answer for i in heated]), strict=True):
                at[i] = token
        tokens = [_grow(row.answer, *of_row) for row, *of_row in zip(self.rows, best, at, strict=True)]
        self._ids = torch.tensor(tokens)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], 1)
        self._positions = self._positions[:, -1:] + 1

    def keep(self, kept: Sequence[int]) -> None:
        """Only these rows go on."""
        if len(kept) == len(self.rows) or not kept:
            self.rows = [self.rows[i] for i in kept]
            return
        self.rows = [self.rows[i] for i in kept]
        self._ids, self._mask, self._positions = (t[kept] for t in (self._ids, self._mask, self._positions))
        self._deltas = blended([row.lora for row in self.rows])
        if isinstance(self._cache, Lent):
            self._cache = self._cache.copied(kept)
            self._trim()
        elif self._cache is not None:
            self._cache.reorder_cache(torch.tensor(kept, device=self._device))  # states, too, know this one
            if self.divisible:
                self._trim()

    def _trim(self) -> None:
        """Without the columns that were padding for all but the rows that left."""
        unused = int(self._mask.any(0).long().argmax())
        self._mask = self._mask[:, unused:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]

    @property
    def divisible(self) -> bool:
        """Whether the cache is plain keys and values by position; windows and recurrent states cannot be shifted."""
        return is_plain(self._cache)

    def join(self, other: Batch) -> None:
        """Take in the rows of another divisible batch; both have made a step. If it fails, nothing has changed."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        deltas = blended([row.lora for row in [*self.rows, *other.rows]])
        cache = _side_by_side(self._cache, other._cache, width - 1)
        mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, other._mask)])
        ids = torch.cat([self._ids, other._ids])
        positions = torch.cat([self._positions, other._positions])
        self._cache, self._mask, self._ids, self._positions, self._deltas = cache, mask, ids, positions, deltas
        self.rows += other.rows

    def read_so_far(self, row: int) -> tuple[list[int], Layers]:
        """The ids that the model has read of a row of a divisible batch, and a copy of their keys and values."""
        cached = self._mask[row, :-1]
        start, count = int(len(cached) - cached.sum()), int(cached.sum())
        layers = [(x.keys[row : row + 1, :, start:], x.values[row : row + 1, :, start:]) for x in self._cache.layers]
        return self.rows[row].ids[:count], [(keys.clone(), values.clone()) for keys, values in layers]


def _side_by_side(one: Any, other: Any, width: int) -> Any:
    from transformers import DynamicCache

    layers: Layers = []
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        keys = torch.cat([_widened(t, width) for t in (mine.keys, theirs.keys)])
        layers.append((keys, torch.cat([_widened(t, width) for t in (mine.values, theirs.values)])))
    return DynamicCache(layers)


def _widened(cache: Tensor, width: int) -> Tensor:
    return pad(cache, (0, 0, width - cache.shape[-2], 0))


def _grow(answer: Answer, best: float, token: int) -> int:
    try:
        if not math.isfinite(best):
            raise ServingError("the model's figures are not finite; the adapter or the base is damaged")
        answer.add(token)
    except (RuntimeError, ValueError, ServingError) as error:
        answer.fail(ServingError(f"the answer broke off after {len(answer.ids)} tokens: {error}"))
        return 0
    return token


def decode(forward: Callable[..., tuple[Tensor, Any]], rows: Sequence[Row], device: str) -> Iterator[None]:
    """Grow the answers of `rows` by one token each before every yield, until all are done."""

    def bare(_: Deltas, **inputs: Any) -> tuple[Tensor, Any]:
        return forward(**inputs)

    batch = Batch(rows, device)
    while batch.rows:
        batch.step(bare)
        for row in batch.rows:
            if row.answer.error:
                raise row.answer.error
        batch.keep([i for i, row in enumerate(batch.rows) if not row.answer.done])
        yield


def drawn(logits: Tensor, answers: Sequence[Answer]) -> list[int]:
    """The next token of each answer, out of the nucleus of its `top_p`, from finite (rows, vocabulary) logits.

    Each takes one number of its own generator, which stands for the same token whatever the other rows are.
    """
    heat = torch.tensor([[answer.sampling.temperature] for answer in answers]).clamp(min=torch.finfo(torch.float).tiny)
    logits = logits.float()
    chances = ((logits - logits.amax(-1, keepdim=True)) / heat.to(logits.device)).softmax(-1)
    points = torch.cat([torch.rand(1, dtype=torch.float64, generator=answer.generator) for answer in answers])
    whole = [i for i, answer in enumerate(answers) if answer.sampling.top_p >= 1]
    tokens = dict(zip(whole, _at(chances[whole], points[whole]), strict=True))
    narrow = [i for i in range(len(answers)) if i not in tokens]
    for i, values, ids in zip(narrow, *_likeliest(chances[narrow]), strict=True):
        shares, inside = _nucleus(values, ids, chances[i], answers[i].sampling.top_p)
        (at,) = _at(shares[None], points[i : i + 1])
        tokens[i] = int(inside[at])
    return [tokens[i] for i in range(len(answers))]


def _at(chances: Tensor, points: Tensor) -> list[int]:
    """Where, on the way along each row of (rows, n) chances, the share in `points` of their sum is passed."""
    sums = chances.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(sums, points.to(sums.device)[:, None] * sums[:, -1:], right=True)
    return found[:, 0].clamp(max=chances.shape[1] - 1).tolist()


def _likeliest(chances: Tensor) -> tuple[Tensor, Tensor]:
    """Chances and ids of each row's first tokens, on the CPU; of equals the lower id first, as a stable sort has it."""
    values, ids = (found.cpu() for found in chances.topk(min(LIKELY, chances.shape[1])))
    ids, order = ids.sort(-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _nucleus(values: Tensor, ids: Tensor, chances: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest tokens that have `top_p` of the chances, from the likeliest, or from all where these are too few."""
    before = values.cumsum(-1, dtype=torch.float64) - values
    count = max(1, int((before < top_p).sum()))
    if len(values) < len(chances) and values[count - 1] == values[-1]:  # or its equals may be others
        return _nucleus(*chances.cpu().sort(dim=-1, descending=True, stable=True), chances, top_p)
    return values[:count], ids[:count]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(rows, width) ids, and a mask that is 0 on the padding."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros((2, len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
