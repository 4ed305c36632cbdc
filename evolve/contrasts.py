"""A liked answer against a disliked one: what phase 2 compares.

Four sources: a correction against what it corrected; a reply that was asked for in place of another against that one,
if the one was liked or kept or the other disliked; a liked against a disliked answer to the same prompt, or to nearly
the same (the same but for the last request, whose vector is close); and the answer that was liked when the request was
put in other words, against the one before it that was not. What nobody gave comes from `expansion`. The invariant: the
work is bounded by POOL², however much is remembered, and no prompt supplies more than PAIRS_PER_PROMPT contrasts on
either side.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .answers import Answer, Vectors, merged
from .prompts import Prompts
from .types import PairSource
from .weights import pair_margin, pair_weight

PAIRS_PER_PROMPT = 4
Rank = Callable[["Contrast"], tuple[bool, bool, float]]  # the least first
POOL = 8192  # answers of one kind that are compared with each other
CHUNK = 512
SAME = 2.0  # above every cosine
REPHRASED = 0.75  # the cosine of a request with the one before it that it puts in other words

Order = Callable[[Answer], float]


@dataclass(frozen=True)
class Contrast:
    chosen: Answer
    rejected: Answer
    source: PairSource | None = None  # if it does not follow from the two

    @property
    def how(self) -> PairSource:
        same = self.chosen.interaction.id == self.rejected.interaction.id
        return self.source or ("correction" if same else "contrast")

    @property
    def asked(self) -> Answer:
        """The one whose prompt is the pair's: of two replies to the same, what should have been said at once."""
        return self.rejected if self.source in ("regeneration", "rephrasing") else self.chosen

    @property
    def heads(self) -> tuple[str, ...]:
        """The interactions whose answers they are."""
        return tuple(dict.fromkeys((self.chosen.interaction.id, self.rejected.interaction.id)))

    @property
    def weight(self) -> float:
        confidence = self.chosen.confidence * self.rejected.confidence
        return pair_weight(confidence, pair_margin(self.chosen.score, self.rejected.score), self.chosen.recurrence)

    @property
    def sources(self) -> tuple[str, ...]:
        return merged(self.heads, self.chosen.sources, self.rejected.sources)


def fold_contrasts(
    contrasts: Iterable[Contrast], said: Callable[[Answer, Answer, Answer], tuple[str, str, str]]
) -> list[Contrast]:
    """The first of those that are `said` (of whose prompt, chosen, rejected) in the same words, with all sources."""
    found: dict[tuple[str, str, str], Contrast] = {}
    for contrast in contrasts:
        words = said(contrast.asked, contrast.chosen, contrast.rejected)
        first = found.setdefault(words, contrast)
        if first is not contrast:
            sources = merged(first.chosen.sources, contrast.sources)
            found[words] = replace(first, chosen=replace(first.chosen, sources=sources))
    return list(found.values())


def find_rephrased(answers: Sequence[Answer], prompts: Prompts, vectors: Vectors) -> list[Contrast]:
    """Each disliked answer against the liked one to the next turn of its session, if that asks the same again."""
    liked = {a.interaction.id: a for a in answers if a.liked and a.correction_id is None}
    found: list[Contrast] = []
    for answer in answers:
        again = prompts.reaction(answer.interaction)
        if answer.liked or again is None or again.id not in liked:
            continue
        better, (asked, asked_again) = liked[again.id], (vectors.get(i.id) for i in (answer.interaction, again))
        if asked is None or asked_again is None or better.completion == answer.completion:
            continue
        if float(asked @ asked_again) >= REPHRASED:
            found.append(Contrast(better, answer, "rephrasing"))
    return found


def find_contrasts(answers: Sequence[Answer], vectors: Vectors, cosine: float, order: Order) -> list[Contrast]:
    """Liked against disliked, the closest prompts first. `order` says which come into the pool, smallest first."""
    groups: dict[str, tuple[list[Answer], list[Answer]]] = defaultdict(lambda: ([], []))
    for answer in sorted(answers, key=lambda a: (order(a), a.interaction.id)):
        side = groups[answer.key_without_request][0 if answer.liked else 1]
        if len(side) < POOL:
            side.append(answer)
    found: list[tuple[float, Contrast]] = []
    for liked, disliked in groups.values():
        if liked and disliked:
            found += _near(liked, disliked, vectors, cosine)
    return bounded([contrast for _, contrast in sorted(found, key=_rank)])


def _rank(found: tuple[float, Contrast]) -> tuple[float, float, str, str, str]:
    closeness, c = found
    return -closeness, -c.weight, c.chosen.interaction.id, c.rejected.interaction.id, c.chosen.completion


def bounded(contrasts: Sequence[Contrast], rank: Rank = lambda _: (True, True, 0.0)) -> list[Contrast]:
    """As they stand, PAIRS_PER_PROMPT of a prompt on either side at most: the first by `rank`."""
    chosen, rejected, kept = Counter[str](), Counter[str](), list[int]()
    for i, contrast in sorted(enumerate(contrasts), key=lambda found: (rank(found[1]), found[0])):
        if max(chosen[contrast.chosen.key], rejected[contrast.rejected.key]) < PAIRS_PER_PROMPT:
            chosen[contrast.chosen.key] += 1
            rejected[contrast.rejected.key] += 1
            kept.append(i)
    return [contrasts[i] for i in sorted(kept)]


def _near(
    liked: list[Answer], disliked: list[Answer], vectors: Vectors, cosine: float
) -> Iterator[tuple[float, Contrast]]:
    """For each liked answer the PAIRS_PER_PROMPT disliked ones whose prompts are closest."""
    codes = {key: n for n, key in enumerate(dict.fromkeys(a.key for a in (*liked, *disliked)))}
    rejected, rejected_codes = _matrix(disliked, vectors), np.array([codes[a.key] for a in disliked])
    for start in range(0, len(liked), CHUNK):
        block = liked[start : start + CHUNK]
        # rounded, so that the last bits of a product on another machine change no choice
        closeness = np.round(_matrix(block, vectors) @ rejected.T, 3)
        closeness[np.array([[codes[a.key]] for a in block]) == rejected_codes] = SAME
        for answer, row in zip(block, closeness, strict=True):
            near = np.flatnonzero(row >= cosine)
            for j in near[np.argsort(-row[near], kind="stable")][:PAIRS_PER_PROMPT]:
                if answer.completion != disliked[j].completion:
                    yield float(row[j]), Contrast(answer, disliked[j])


def _matrix(answers: list[Answer], vectors: Vectors) -> NDArray[np.float32]:
    width = next((len(v) for v in vectors.values()), 1)
    missing = np.zeros(width, dtype=np.float32)
    return np.stack([vectors.get(a.interaction.id, missing) for a in answers]).astype(np.float32, copy=False)
