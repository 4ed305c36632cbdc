"""How well a memory fits a query, in [0, 1]. Pure.

`score = ½ max(0, cos) + ½ Σ idf(query terms in the text) / Σ idf(query terms)`. Coverage is absolute: a text with one
of four words gets about a quarter, however poor the others are, so that a threshold means the same for every query. A
query of stop words alone has only its cosine. Not covered: time, neighbours, kinds, supersession.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import log

from .topics import STOP_WORDS
from .types import Memory, Recall


@dataclass(frozen=True)
class Candidate:
    memory: Memory
    cosine: float


def rank(query: str, candidates: Sequence[Candidate], visible: int) -> list[Recall]:
    """Best first, of near-identical texts only the best; `visible` is how many memories the asker can see.

    The document frequency of a term is counted among the candidates. That is exact for rare terms, whose texts are
    all among the best by words, and too low for common terms, which still weigh less than the rare ones.
    """
    wanted = frozenset(terms(query))
    held = [frozenset(terms(c.memory.text)) for c in candidates]
    weights = {t: _idf(sum(t in words for words in held), max(visible, len(held))) for t in wanted}
    found = [_scored(c, words, weights) for c, words in zip(candidates, held, strict=True)]
    return folded(sorted(found, key=lambda r: (-r.score, -r.memory.created_utc, r.memory.id)))


def _scored(candidate: Candidate, words: Collection[str], weights: dict[str, float]) -> Recall:
    dense = min(1.0, max(0.0, candidate.cosine))
    if not weights:
        return Recall(candidate.memory, dense, {"dense": dense})
    coverage = sum(w for term, w in weights.items() if term in words) / sum(weights.values())
    return Recall(candidate.memory, (dense + coverage) / 2, {"dense": dense, "words": coverage})


def folded(recalls: Iterable[Recall]) -> list[Recall]:
    """The first of those whose texts are the same words in the same order, whatever their case and punctuation."""
    first: dict[str, Recall] = {}
    for recall in recalls:
        first.setdefault(" ".join(_words(recall.memory.text)) or recall.memory.text, recall)
    return list(first.values())


def terms(text: str) -> list[str]:
    """The stems of the words that say something."""
    return [stem(word) for word in _words(text) if word not in STOP_WORDS]


def stem(word: str) -> str:
    """A light English stem: `likes`, `liked`, `liking` and `like` are one; so are `city` and `cities`."""
    word = word.removesuffix("'s").removesuffix("’s")
    if len(word) <= 3 or not word.isalpha():
        return word
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]
    for ending in ("ing", "ed"):
        root = word.removesuffix(ending)
        if root != word and len(root) >= 3:
            word = root[:-1] if root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold())


def _idf(holding: int, total: int) -> float:
    return log(1 + (total - holding + 0.5) / (holding + 0.5))
