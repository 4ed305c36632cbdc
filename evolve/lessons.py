"""Rows of a snapshot as token ids, cut to length, laid out in passages, and planned to fit the night's budget.

A `Lesson` is one thing to learn: an answer to imitate, a thumb, or a pair. Lessons whose prompts begin alike share a
`Passage`: a tree of tokens in which every token sees its ancestors and nothing else, so that what is common is
computed once and each answer's log-probability is what it would be alone. The invariant: nothing here reads a clock
or draws unseeded, so the same rows, settings and seed give the same batches; and no row is lost in silence, since
what does not fit is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from math import ceil
from random import Random
from typing import Any, Literal

from ..content import Message
from ..serving.chat import Ids, answer_ids, on_day, prompt_ids
from ..serving.parity import DAY

Kind = Literal["imitate", "replay", "liked", "disliked", "pair"]
PREFERRED: frozenset[Kind] = frozenset({"liked", "disliked", "pair"})  # what is measured against the reference

PROMPT_SHARE = 0.25  # of max_tokens stays for the prompt; an answer that leaves less does not fit
SHARED_SHARE = 0.3  # of a lesson must already stand in a passage for it to join
REPLAY_VISITS = 2.0  # of a row of the base's own text at most, however often the lessons are seen
WINDOW = 16  # batches are cut from so many times their size of passages, sorted by length


@dataclass(frozen=True)
class Lesson:
    prompt: Ids
    answers: tuple[Ids, ...]  # one; chosen and rejected for a pair
    kind: Kind
    weight: float

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


# -- tokens ---


def encode(
    tokenizer: Any, prompt: Sequence[Message], answers: Sequence[str], max_tokens: int
) -> tuple[Ids, tuple[Ids, ...]] | None:
    """Ids of the prompt, cut from the left, and of each answer with its end of turn; None if an answer does not fit.

    A template that tells the date tells that of the parity record, so that the day of a night changes no adapter.
    """
    with on_day(DAY):
        tails = tuple(answer_ids(tokenizer, prompt, answer) for answer in answers)
        room = max_tokens - max(map(len, tails))
        if room < PROMPT_SHARE * max_tokens or not all(answer.strip() for answer in answers):
            return None
        return prompt_ids(tokenizer, prompt, room), tails


def length_rule(tokenizer: Any, max_tokens: int) -> Callable[[str], bool]:
    """Whether `encode` takes an answer, told from the answer alone."""

    def length(answer: str) -> int:
        return len(answer_ids(tokenizer, [{"role": "user", "content": "?"}], answer))

    room, ends = max_tokens - PROMPT_SHARE * max_tokens, length("?")
    # no token of ASCII is shorter than a letter, and at most one space is put in for each; counting tokens takes longer
    return lambda answer: (answer.isascii() and ends + 2 * len(answer) <= room) or length(answer) <= room


# -- passages ---


@dataclass(frozen=True)
class Placed:
    """Where one answer stands in a passage: the nodes of its tokens."""

    lesson: int
    answer: int  # 0, or 1 for the rejected one of a pair
    nodes: tuple[int, ...]


@dataclass
class Passage:
    """A tree of tokens. Node i holds `tokens[i]` at depth `depths[i]` under `parents[i]` (−1 at the root)."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    teaches: bool = True  # False where its lessons are the base's own text; the two are never mixed

    def missing(self, lesson: Lesson) -> int:
        """How many nodes adding `lesson` would make, at most."""
        shared = max(self._shared(lesson.prompt + answer) for answer in lesson.answers)
        return lesson.size - shared

    def add(self, index: int, lesson: Lesson, only: int | None = None) -> Passage:
        """With all answers of `lesson`, or `only` one of them."""
        self.teaches = _teaches(lesson)
        for which, answer in enumerate(lesson.answers):
            if only in (None, which):
                nodes = self._path(lesson.prompt + answer)[len(lesson.prompt) :]
                self.placed.append(Placed(index, which, tuple(nodes)))
        return self

    @property
    def lessons(self) -> set[int]:
        return {placed.lesson for placed in self.placed}

    @property
    def branches(self) -> bool:
        return any(parent != i - 1 for i, parent in enumerate(self.parents))

    def _shared(self, ids: Ids) -> int:
        node = -1
        for depth, token in enumerate(ids):
            if (node, token) not in self.children:
                return depth
            node = self.children[node, token]
        return len(ids)

    def _path(self, ids: Ids) -> list[int]:
        path, node = [], -1
        for depth, token in enumerate(ids):
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.depths.append(depth)
                self.parents.append(node)
            path.append(node := child)
        return path


