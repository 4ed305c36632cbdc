"""How well a memory fits a query, in [0, 1]. Pure.

    S      = ½ max_v cos(v, memory) + ½ max_w cos(query, w) + ½ max_w cover(w)
    S'     = S + .3 max(0, best S at ±1 − S) + ¼ max(0, best S at ±2 − S)          (turns and notes of the same session)
    score  = S' / 1.5

over the windows v of the query and w of the memory. `cover` is the idf mass of the query's terms in the window over
that of the query, with idf over what the asker can see; a query of stop words alone has none, and its sum is divided
by 1. It is absolute: a text with one of four words gets about a quarter, however poor the others are, so that a
threshold means the same for every other query, and where the query's words do not tell memories apart the cosine
decides. A turn carries only its neighbours' excess, so that a short answer is
found by its question and a memory without neighbours loses nothing. What the assistant said counts a little less,
unless the query is about that. Not covered: supersession, recency beyond equal scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum, log
from typing import get_args
from unicodedata import category, normalize

import numpy as np
from numpy.typing import NDArray

from .passages import IndexRow
from .statements import StatementKind
from .types import Recall
from .words import stem, terms, words

Array = NDArray[np.float32]

BESIDE = 2  # turns to either side
ALONE = (*get_args(StatementKind), "correction")  # what repeats a turn has no neighbours in its session
_SIGNS = re.compile(r"(?<!\w)-(?=\d)|(?<=\w)[+#]+|[%<>=]|(?<=\d)[.,:/](?=\d)|(?<= )[*/](?= )|[👍👎✓✔✗✘☑☒]")
_OF_EMOJI = re.compile("[\ufe00-\ufe0f\u20e3]")
POLITE = frozenset("hello hey hi ok please quick thank thanks".split())
_ON_THE_REPLY = re.compile(r"\b(?:you|your|assistant|bot)(?:'ve|’ve)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Weights:
    """The numbers of the formula; `bench/recall.py` leaves each out."""

    windows: float = 0.5  # of the cosine, the best window's share
    words: float = 0.5
    next: float = 0.3  # of the excess at ±1
    after_next: float = 0.25  # of the excess at ±2
    reply: float = 0.1  # taken from a window of the reply


WEIGHTS = Weights()


@dataclass(frozen=True)
class Query:
    text: str
    vectors: Array  # (1 + windows, dimension): the whole first, one row if there is one window


@dataclass(frozen=True)
class Fit:
    row: IndexRow
    score: float
    parts: dict[str, float]  # they add up to the score


def rank(query: Query, rows: Sequence[IndexRow], visible: int, weights: Weights = WEIGHTS) -> list[Fit]:
    """Best first. `visible` is how many memories the asker can see: `rows` are all of them, or the best by either way.

    Of the best alone, the document frequency of a rare term is still exact, and that of a common one too low.
    """
    if not rows:
        return []
    wanted = _idf(query.text, rows, visible)
    scale = 1.0 + (weights.words if wanted else 0.0)
    dense = _dense(query, rows, weights) / scale
    covered = _coverage(wanted, rows) * weights.words / scale
    lifted = _excess(dense + covered, rows, weights)
    made = [
        Fit(row, min(1.0, float(d + c + e)), {"dense": float(d), "words": float(c), "neighbours": float(e)})
        for row, d, c, e in zip(rows, dense, covered, lifted, strict=True)
    ]
    return sorted(made, key=lambda fit: (-fit.score, -fit.row.created_utc, fit.row.id))


def folded(recalls: Iterable[Recall]) -> list[Recall]:
    """The first of those whose texts are the same stems in the same order, but for polite words.

    Some signs tell them apart as well: `C++` and `C#`, 5 and -5, 3.4 and 3:4, arrows, thumbs, the vowels of Hindi.
    """
    first: dict[object, Recall] = {}
    for recall in recalls:
        text = normalize("NFC", recall.memory.text.replace("−", "-"))
        said = tuple(stem(word) for word in words(text) if word not in POLITE)
        first.setdefault((said, _signs(text)) if said else text, recall)
    return list(first.values())


def _signs(text: str) -> str:
    """Signs that stand for words, and the marks of letters."""
    kinds = ((c, category(c)) for c in text if c not in "+<>=")
    marks = (c for c, kind in kinds if kind in ("Sc", "Sm") or (kind[0] == "M" and not _OF_EMOJI.match(c)))
    return "".join([*_SIGNS.findall(text), *marks])


def _dense(query: Query, rows: Sequence[IndexRow], weights: Weights) -> Array:
    counts = np.array([len(row.vectors) for row in rows])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    cosines = np.concatenate([row.vectors for row in rows]).astype(np.float32) @ query.vectors.T
    whole = cosines[starts].max(axis=1)
    best = cosines[:, 0]
    if not _ON_THE_REPLY.search(query.text):
        best = best - weights.reply * _of_reply(rows)
    best[starts[counts > 1]] = -1.0  # the whole is no window where there are windows
    best = np.maximum.reduceat(best, starts)
    mixed: Array = (1 - weights.windows) * whole + weights.windows * best
    return np.clip(mixed, 0.0, 1.0)


def _of_reply(rows: Sequence[IndexRow]) -> Array:
    """1 for each vector of a window of the reply."""
    marks = [[0.0] * (len(r.vectors) > 1) + [0.0] * r.own + [1.0] * (len(r.lines) - r.own) for r in rows]
    return np.array([mark for row in marks for mark in row], dtype=np.float32)


def _idf(text: str, rows: Sequence[IndexRow], visible: int) -> dict[str, float]:
    """The weight of each term of the query."""
    counts = dict.fromkeys(terms(text), 0)
    for row in rows:
        for term in {word for line in row.lines for word in line.split() if word in counts}:
            counts[term] += 1
    total = max(visible, len(rows))
    return {term: log(1 + (total - n + 0.5) / (n + 0.5)) for term, n in counts.items()}


def _coverage(wanted: dict[str, float], rows: Sequence[IndexRow]) -> Array:
    mass = sum(wanted.values())
    if not mass:
        return np.zeros(len(rows), dtype=np.float32)
    return np.array([max((_mass(wanted, line) for line in row.lines), default=0.0) / mass for row in rows], np.float32)


def _mass(wanted: dict[str, float], line: str) -> float:
    return fsum(wanted[term] for term in wanted.keys() & line.split())  # a set has no order, and `fsum` needs none


def _excess(scores: Array, rows: Sequence[IndexRow], weights: Weights) -> Array:
    """What each gains from the better of its neighbours in its session."""
    alone = [row.kind in ALONE or not row.session_id for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (alone[n], *_place(rows[n])))
    places = [(n, 0) if alone[n] else (rows[n].session, rows[n].position) for n in order]
    ordered = scores[order]
    gained = np.zeros_like(ordered)
    for distance, weight in ((1, weights.next), (2, weights.after_next)):
        together = np.array([_near(a, b) for a, b in zip(places, places[distance:], strict=False)], dtype=bool)
        rise = np.where(together, ordered[distance:] - ordered[:-distance], 0.0)
        best = np.zeros_like(ordered)
        best[:-distance] = np.maximum(rise, 0.0)
        best[distance:] = np.maximum(best[distance:], np.maximum(-rise, 0.0))
        gained += weight * best
    result = np.empty_like(gained)
    result[order] = gained
    return result


def _place(row: IndexRow) -> tuple[tuple[str, str, str], float, int, bool]:
    """Where it stands: a note behind the turn that it was made after."""
    return row.session, row.created_utc, row.position, row.kind == "note"


def _near(a: tuple[object, int], b: tuple[object, int]) -> bool:
    """Whether both are of one session, and what was said between them is not merely missing among the rows."""
    return a[0] == b[0] and abs(a[1] - b[1]) <= BESIDE
