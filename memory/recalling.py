"""From a query to the memories that fit it: what is asked, which rows are looked at, and what is given back.

A store of some thousand memories is ranked whole. Of a larger one, the best by cosine and the best by words are, with
what stands around them in the sessions of those at the top. The invariant: every row comes through the condition of
who may see it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nextafter
from typing import TYPE_CHECKING

from ..errors import InputError
from .conversations import checked_kind, checked_past, checked_time
from .embed import Embedder
from .passages import IndexRow, windows
from .ranking import ALONE, BESIDE, Fit, Query, Weights, folded, rank
from .types import OF_TURNS, Memory, MemoryKind, Recall
from .words import terms

if TYPE_CHECKING:
    from .vectors import VectorIndex

RANKED_WHOLE = 2000  # a store of at most so many memories
CANDIDATES = 200  # of a larger one: by cosine, and as many by words
MORE = 16  # times as many, where those say too few different things
MOST_TERMS = 400  # that a larger one is searched for
SESSIONS = 20  # whose other turns are looked at too
PLACED = 400  # of the best, around which is looked
ROWS_AROUND = 4000


@dataclass(frozen=True)
class Filters:
    session_id: str | None = None
    kind: MemoryKind | None = None
    since: float | None = None
    until: float | None = None
    as_of: float | None = None
    beside: Collection[str] = ()  # interactions that are at hand already

    def admit(self, row: IndexRow) -> bool:
        return (
            self.session_id in (None, row.session_id)
            and self.kind in (None, row.kind)
            and (self.since is None or row.created_utc >= self.since)
            and (self.until is None or row.created_utc < self.until)
        )

    def at_hand(self, memory: Memory) -> bool:
        """Whether it was said in what stands beside it; SQL tells, since the index does not know what said it."""
        return memory.kind not in ("note", "correction") and any(source in self.beside for source in memory.source_ids)


@dataclass(frozen=True)
class Candidates:
    query: Query
    rows: Sequence[IndexRow]
    visible: int

    @property
    def whole(self) -> bool:
        """Whether there is no more to look at."""
        return len(self.rows) >= self.visible

    def ranked(self, weights: Weights) -> list[Fit]:
        return rank(self.query, self.rows, self.visible, weights)


def asking(text: str, embedder: Embedder) -> Query:
    cut = windows(text)
    return Query(text, embedder.embed([text] if cut == [text] else [text, *cut]))


def candidates(
    index: VectorIndex, query: Query, user_id: str, agent_id: str, filters: Filters, most: int, weights: Weights
) -> Candidates:
    """What may fit: of a large store at most `most` by cosine, as many by words, and what stands around the best."""
    from .vectors import beside, narrowed, visible

    # What came at that very moment is known then.
    until = inf if filters.as_of is None else nextafter(filters.as_of, inf)
    scope = narrowed(visible(user_id, agent_id), until=until if until < inf else None)
    count = index.count_where(scope)
    if count <= RANKED_WHOLE:
        return Candidates(query, index.rows(scope, 2 * RANKED_WHOLE), count)
    sessions = None if filters.session_id is None else [filters.session_id]
    condition = narrowed(scope, sessions=sessions, kind=filters.kind, since=filters.since, until=filters.until)
    near = index.near(query.vectors[0], condition, most)
    found = _joined(near, index.matching(_searched(query.text), condition, most))
    places = _around(rank(query, found, count, weights))
    more = index.rows(beside(scope, places), ROWS_AROUND) if places else []
    return Candidates(query, _joined(found, more), count)


def _around(fits: Sequence[Fit]) -> dict[str, list[int]]:
    """The places within reach of those that fit, in the sessions of the best."""
    within = [fit.row for fit in fits[:PLACED] if fit.row.session_id and fit.row.kind not in ALONE]
    sessions = list(dict.fromkeys(row.session_id for row in within))[:SESSIONS]
    places: dict[str, set[int]] = {session: set() for session in sessions}
    for row in within:
        if row.session_id in places:
            places[row.session_id].update(range(row.position - BESIDE, row.position + BESIDE + 1))
    return {session: sorted(some) for session, some in places.items()}


def _searched(text: str) -> list[str]:
    """The terms of it; of very many the first and the last, where the question stands if the rest was pasted."""
    found = list(dict.fromkeys(terms(text)))
    return found if len(found) <= MOST_TERMS else found[: MOST_TERMS // 2] + found[-MOST_TERMS // 2 :]


def best_of(
    fits: Sequence[Fit],
    most: int,
    memories: Callable[[Iterable[str]], Mapping[str, Memory]],
    turned: Callable[[Sequence[Memory]], tuple[Mapping[str, Memory], Mapping[str, Memory]]],
    filters: Filters,
) -> list[Recall]:
    """The first `most` that say different things and hold.

    SQL has the last word on what exists, and until when. Of turns and corrections `turned` gives the statement that was
    superseded, by those that say nothing else, and the correction to show in place of a turn. Neither need be among the
    fits, since a turn may fit better by its neighbours, or by the reply that was corrected.
    """
    found: list[Recall] = []
    for start in range(0, len(fits), most + 5):
        some = fits[start : start + most + 5]
        held = memories([fit.row.id for fit in some])
        over, instead = ({}, {}) if filters.kind == "turn" else turned([m for m in held.values() if m.kind in OF_TURNS])
        fitting = [(held[fit.row.id], fit) for fit in some if fit.row.id in held]
        holding = [(m, fit) for m, fit in fitting if m.held(filters.as_of) and over.get(m.id, m).held(filters.as_of)]
        made = [Recall(instead.get(m.id, m), fit.score, fit.parts) for m, fit in holding]
        found = _said_once(folded([*found, *(r for r in made if not filters.at_hand(r.memory))]))
        if len(found) >= most:
            break
    return found[:most]


def _said_once(recalls: Iterable[Recall]) -> list[Recall]:
    """No statement after its own turn."""
    kept: list[Recall] = []
    turns: set[str] = set()
    for recall in recalls:
        memory = recall.memory
        if not memory.subject or turns.isdisjoint(memory.source_ids):
            kept.append(recall)
            turns.update(memory.source_ids[:1] if memory.kind in OF_TURNS else ())
    return kept


def checked_filters(filters: Filters, now: float) -> Filters:
    checked_kind(filters.kind)
    for where in ("since", "until", "as_of"):
        if (time := getattr(filters, where)) is not None:
            checked_time(where, time)
    if filters.since is not None:
        checked_past("since", filters.since, now)
    if filters.since is not None and filters.until is not None and filters.since >= filters.until:
        raise InputError(f"since ({filters.since}) is not before until ({filters.until})")
    if filters.since is not None and filters.as_of is not None and filters.since > filters.as_of:
        raise InputError(f"since ({filters.since}) is after as_of ({filters.as_of}), so there is nothing between them")
    return filters


def checked_threshold(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise InputError(f"threshold is of type {type(threshold).__name__}, not a number")
    if threshold != threshold:
        raise InputError("threshold is nan, below which nothing is; give a number")
    return threshold


def _joined(*found: Sequence[IndexRow]) -> list[IndexRow]:
    return list({row.id: row for rows in found for row in rows}.values())