def lay_out(lessons: Sequence[Lesson], limit: int, most: int, merge: bool) -> list[Passage]:
    """Lessons in passages of at most `limit` nodes (one too large stands alone) and `most` lessons.

    Without `merge` each lesson stands alone. The base's own text is not mixed with what is taught, which may be seen
    more often.
    """
    order = sorted(range(len(lessons)), key=lambda i: (_teaches(lessons[i]), lessons[i].prompt, lessons[i].answers, i))
    passages: list[Passage] = []
    for i in order:
        if not (merge and passages and _joins(passages[-1], lessons[i], limit, most)):
            if passages:
                passages[-1].children.clear()  # they tell where one joins on, and take more than all the rest
            passages.append(Passage())
        passages[-1].add(i, lessons[i])
    return passages


def _joins(passage: Passage, lesson: Lesson, limit: int, most: int) -> bool:
    new = passage.missing(lesson)
    fits = len(passage.tokens) + new <= limit and len(passage.lessons) < most
    return fits and new <= (1 - SHARED_SHARE) * lesson.size and passage.teaches == _teaches(lesson)


def _teaches(lesson: Lesson) -> bool:
    return lesson.kind != "replay"


def chains(passage: Passage, lessons: Sequence[Lesson]) -> list[Passage]:
    """The same answers, each in a passage of its own without branches, for attention that cannot take a tree."""
    return [Passage().add(p.lesson, lessons[p.lesson], only=p.answer) for p in passage.placed]


# -- plan ---


@dataclass(frozen=True)
class Plan:
    """Which passages make up each batch, in order, and what that amounts to."""

    batches: tuple[tuple[int, ...], ...]
    rows: int  # distinct lessons seen
    epochs: float  # passes over what is taught
    tokens: int  # computed, over all epochs
    minutes: float  # that the tokens are expected to take

    def __str__(self) -> str:
        steps = len(self.batches)
        return f"{self.rows} rows, {self.epochs:.2g} epochs, {steps} steps, about {self.minutes:.1f} minutes"


def plan(
    passages: Sequence[Passage], epochs: float, batch_size: int, tokens_per_minute: float, minutes: float, seed: int
) -> Plan:
    """Passages in seeded order until `epochs` are full or `minutes` are spent, in batches of like length.

    A batch is filled until it has `batch_size` lessons, and holds none of them twice.
    """
    random = Random(seed)
    passes = _affordable(_passes(passages, epochs, random), passages, tokens_per_minute * minutes)
    taken = [i for one in passes for i in one]
    tokens = sum(len(passages[i].tokens) for i in taken)
    taught = sum(len(passage.lessons) for passage in passages if passage.teaches)
    visits = sum(len(passages[i].lessons) for i in taken if passages[i].teaches)
    seen = sum(len(passages[i].lessons) for i in set(taken))
    batches = _bucketed(passes, passages, batch_size, random)
    return Plan(tuple(batches), seen, visits / max(1, taught), tokens, tokens / tokens_per_minute)


def _passes(passages: Sequence[Passage], epochs: float, random: Random) -> Iterator[list[int]]:
    """All that teaches, every time in a new order, with as much of the rest each time as the visits of it allow."""
    taught = [i for i, passage in enumerate(passages) if passage.teaches]
    rest = [i for i, passage in enumerate(passages) if not passage.teaches]
    turns = cycle(random.sample(rest, len(rest)))
    share = len(rest) * min(1.0, REPLAY_VISITS / epochs)  # a pass
    for n in range(ceil(epochs)):
        end = min(epochs, n + 1.0)
        one = random.sample(taught, len(taught))[: ceil((end - n) * len(taught))]
        one += islice(turns, round(end * share) - round(n * share))
        yield random.sample(one, len(one))


def _affordable(passes: Iterator[list[int]], passages: Sequence[Passage], tokens: float) -> list[list[int]]:
    """As much of them as has at most so many `tokens`, and one passage at least."""
    kept: list[list[int]] = []
    for one in passes:
        kept.append([])
        for i in one:
            tokens -= len(passages[i].tokens)
            if tokens < 0 and kept[0]:
                return kept
            kept[-1].append(i)
    return kept


def _bucketed(
    passes: Sequence[Sequence[int]], passages: Sequence[Passage], size: int, random: Random
) -> list[tuple[int, ...]]:
    """One pass after another; what one leaves over begins the first batch of the next."""
    batches: list[tuple[int, ...]] = []
    batch: list[int] = []
    for n, one in enumerate(passes, 1):
        whole: list[tuple[int, ...]] = []
        for i in _windowed(one, passages, WINDOW * size):
            if i in batch or sum(len(passages[j].lessons) for j in batch) >= size:
                whole.append(tuple(batch))
                batch = []
            batch.append(i)
        if n == len(passes) and batch:
            whole.append(tuple(batch))
        random.shuffle(whole)
        batches += whole
    return batches


def _windowed(one: Sequence[int], passages: Sequence[Passage], window: int) -> Iterator[int]:
    for start in range(0, len(one), window):
        yield from sorted(one[start : start + window], key=lambda i: (len(passages[i].tokens), i))
