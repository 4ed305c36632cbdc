"""Keeping the vector index in step with SQL: what is pending, what was written, what got lost or left behind.

The invariant: a memory is marked as indexed only after the index holds it, so a crash in between loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from threading import RLock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from .conversations import request_of, turn_memory_id
from .database import Database
from .embed import Embedder
from .rows import IDS_A_QUERY, chunks, to_interaction, to_memory, turn_memory
from .tables import InteractionRow, MemoryRow
from .types import Interaction, Memory

if TYPE_CHECKING:
    from .vectors import VectorIndex

Vector = NDArray[np.float32]

PENDING = text("NOT memories.indexed")  # in these words, so that SQLite uses its partial index


class Indexing:
    def __init__(self, database: Database, embedder: Embedder, url: str) -> None:
        self._database, self._embedder, self._url = database, embedder, url
        self._lock = RLock()
        self._index: VectorIndex | None = None

    @property
    def index(self) -> VectorIndex:
        """Opened when first needed, and brought in step with SQL then."""
        if self._index is not None:  # without the lock: whoever holds it may wait for the caller's transaction
            return self._index
        with self._lock:
            if self._index is None:
                index = self._unopened()
                index.count()  # a StoreError here if it was made by another embedder
                self._index = index
                self.reconcile()
                self.pending()
            return self._index

    def embed_missing(self, vectors: dict[str, Vector], texts: Iterable[str]) -> dict[str, Vector]:
        """`vectors` by text, with those of `texts` added that are neither there nor empty."""
        missing = [t for t in dict.fromkeys(texts) if t and t not in vectors]
        if missing:
            vectors.update(zip(missing, self._embedder.embed(missing), strict=True))
        return vectors

    def written(
        self, interactions: Sequence[Interaction], replaced: Collection[str], vectors: Mapping[str, Vector]
    ) -> None:
        """Index what a committed transaction wrote; `vectors` by request."""
        asked = [i for i in interactions if request_of(i.turn)]
        self.index.delete([turn_memory_id(i) for i in replaced])
        self._add([turn_memory(i) for i in asked], [vectors[i.text] for i in asked])

    def pending(self, sums: dict[str, Vector] | None = None) -> int:
        """Index all that is not indexed and say how many; add the vectors of turns to `sums` by topic."""
        done = 0
        with self._lock:
            _ = self.index
            while waiting := self._waiting():
                vectors = self._embedder.embed([request for _, request, _ in waiting])
                for (_, _, topic_id), vector in zip(waiting, vectors, strict=True):
                    if sums is not None and topic_id is not None:
                        sums[topic_id] = sums.get(topic_id, np.zeros_like(vector)) + vector
                memories = [memory for memory, _, _ in waiting]
                self._add(memories, list(vectors), afresh=True)
                done += len(waiting)
        return done

    def own_vectors(self, interactions: Iterable[Interaction]) -> dict[str, Vector]:
        """The vector of each interaction that has words of the user, from the index if it is there."""
        asked = [i for i in interactions if request_of(i.turn)]
        held = self.index.vectors([turn_memory_id(i.id) for i in asked])
        fresh = self.embed_missing({}, [i.text for i in asked if turn_memory_id(i.id) not in held])
        return {i.id: held[m] if (m := turn_memory_id(i.id)) in held else fresh[i.text] for i in asked}

    def erase(self) -> None:
        """Take everything that SQL does not know out of the index, with its bytes.

        Alone among writers: erasing writes the table anew, and what another process adds meanwhile would be lost.
        """
        index = self.index
        with self._database.writing() as session:
            index.delete(set(index.ids()) - set(session.scalars(select(MemoryRow.id))))
            index.erase()

    def rebuild(self, sums: dict[str, Vector]) -> int:
        with self._lock:
            with self._database.writing() as session:
                session.execute(update(MemoryRow).values(indexed=False))
            self._index = self._unopened()
            self._index.drop()
            done = self.pending(sums)
            self._index.optimize()
            return done

    def reconcile(self) -> None:
        """Where the counts differ: index again what is lost or doubled, erase what SQL does not know."""
        with self._database.reading() as session:
            indexed = select(func.count()).select_from(MemoryRow).where(MemoryRow.indexed)
            if self.index.count() == session.scalars(indexed).one():
                return
            marked = {i: is_marked for i, is_marked in session.execute(select(MemoryRow.id, MemoryRow.indexed))}
        held = Counter(self.index.ids())
        wrong = [i for i, is_marked in marked.items() if is_marked and held[i] != 1]
        with self._database.writing() as session:
            self._mark(session, wrong, indexed=False)
        self.pending()
        if held.keys() - marked.keys():
            self.erase()

    def _unopened(self) -> VectorIndex:
        from .vectors import VectorIndex

        return VectorIndex(self._url, self._embedder.dimension, self._embedder.name)

    def _waiting(self) -> list[tuple[Memory, str, str | None]]:
        """Some memories that are not indexed, each with the text that is its vector and the topic of its turn."""
        with self._database.reading() as session:
            rows = session.scalars(select(MemoryRow).where(PENDING).order_by(MemoryRow.id).limit(IDS_A_QUERY))
            memories = [to_memory(row) for row in rows]
            sources = [memory.source_ids[0] for memory in memories if memory.kind == "turn"]
            found = session.scalars(select(InteractionRow).where(InteractionRow.id.in_(sources)))
            asked = {row.id: to_interaction(row) for row in found}
        turns = [asked[memory.source_ids[0]] if memory.kind == "turn" else None for memory in memories]
        return [(m, t.text if t else m.text, t.topic_id if t else None) for m, t in zip(memories, turns, strict=True)]

    def _add(self, memories: Sequence[Memory], vectors: Sequence[Vector], *, afresh: bool = False) -> None:
        from .vectors import IndexRow

        with self._database.writing() as session:  # alone among writers, so that two do not index the same memory
            waiting = self._unmarked(session, [m.id for m in memories])
            rows = [
                IndexRow(m.id, m.user_id, m.agent_id, m.session_id, m.kind, m.shared, m.text, vector)
                for m, vector in zip(memories, vectors, strict=True)
                if m.id in waiting
            ]
            if afresh:
                self.index.delete([row.id for row in rows])  # a crash may have left some there
            self.index.add(rows)
            self._mark(session, [row.id for row in rows], indexed=True)

    def _unmarked(self, session: Session, ids: Sequence[str]) -> set[str]:
        rows = select(MemoryRow.id).where(PENDING)
        return {i for some in chunks(ids) for i in session.scalars(rows.where(MemoryRow.id.in_(some)))}

    def _mark(self, session: Session, ids: Sequence[str], *, indexed: bool) -> None:
        for some in chunks(ids):
            session.execute(update(MemoryRow).where(MemoryRow.id.in_(some)).values(indexed=indexed))
