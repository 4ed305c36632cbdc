"""Topics in SQL: kept in step with the `TopicIndex` that assigns them, and taken back when their turns are forgotten.

The invariant: a topic's row is the sum, the count and the label of turns that still exist.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from ..errors import StoreError
from .conversations import request_of
from .rows import chunks
from .tables import InteractionRow, StateRow, TopicRow
from .topics import TopicIndex, TopicState, label_of
from .types import Interaction

Vector = NDArray[np.float32]
REVISION = "topics"  # how often they were changed
MOVED = "topics moved"  # which were founded or moved by the latest of these changes, that did nothing else
CHANGES, FEW = 32, 16  # so many are kept, of those that moved few topics


class TopicRows:
    """The topic index, loaded when first needed; what another process has changed since is loaded anew."""

    def __init__(self, cosine_threshold: float, dimension: int) -> None:
        self._threshold, self._dimension = cosine_threshold, dimension
        self._index: TopicIndex | None = None
        self._ids: set[str] = set()
        self._seen = -1

    def assign(self, session: Session, texts: Sequence[str], vectors: Vector, now: float) -> list[str]:
        """The topic of each text, with the changed topics written in the caller's transaction."""
        if not texts:
            return []
        index = self._loaded(session)
        assigned = index.assign(texts, vectors, now)
        changed = [_to_row(state) for state in index.changed()]
        if new := [row for row in changed if row["id"] not in self._ids]:
            session.execute(insert(TopicRow), new)
        if moved := [row for row in changed if row["id"] in self._ids]:
            session.execute(update(TopicRow), moved)
        self._ids.update(str(row["id"]) for row in new)
        self._seen = revise(session, [str(row["id"]) for row in changed])
        return assigned

    def reload(self) -> None:
        """Forget what is loaded: the transaction that changed it failed, or the rows were changed otherwise."""
        self._index = None

    def _loaded(self, session: Session) -> TopicIndex:
        held = _revision(session)
        moved = _moved(session, self._seen, held)
        if self._index is None or moved is None:
            found = states(session, self._dimension)
            self._index, self._ids = TopicIndex(found, self._threshold), {topic.id for topic in found}
        elif moved:
            self._index.put(states(session, self._dimension, moved))
            self._ids |= moved
        self._seen = held
        return self._index


def states(session: Session, dimension: int, ids: Collection[str] | None = None) -> list[TopicState]:
    """Every topic, or those of `ids`, oldest first."""
    row = TopicRow
    columns = select(row.id, row.label, row.centroid, row.size, row.created_utc).order_by(row.created_utc, row.id)
    if ids is not None:
        columns = columns.where(row.id.in_(ids))
    found = session.execute(columns)
    return [TopicState(i, label, _vector(i, centroid, dimension), n, t) for i, label, centroid, n, t in found]


def _vector(topic_id: str, centroid: bytes, dimension: int) -> Vector:
    vector: Vector = np.frombuffer(centroid, dtype=np.float32)
    if len(vector) != dimension:
        raise StoreError(
            f"topic {topic_id} was made of vectors of {len(vector)} numbers, the embedder makes {dimension};"
            " run `nightschool memory rebuild`"
        )
    return vector


def release(session: Session, gone: Iterable[Interaction], vectors: Mapping[str, Vector]) -> None:
    """Take deleted interactions out of their topics; `vectors` by interaction id, of those with words of their own.

    The label is made again from the earliest turn that is left, since it may be the forgotten words.
    """
    by_topic: dict[str, list[Vector]] = defaultdict(list)
    for interaction in gone:
        if interaction.topic_id is not None and interaction.id in vectors:
            by_topic[interaction.topic_id].append(vectors[interaction.id])
    for topic_id, out in by_topic.items():
        row = session.get_one(TopicRow, topic_id)
        if row.size <= len(out):
            session.execute(update(InteractionRow).where(InteractionRow.topic_id == topic_id).values(topic_id=None))
            session.execute(delete(TopicRow).where(TopicRow.id == topic_id))
            continue
        row.size -= len(out)
        row.centroid = (np.frombuffer(row.centroid, dtype=np.float32) - np.sum(out, axis=0)).tobytes()
        row.label = label_of(earliest_request(session, topic_id))
    if by_topic:
        revise(session)
    session.flush()


def join(session: Session, vectors: Mapping[str, Sequence[Vector]]) -> None:
    """Add the vectors of turns that joined, by topic."""
    for topic_id, came in vectors.items():
        row = session.get_one(TopicRow, topic_id)
        row.size += len(came)
        row.centroid = (np.frombuffer(row.centroid, dtype=np.float32) + np.sum(came, axis=0)).tobytes()
    if vectors:
        revise(session)
    session.flush()


def relabel(session: Session, topic_ids: Iterable[str]) -> None:
    """Make labels anew from the earliest turn that is held."""
    for topic_id in topic_ids:
        if row := session.get(TopicRow, topic_id):
            row.label = label_of(earliest_request(session, topic_id))
    revise(session)  # the labels that others have loaded may be forgotten words
    session.flush()


def recentre(session: Session, sums: Mapping[str, Vector]) -> None:
    """New centroids, when the vectors were made anew."""
    for some in chunks(list(sums)):
        session.execute(update(TopicRow), [{"id": i, "centroid": sums[i].tobytes()} for i in some])
    revise(session)


def miscounted(session: Session, turns: Counter[str]) -> list[str]:
    """Topics whose size is not the number of turns with words of their own that belong to them."""
    rows = session.execute(select(TopicRow.id, TopicRow.size).order_by(TopicRow.id)).all()
    found = [f"topic {i}: its size is {size}, it has {turns[i]} turns" for i, size in rows if size != turns[i]]
    return found + [f"topic {i}: it has turns and no row" for i in sorted(turns.keys() - {row.id for row in rows})]


def earliest_request(session: Session, topic_id: str) -> str:
    """The words of the earliest turn of the topic that is held; empty if it has none."""
    member = select(InteractionRow.turn).where(InteractionRow.topic_id == topic_id)
    turns = session.scalars(member.order_by(InteractionRow.created_utc, InteractionRow.id)).yield_per(100)
    return next(filter(None, map(request_of, turns)), "")


def _revision(session: Session) -> int:
    held = session.get(StateRow, REVISION)
    return int(held.value) if held else 0


def revise(session: Session, moved: Sequence[str] = ()) -> int:
    """Tell other processes that topics changed, so that they load those `moved` anew, or all if none are named.

    In the transaction that changed them.
    """
    made = _revision(session) + 1
    session.merge(StateRow(name=REVISION, value=str(made)))
    known = [*_changes(session), (made, list(moved))] if 0 < len(moved) <= FEW else []  # what is forgotten goes, too
    session.merge(StateRow(name=MOVED, value=json.dumps(known[-CHANGES:])))
    return made


def _moved(session: Session, seen: int, now: int) -> set[str] | None:
    """What was founded or moved after the revision `seen`; None where it is not known, or something else was done."""
    if seen == now:
        return set()
    changes = {revision: ids for revision, ids in _changes(session) if seen < revision <= now}
    return set().union(*changes.values()) if len(changes) == now - seen else None


def _changes(session: Session) -> list[tuple[int, list[str]]]:
    held = session.get(StateRow, MOVED)
    return json.loads(held.value) if held else []


def _to_row(state: TopicState) -> dict[str, object]:
    centroid = np.asarray(state.centroid_sum, dtype=np.float32).tobytes()
    return {
        "id": state.id,
        "label": state.label,
        "centroid": centroid,
        "size": state.size,
        "created_utc": state.created_utc,
    }
