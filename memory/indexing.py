"""Keeping the vector index in step with SQL: what is pending, what was written, what got lost or left behind.

The invariant: a memory is marked as indexed only after the index holds it, so a crash in between loses nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from threading import RLock
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from ..errors import StoreError
from .conversations import Owner, leaves_memory, request_of, turn_memory_id, user_words
from .database import Database
from .embed import Embedder
from .forgetting import unfinished
from .passages import Passages, index_row, of_note, of_turn
from .reading import in_pages, memories, of_session
from .rows import IDS_A_QUERY, chunks, rows_in, to_interaction, to_memory, turn_memory
from .tables import InteractionRow, MemoryRow, StateRow
from .types import OF_TURNS, Interaction, Memory

if TYPE_CHECKING:
    from .vectors import VectorIndex

Vector = NDArray[np.float32]

log = logging.getLogger("nightschool")
REBUILD = "rebuild"  # the name of the state that a rebuild under way leaves: with which embedder
STORE = "store"  # the name of the state that names the store
PENDING = text("NOT memories.indexed")  # in these words, so that SQLite uses its partial index


@dataclass(frozen=True)
class Waiting:
    """A memory that is to be indexed, with what is looked at in it."""

    memory: Memory
    passages: Passages
    position: int = 0


class Indexing:
    def __init__(self, database: Database, embedder: Embedder, url: str) -> None:
        self._database, self._embedder, self._url = database, embedder, url
        self._lock = RLock()
        self._index: VectorIndex | None = None
        self._remaking = False  # by this process

    @property
    def index(self) -> VectorIndex:
        """Opened when first needed, and brought in step with SQL then."""
        self._database.require_own_process()
        if (held := self._index) is not None:  # without the lock: whoever has it may wait for the caller's transaction
            return held
        with self._lock:
            if self._index is None:
                self.check_whole()
                index = self._unopened()
                index.count()  # a StoreError here if it was made by another embedder, or for another store
                unnamed = not index.name()
                if unnamed:
                    self._check_known(index)
                self._index = index
                try:
                    if unnamed:  # it is written anew with the name
                        self.erase()
                    self.reconcile()
                except BaseException:
                    self._index = None  # the next caller tries again
                    raise
                with _left_for_later():
                    self.pending()
            return self._index

    def require(self) -> None:
        """StoreError where the index cannot be opened, before anything is written.

        One that another process makes anew with this embedder need not be: what is written waits to be indexed.
        """
        self._database.require_own_process()
        if self._index is not None:
            return
        with self._database.reading() as session:
            waits = _state(session, REBUILD) == self._made_with
        if not waits:
            _ = self.index

    @property
    def _made_with(self) -> str:
        return f"{self._embedder.name} ({self._embedder.dimension})"

    def embed_missing(self, vectors: dict[str, Vector], texts: Iterable[str]) -> dict[str, Vector]:
        """`vectors` by text, with those of `texts` added that are neither there nor empty."""
        missing = [t for t in dict.fromkeys(texts) if t and t not in vectors]
        if missing:
            vectors.update(zip(missing, self._embedder.embed(missing), strict=True))
        return vectors

    def written(
        self,
        interactions: Sequence[Interaction],
        replaced: Collection[str],
        vectors: dict[str, Vector],
        stale: Sequence[str],
    ) -> None:
        """Index what a committed transaction wrote; `vectors` by text, `stale` are memories that are no more."""
        remembered = [i for i in interactions if leaves_memory(i)]
        with _left_for_later():
            self.drop([*stale, *(turn_memory_id(i) for i in replaced)])
            self._add([_of_turn(turn_memory(i), i) for i in remembered], vectors)
            self.pending()  # what was stated in them

    def catch_up(self) -> None:
        """Index what a committed transaction left to be indexed."""
        with _left_for_later():
            self.pending()

    def drop(self, gone: Collection[str]) -> None:
        """Take these memories out of the index, but for those that came back to SQL meanwhile."""
        index = self.index
        if gone:
            with self._database.writing() as session:
                index.delete(set(gone) - memories(session, gone).keys())

    def pending(self, progress: Callable[[int], None] | None = None) -> int:
        """Index all that is not indexed and say how many; `progress` is told so on the way.

        StoreError while another process makes the index anew: that is its work, and may take long.
        """
        self._database.require_own_process()  # before a lock that nobody in it holds any more
        done = 0
        with self._lock:
            self.check_whole()
            _ = self.index
            while waiting := self._waiting():
                self._add(waiting, {}, afresh=True)
                done += len(waiting)
                if progress is not None:
                    progress(done)
        return done

    def own_vectors(self, interactions: Iterable[Interaction]) -> dict[str, Vector]:
        """The vector of each interaction that has words of the user, from the index if it is there."""
        asked = [i for i in interactions if request_of(i.turn)]
        ids = [turn_memory_id(i.id) for i in asked]
        # not opened here: that writes, and would wait for the caller's transaction
        index = self._index  # which another thread may let go of
        held: dict[str, Vector] = {} if index is None else index.vectors(ids)
        fresh = self.embed_missing({}, [i.text for i in asked if turn_memory_id(i.id) not in held])
        return {i.id: held[m] if (m := turn_memory_id(i.id)) in held else fresh[i.text] for i in asked}

    def erase(self) -> None:
        """Take everything that SQL does not know out of the index, with its bytes.

        What is to be indexed again goes, too: the index has it in words that may be forgotten. Alone among writers:
        erasing writes the table anew, and what another process adds meanwhile would be lost.
        """
        index = self.index
        with self._database.writing() as session:
            index.delete(set(index.ids()) - set(session.scalars(select(MemoryRow.id).where(MemoryRow.indexed))))
            index.erase()

    def rebuild(self, progress: Callable[[int], None]) -> int:
        """Make the index anew, or go on with that where it was interrupted; `progress` is told how many are done."""
        with self._lock:
            index = self._unopened()
            index.check_reachable()
            index.check_owner()  # before anything is dropped
            resumed = self._begin_rebuild()
            self._index = index
            self._remaking = True
            try:
                if not (resumed and self._index.is_ours()):
                    self._index.drop()
                    self._index = self._renamed()
                done = self.pending(progress)
                self.reconcile()
                with self._database.writing():  # others that write would preempt it
                    self._index.optimize()
                return done
            finally:
                self._remaking = False

    def check_whole(self) -> None:
        """StoreError while another process makes the index anew, or where that was interrupted. What another has made
        anew, here or in another home of this database, is opened again, which the latter refuses."""
        states = select(StateRow.name, StateRow.value).where(StateRow.name.in_((STORE, REBUILD)))
        with self._database.reading() as session:
            found = {name: value for name, value in session.execute(states)}
        if not self._remaking and REBUILD in found:
            raise StoreError(
                f"{self._url}: the index is being made anew, or that was interrupted; run"
                " `nightschool memory rebuild`, which goes on where it stopped"
            )
        held = self._index
        if held is not None and held.store_id != found.get(STORE, held.store_id):
            self._index = None

    def end_rebuild(self, session: Session) -> None:
        session.execute(delete(StateRow).where(StateRow.name == REBUILD))

    def _begin_rebuild(self) -> bool:
        """Whether one with this embedder is under way; if not, nothing is indexed any more."""
        with self._database.writing() as session:
            if _state(session, REBUILD) == self._made_with:
                return True
            session.merge(StateRow(name=REBUILD, value=self._made_with))
            session.execute(update(MemoryRow).values(indexed=False))
            return False

    def topic_sums(self) -> dict[str, Vector]:
        """The sum of the vectors of the turns of each topic."""
        sums: dict[str, Vector] = {}
        turns = (i for i in in_pages(self._database) if i.topic_id and request_of(i.turn))
        while some := list(islice(turns, IDS_A_QUERY)):
            vectors = self.own_vectors(some)
            for interaction in some:
                topic_id, vector = str(interaction.topic_id), vectors[interaction.id]
                sums[topic_id] = sums[topic_id] + vector if topic_id in sums else vector
        return sums

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

        made = partial(VectorIndex, self._url, self._embedder.dimension, self._embedder.name)
        if self._is_lost(made()):
            self._replace(made)
        return made(self._store_id(made))

    def _is_lost(self, index: VectorIndex) -> bool:
        """Whether there is none, and SQL has memories that one should hold."""
        if self._url.startswith("memory:"):  # where every connection has its own
            return False
        with self._database.reading() as session:
            indexed = session.scalars(select(MemoryRow.id).where(MemoryRow.indexed).limit(1)).first()
        return indexed is not None and not index.is_there()

    def _replace(self, made: Callable[[str], VectorIndex]) -> None:
        """Make an empty one under a new name of the store: one that another home of the same database has is refused
        from then on, since it would go on holding what is forgotten here. The name comes first, for a crash between."""
        with self._database.writing() as session:
            if not made("").is_there():  # else another process was first
                _name_store_anew(session)
        with self._database.writing() as session:
            made(session.get_one(StateRow, STORE).value).count()

    def _renamed(self) -> VectorIndex:
        """One that is not there yet, so that any other of this store is refused from then on."""
        with self._database.writing() as session:
            _name_store_anew(session)
        return self._unopened()

    def _store_id(self, made: Callable[[], VectorIndex]) -> str:
        """By which the index knows its store again: another's index is not brought in step with this one."""
        with self._database.reading() as session:
            if known := session.get(StateRow, STORE):
                return known.value
        name = self._known_name(made()) or uuid4().hex
        with self._database.writing() as session:
            held = session.get(StateRow, STORE) or session.merge(StateRow(name=STORE, value=name))
            return held.value

    def _known_name(self, index: VectorIndex) -> str:
        """That of an index whose rows SQL knows: a backup from before stores had names was put back."""
        name = index.name()
        if not name:
            return ""
        return name if self._knows(index) else ""

    def _check_known(self, index: VectorIndex) -> None:
        if not self._knows(index):
            raise index.of_another()

    def _knows(self, index: VectorIndex) -> bool:
        """Whether SQL knows some of what the index holds, if it should: not of what is erased or waits for it."""
        with self._database.reading() as session:
            marked = {i: is_marked for i, is_marked in session.execute(select(MemoryRow.id, MemoryRow.indexed))}
            erasing = unfinished(session)
        held = index.ids()
        if not held or erasing or not marked.keys().isdisjoint(held):
            return True
        return bool(marked) and not any(marked.values())

    def _waiting(self) -> list[Waiting]:
        """Some memories that are not indexed."""
        with self._database.reading() as session:
            rows = session.scalars(select(MemoryRow).where(PENDING).order_by(MemoryRow.id).limit(IDS_A_QUERY))
            memories = [to_memory(row) for row in rows]
            sources = [memory.source_ids[0] for memory in memories if memory.kind in OF_TURNS]
            found = session.scalars(select(InteractionRow).where(InteractionRow.id.in_(sources)))
            asked = {row.id: to_interaction(row) for row in found}
            notes = [Waiting(m, of_note(m), _place(session, m)) for m in memories if m.kind not in OF_TURNS]
        turns = [m for m in memories if m.kind in OF_TURNS and m.source_ids[0] in asked]  # it may be forgotten by now
        return [*(_of_turn(m, asked[m.source_ids[0]]) for m in turns), *notes]

    def _add(self, waiting: Sequence[Waiting], vectors: dict[str, Vector], *, afresh: bool = False) -> None:
        """Index those that still wait; `vectors` by text, and what is missing there is embedded."""
        vectors = self.embed_missing(vectors, (text for w in waiting for text in w.passages.texts))
        index = self.index  # before the transaction, which whoever opens the index may wait for
        with self._database.writing() as session:  # alone among writers, so that two do not index the same memory
            if _state(session, STORE) not in (None, index.store_id):
                raise StoreError(f"{self._url}: the index was made anew just now; ask again")
            unmarked = self._unmarked(session, [w.memory for w in waiting])
            rows = [index_row(w.memory, w.position, w.passages, vectors) for w in waiting if w.memory.id in unmarked]
            if afresh:
                index.delete([row.id for row in rows])  # a crash may have left some there
            index.add(rows)
            self._mark(session, [row.id for row in rows], indexed=True)

    def _unmarked(self, session: Session, memories: Sequence[Memory]) -> set[str]:
        """Those that wait, and are still what was looked at."""
        rows = select(MemoryRow.id, MemoryRow.created_utc).where(PENDING)
        times = dict(rows_in(session, rows, MemoryRow.id, [memory.id for memory in memories]))
        return {memory.id for memory in memories if times.get(memory.id) == memory.created_utc}

    def _mark(self, session: Session, ids: Sequence[str], *, indexed: bool) -> None:
        for some in chunks(ids):
            session.execute(update(MemoryRow).where(MemoryRow.id.in_(some)).values(indexed=indexed))


@contextmanager
def _left_for_later() -> Iterator[None]:
    """What fails is told in the log and left to the next recall: whoever kept the same once more would double it."""
    try:
        yield
    except StoreError as error:
        log.warning("kept, and to be indexed later: %s", error)


def _name_store_anew(session: Session) -> None:
    session.merge(StateRow(name=STORE, value=uuid4().hex))


def _state(session: Session, name: str) -> str | None:
    return session.scalars(select(StateRow.value).where(StateRow.name == name)).first()


def _place(session: Session, memory: Memory) -> int:
    """Of a note, the position of the turn that it was made after in its session."""
    if memory.kind != "note" or not memory.session_id:
        return 0
    owner = Owner(memory.user_id, memory.agent_id, memory.session_id)
    before = of_session(owner).where(InteractionRow.created_utc <= memory.created_utc)
    return session.scalars(before.with_only_columns(func.max(InteractionRow.position))).one() or 0


def _of_turn(memory: Memory, interaction: Interaction) -> Waiting:
    """Of a turn as it was replied to, or as it should have been, which the memory says after the user's words."""
    reply = memory.text.removeprefix(user_words(interaction.turn)).removeprefix("\n")
    return Waiting(memory, of_turn(replace(interaction, reply=reply)), interaction.position)
