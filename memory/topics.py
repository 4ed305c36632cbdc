"""Which topic a turn belongs to, and how often the topic comes back.

Topics are found as turns arrive: a turn joins the topic whose mean vector is nearest, if that is near enough, and
founds a new one otherwise. The invariant: the same turns in the same order give the same topics with the same ids,
however they were cut into batches and whenever it happened. They are narrow; `grouping` puts them together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..content import content_id

Vector = NDArray[np.float32]
Session = tuple[Hashable, ...]  # the user first

DAY = 86400.0
LABEL_WORDS = 5
MOST_TOPICS = 20_000  # then a turn joins the nearest, however far: memory stays bounded, about 60 MB

_SAY_NOTHING = """
a about afternoon all also am an and any are as at be been but by can cannot could did do does doing evening for from
get give good got had has have he hello her hey hi him his how i if in into is it its just know let like me more morning
much my need no not of ok on one or our out please quick question she should so some tell than thank thanks that the
their them then there these they this those to too up us want was we were what when where which who why will with would
yes you your
"""
STOP_WORDS = frozenset(_SAY_NOTHING.split())


@dataclass(frozen=True)
class TopicState:
    """What must be kept of a topic to go on: `centroid_sum` is the sum of the unit vectors of its `size` turns."""

    id: str
    label: str
    centroid_sum: Vector
    size: int
    created_utc: float


@dataclass(frozen=True)
class Recurrence:
    """`value` is the decayed count over distinct sessions; it equals `sessions` for visits that are all of today."""

    value: float
    sessions: int
    last_seen_utc: float


class TopicIndex:
    """The topics of one store in memory: one row of `_sums` and of `_units` (their directions) a topic."""

    def __init__(self, rows: Iterable[TopicState], cosine_threshold: float, most: int = MOST_TOPICS) -> None:
        self._threshold, self._most = cosine_threshold, most
        self._topics: list[TopicState] = []  # `centroid_sum` and `size` here are as loaded; the arrays are current
        self._sizes: list[int] = []
        self._places: dict[str, int] = {}  # by id
        self._sums: Vector = np.zeros((0, 0), dtype=np.float32)
        self._units: Vector = np.zeros((0, 0), dtype=np.float32)
        self._changed: set[int] = set()
        for row in rows:
            self._append(row)

    def assign(self, texts: Sequence[str], vectors: Vector, now: float) -> list[str]:
        """The topic id of each text; `vectors` are their (n, d) float32 unit vectors. Founds topics where needed."""
        if len(texts) != len(vectors):
            raise ValueError(f"{len(texts)} texts with {len(vectors)} vectors")
        return [self._topics[self._place(text, vector, now)].id for text, vector in zip(texts, vectors, strict=True)]

    def changed(self) -> list[TopicState]:
        """The topics that `assign` founded or moved since the last call, to be written back."""
        states = [self._state(i) for i in sorted(self._changed)]
        self._changed.clear()
        return states

    def put(self, rows: Iterable[TopicState]) -> None:
        """Take these topics as they are now: another process founded or moved them."""
        for row in rows:
            if (n := self._places.get(row.id)) is None:
                self._append(row)
            else:
                self._topics[n], self._sizes[n] = row, row.size
                self._sums[n], self._units[n] = row.centroid_sum, _unit(row.centroid_sum)

    def _place(self, text: str, vector: Vector, now: float) -> int:
        nearest = self._nearest(vector)
        if nearest is None:
            topic_id = topic_id_of(text, self._places)
            nearest = self._append(TopicState(topic_id, label_of(text), vector, 1, now))
        else:
            self._sums[nearest] += vector
            self._units[nearest] = _unit(self._sums[nearest])
            self._sizes[nearest] += 1
        self._changed.add(nearest)
        return nearest

    def _nearest(self, vector: Vector) -> int | None:
        if not self._topics:
            return None
        cosines = self._units[: len(self._topics)] @ vector
        best = int(cosines.argmax())
        near = cosines[best] >= self._threshold or len(self._topics) >= self._most
        return best if near else None

    def _append(self, topic: TopicState) -> int:
        n, width = len(self._topics), len(topic.centroid_sum)
        if n == len(self._sums):  # grow by doubling, so that a long import copies little
            self._sums = _grown(self._sums, max(64, 2 * n), width)
            self._units = _grown(self._units, max(64, 2 * n), width)
        self._sums[n] = topic.centroid_sum
        self._units[n] = _unit(self._sums[n])
        self._sizes.append(topic.size)
        self._topics.append(topic)
        self._places[topic.id] = n
        return n

    def _state(self, i: int) -> TopicState:
        topic = self._topics[i]
        return TopicState(topic.id, topic.label, self._sums[i].copy(), self._sizes[i], topic.created_utc)


def topic_id_of(text: str, taken: Collection[str]) -> str:
    """`t:` and the content id of the founding text, which founds a second topic when its first has drifted away."""
    n = 0
    while (topic_id := "t:" + content_id([text, n])) in taken:
        n += 1
    return topic_id


def label_of(text: str) -> str:
    """The first words of the founding text that say something; the text itself where none does."""
    words = [w for w in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()) if w not in STOP_WORDS]
    return (" ".join(list(dict.fromkeys(words))[:LABEL_WORDS]) or " ".join(text.split()) or "(empty)")[:80]


def recurrence(
    visits: Iterable[tuple[str, Session, float]], now: float, half_life_days: float, most_a_user: float = 0.0
) -> dict[str, Recurrence]:
    """n_k = Σ_sessions 2^(−(now − t_i)/h) by topic, over visits (topic id, session, time).

    A session counts once a topic, at its latest visit: asking ten times in one sitting is one need. A visit from the
    future (a clock that was wrong) counts as now. `most_a_user` bounds what one user adds to a topic; 0: no bound.
    """
    latest: dict[str, dict[Session, float]] = {}
    for topic_id, session, time in visits:
        times = latest.setdefault(topic_id, {})
        times[session] = max(time, times.get(session, time))
    return {topic_id: _decayed(times, now, half_life_days, most_a_user) for topic_id, times in latest.items()}


def _decayed(times: Mapping[Session, float], now: float, half_life_days: float, most_a_user: float) -> Recurrence:
    in_order = sorted(times.items(), key=lambda visit: visit[1])
    decayed = {session: 2.0 ** (-max(0.0, now - t) / (half_life_days * DAY)) for session, t in in_order}
    if not most_a_user:
        return Recurrence(sum(decayed.values()), len(times), in_order[-1][1])
    added: dict[Hashable, float] = defaultdict(float)
    for session, visit in decayed.items():
        added[session[0]] += visit
    return Recurrence(sum(sorted(min(most_a_user, own) for own in added.values())), len(times), in_order[-1][1])


def _unit(vector: Vector) -> Vector:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _grown(array: Vector, rows: int, width: int) -> Vector:
    new = np.zeros((rows, width), dtype=np.float32)
    if len(array):
        new[: len(array)] = array
    return new
