"""The memory: what was said, what was said of it, and what of it is found again.

SQL holds the facts. A write commits them first, with its memories marked as not indexed, then brings up the vector
index and marks them indexed; whatever a crash leaves in between is indexed before the index is used next. The
invariant: the index can be dropped at any time and made again from SQL.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import RLock

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from ..content import Message
from ..errors import InputError, NotFound, StoreError, Unerased
from ..settings import Settings, make_home
from . import reading
from .conversations import (
    Conversation,
    Review,
    checked_conversation,
    checked_id,
    checked_ids,
    checked_limit,
    checked_messages,
    checked_new_owner,
    checked_owner,
    checked_past,
    checked_review,
    checked_text,
    continued,
    interactions_of,
    leaves_memory,
    made_interaction,
    note_id,
    plan,
    request_of,
    turn_memory_id,
)
from .corrections import corrected, remember_all_corrections, remember_corrections
from .database import Database
from .embed import Embedder, MiniLM
from .erasing import compact, erase_bytes
from .exporting import EXPORTS, exports_in, write_export
from .facts import Facts
from .forgetting import checked_selection, confirmed, erase_rows, inherit_again, targets, unfinished
from .indexing import Indexing
from .passages import of_turn
from .ranking import WEIGHTS, Fit, Query
from .reader import Reader, keep_reader
from .recalling import (
    CANDIDATES,
    MORE,
    Filters,
    asking,
    best_of,
    candidates,
    checked_filters,
    checked_threshold,
)
from .restoring import Restored, Restoring, batches
from .restoring import new_texts as new_texts_of
from .rows import from_memory, from_review, to_feedback
from .stated_rows import add_statements, ended_by_turn, name_again, restate_all, state_again
from .tables import FeedbackRow, InteractionRow, MemoryRow, StateRow
from .tombstones import Tombstones
from .topic_rows import TopicRows, recentre, release
from .types import (
    Draft,
    Feedback,
    FeedbackEvent,
    ForgetPlan,
    ForgetReceipt,
    Interaction,
    Memory,
    MemoryKind,
    Recall,
    Selection,
)
from .verification import disagreements
from .writing import (
    Held,
    Recorded,
    add_sources,
    check_shown,
    check_sources,
    end_note,
    hold_again,
    insert_drafts,
    insert_interactions,
    insert_missing_memories,
    insert_reviews,
    latest_moment,
    new_texts,
    rated,
    remove_replaced,
)

Vector = NDArray[np.float32]
log = logging.getLogger("nightschool")
# by the state that a migration leaves where something is to be made again, in the order in which it is
AFTER_MIGRATIONS = {"naming": name_again, "statements": state_again, "corrections": remember_all_corrections}
FORGOTTEN = 20_000  # memories of a large store that `forget --query` looks at, by cosine and by words each


class MemoryStore(Facts):
    def __init__(
        self,
        settings: Settings,
        *,
        embedder: Embedder | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.clock, self.weights = clock, WEIGHTS
        self.embedder: Embedder = MiniLM() if embedder is None else embedder
        make_home(settings.home)
        super().__init__(Database(settings.database_url), settings, self.embedder.dimension)
        self.sql = self.database.sql
        self._lock = RLock()
        self._topics = TopicRows(settings.memory.topic_cosine, self.embedder.dimension)
        with ExitStack() as opening:
            opening.callback(self.close)
            self._indexing = Indexing(self.database, self.embedder, settings.index_url)
            self._finish()
            opening.pop_all()  # it stays open

    def _finish(self) -> None:
        """What a migration left to do, and a forgetting that was interrupted."""
        with self.database.reading() as session:
            due = [name for name in AFTER_MIGRATIONS if session.get(StateRow, name)]
        for name in due:
            with self._writing() as session:
                AFTER_MIGRATIONS[name](session)
                session.execute(delete(StateRow).where(StateRow.name == name))
        try:
            self._erase_bytes()
        except StoreError as error:
            log.warning("forgetting that was interrupted is not finished yet: %s", error)

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.database.close()

    # -- writing ---

    def record(
        self,
        turn: Sequence[Message],
        reply: str,
        *,
        user_id: str,
        agent_id: str = "",
        session_id: str,
        adapter_id: str | None = None,
        memory_ids: Sequence[str] = (),
        after: Sequence[str] | None = None,
        check: Callable[[], None] = lambda: None,
        created_utc: float | None = None,
    ) -> Interaction:
        """Keep a turn and our reply as the next of its session.

        `after` are the interactions before it that the reply was shown, in order: StoreError, and nothing is kept, if
        one of them or of `memory_ids` was forgotten since, or another turn came between. What `check` raises right
        before it is committed keeps it out, too.
        """
        owner, said = checked_new_owner(user_id, agent_id, session_id), checked_messages(turn)
        checked_text("reply", reply)
        if any(message["role"] == "assistant" for message in said):
            raise InputError(
                "turn: a message is of the assistant; give what was said since the reply before it, or the whole"
                " conversation to store.record_conversation"
            )
        now = self._moment(created_utc)
        if not said and not reply:
            raise InputError("turn and reply are both empty: nothing was said")
        if adapter_id is not None:
            checked_id("adapter_id", adapter_id)
        made = made_interaction(owner, 0, said, request_of(said), reply, now)
        made = replace(made, adapter_id=adapter_id, memory_ids=checked_ids("memory_ids", memory_ids) or ())
        vectors = self._vectors(of_turn(made).texts if leaves_memory(made) else ())
        with self._writing() as session:
            last = reading.latest(session, owner)
            if last is not None and created_utc is None:  # later, even where a clock was set back
                made = replace(made, created_utc=max(made.created_utc, last.created_utc))
            if after is not None:
                check_shown(session, last, after, memory_ids)
            open_ended = last is not None and last.reply == "" and not rated(session, [last.id])
            if last is not None and open_ended and not reply and last.turn[-len(said) :] == tuple(said):
                return last  # told once more, and still without an answer
            made = continued(last, open_ended, owner, made)
            replaced = {last.id: made.id} if last is not None and open_ended else {}
            gone = set(map(turn_memory_id, replaced))  # the words of which stand in the turn itself
            made = replace(made, memory_ids=tuple(i for i in made.memory_ids if i not in gone))
            Tombstones(session).lift([made], ())
            (made,), stale = self._insert(session, [made], replaced, vectors)
            check()
        self._indexing.written([made], replaced, vectors, stale)
        return made

    def record_conversation(
        self,
        messages: Sequence[Message],
        *,
        user_id: str,
        agent_id: str = "",
        session_id: str,
        created_utc: Sequence[float] | float | None = None,
        reviews: Mapping[int, Review] | None = None,
    ) -> Recorded:
        """Keep a whole conversation; `created_utc` is one time for all or one a message, `reviews` go by message."""
        given = self.clock() if created_utc is None else created_utc
        times = tuple(given) if isinstance(given, Sequence) else (given,) * len(messages)
        owner = checked_new_owner(user_id, agent_id, session_id)
        if not session_id:
            raise InputError("session_id is empty; name one")
        recorded = self.record_many([Conversation(owner, tuple(messages), times, reviews or {})])
        for error in recorded.errors.values():
            raise error
        return recorded

    def record_many(self, conversations: Sequence[Conversation]) -> Recorded:
        """Keep many in one transaction. One that is malformed or contradicts what is held is left out whole."""
        errors: dict[int, InputError] = {}
        sound: dict[int, Conversation] = {}
        now = self.clock()
        for i, conversation in enumerate(conversations):
            try:
                sound[i] = checked_conversation(conversation, now)
            except InputError as error:
                errors[i] = error
        with self.database.reading() as session:
            texts = new_texts(session, sound.values())
        vectors = self._vectors(texts)
        with self._writing() as session:
            held = Held(session, {c.owner for c in sound.values()})
            held.forgotten = Tombstones(session).forgotten(
                made for c in sound.values() for made, _ in interactions_of(c)
            )
            for i, conversation in sound.items():
                try:
                    held.take(plan(conversation, held.rows(conversation.owner), held.rated, held.forgotten))
                except InputError as error:
                    errors[i] = error
            written, stale = self._insert(session, list(held.new.values()), held.replaced, vectors)
            for owner in held.to_inherit:
                inherit_again(session, owner)
            feedback_new = insert_reviews(session, held.reviews, self.clock())
        self._indexing.written(written, held.replaced, vectors, stale)
        return Recorded(len(written), held.known, feedback_new, errors, held.left_out)

    def rate(
        self,
        interaction_id: str,
        *,
        rating: float | None = None,
        correction: str | None = None,
        comment: str | None = None,
        event: FeedbackEvent | None = None,
        user_id: str | None = None,
        created_utc: float | None = None,
    ) -> Feedback:
        """Keep what a person said of a reply, or did. Said again, it is the same feedback, and the latest once more.

        NotFound where the reply was given to somebody else than `user_id`.
        """
        checked_text("interaction_id", interaction_id)
        review = checked_review(Review(rating, correction, comment, event))
        given = None if created_utc is None else self._moment(created_utc)
        with self._writing() as session:
            held = session.get(InteractionRow, interaction_id)
            if held is None or user_id not in (None, held.user_id):
                whose = "" if user_id is None else f" of user {user_id!r}"
                raise NotFound(
                    f"no interaction {interaction_id}{whose}; nothing was rated, see `nightschool audit answers`"
                )
            now = latest_moment(session, interaction_id, self.clock()) if given is None else given
            values = from_review(interaction_id, review, now)
            row = session.get(FeedbackRow, values["id"])
            if row is None:
                row = FeedbackRow(**values)
                session.add(row)
            elif given is None:
                row.created_utc = now
            if correction is not None:
                session.flush()
                remember_corrections(session, [interaction_id])
            return to_feedback(row)

    def remember(
        self,
        text: str,
        *,
        user_id: str,
        agent_id: str = "",
        session_id: str = "",
        shared: bool = False,
        source_ids: Sequence[str] = (),
        replaces: str | None = None,
        created_utc: float | None = None,
    ) -> Memory:
        """Keep a note; the same again is the one that is known, with both their sources. `created_utc`: default now.

        It falls with any of its sources. The note that it `replaces` stays on record, and is recalled `as_of` a time
        before alone. NotFound where the user has no such source or note.
        """
        owner = checked_new_owner(user_id, agent_id, session_id)
        if not checked_text("text", text).strip():
            raise InputError("text is blank; give what is to be remembered")
        if not isinstance(shared, bool):  # 1 would be kept as True, under the id of 1
            raise InputError(f"shared is {repr(shared)[:30]}; give True or False")
        named = note_id(user_id, agent_id, shared, text)
        now = self._moment(created_utc)
        self.require_index()
        note = Memory(named, *owner, "note", text, now, checked_ids("source_ids", source_ids) or (), shared)
        with self._writing() as session:
            check_sources(session, note)
            if replaces is not None:
                end_note(session, checked_text("replaces", replaces), note)
            if add_sources(session, note):
                note = hold_again(session, note)
            else:
                Tombstones(session).lift((), [note.id])
                session.execute(insert(MemoryRow), [from_memory(note)])
        self._indexing.catch_up()
        return note

    def require_index(self) -> None:
        """StoreError where the index cannot be opened, and so nothing be recorded. What is made anew is waited for."""
        self._indexing.require()

    def check_index(self) -> None:
        """StoreError where the index cannot be opened or read."""
        self._indexing.index.ids()

    def keep_reader(self, reader: Reader, fitted_on: Collection[str]) -> None:
        """Lay it in the home in place of the one before, unless something that it was `fitted_on` is forgotten."""
        with self._writing() as session:  # whoever forgets comes before, or erases it
            if reading.known(session, fitted_on) >= set(fitted_on):
                keep_reader(reader, self.settings.home)

    def keep_drafts(self, drafts: Sequence[Draft]) -> int:
        """Keep what the base wrote, but nothing written to what was forgotten meanwhile. Returns how many are new."""
        with self._writing() as session:
            return insert_drafts(session, drafts)

    # -- recalling ---

    def recall(
        self,
        query: str,
        *,
        user_id: str,
        agent_id: str = "",
        session_id: str | None = None,
        kind: MemoryKind | None = None,
        since: float | None = None,
        until: float | None = None,
        as_of: float | None = None,
        beside: Collection[str] = (),
        limit: int | None = None,
        threshold: float | None = None,
    ) -> list[Recall]:
        """The memories of this user, and the shared ones, that fit `query`: best first, none below the threshold.

        Only those of `session_id` and `kind`, made from `since` to before `until` (seconds since 1970); `as_of` asks
        as if it were that time, and nothing later existed. A statement that was superseded by then is left out, and so
        is a turn that says nothing else; of a turn that was corrected by then the correction is given, whenever that
        came. `kind="turn"` asks for the record, and gives what was said, also what does not hold any more. `beside`
        leaves out what was said in those interactions, as they stand in the prompt.
        """
        checked_owner(user_id, agent_id, "" if session_id is None else session_id)
        at_hand = frozenset(checked_ids("beside", beside) or ())
        filters = checked_filters(Filters(session_id, kind, since, until, as_of, at_hand), self.clock())
        memory = self.settings.memory
        least = checked_threshold(memory.recall_threshold if threshold is None else threshold)
        if limit is None and not memory.recall_limit:
            raise InputError("memory.recall_limit is 0, so that nothing is recalled; give a limit")
        most = checked_limit(memory.recall_limit if limit is None else limit)
        if not checked_text("query", query).strip():
            return []
        recalls: list[Recall] = []
        asked = self._asked(query)
        for wide in (max(CANDIDATES, most), MORE * max(CANDIDATES, most)):
            found = candidates(self._indexing.index, asked, user_id, agent_id, filters, wide, self.weights)
            fits = [fit for fit in found.ranked(self.weights) if fit.score >= least and filters.admit(fit.row)]
            recalls = best_of(fits, most, self.memories, partial(self._turned, filters.as_of), filters)
            if len(recalls) >= most or found.whole or len(fits) < wide:
                break  # else the same was said so often that nothing else was looked at
        return recalls

    # -- reading, where SQL alone does not do ---

    def request_vectors(self, interaction_ids: Iterable[str]) -> dict[str, Vector]:
        """The vector of what the user asked, by interaction; a turn of tools has that of the request it answers."""
        self._indexing.pending()
        with self.database.reading() as session:
            found = reading.asking(session, reading.by_id(session, interaction_ids))
            asked = {i: turn_memory_id(source) for i, source in found.items()}
        vectors = self._indexing.index.vectors(set(asked.values()))
        return {i: vectors[memory_id] for i, memory_id in asked.items() if memory_id in vectors}

    # -- forgetting and proving ---

    def forget(
        self,
        *,
        user_id: str | None = None,
        session_id: str | None = None,
        before_utc: float | None = None,
        interaction_ids: Iterable[str] | None = None,
        memory_ids: Iterable[str] | None = None,
        query: str | None = None,
    ) -> ForgetPlan:
        """What would be erased, and what was trained on it. Nothing is changed before `forget_apply(plan)`.

        `query` finds memories of that user above the recall threshold; what else is given says which of whom and when.
        Ids that are given and empty are none.
        """
        ids = checked_ids("interaction_ids", interaction_ids), checked_ids("memory_ids", memory_ids)
        selection = checked_selection(Selection(user_id, session_id, before_utc, *ids, query), self.clock())
        found = self._found(selection)
        with self.database.reading() as session:
            return targets(session, selection, found, exports_in(self.settings.home)).plan

    def forget_apply(self, plan: ForgetPlan) -> ForgetReceipt:
        """Erase rows, vectors, exports and their bytes, if it is still exactly what the plan's token was given for.

        Unerased if the rows are gone and not all their bytes.
        """
        if not isinstance(plan, ForgetPlan):
            raise InputError(f"plan is of type {type(plan).__name__}; give what `forget` returned")
        selection = checked_selection(plan.selection, self.clock())
        self._indexing.pending()
        found = self._found(selection)
        with self._writing() as session:
            reached = targets(session, selection, found, exports_in(self.settings.home))
            going = confirmed(reached, plan.token)
            if going.empty:
                return going.receipt
            vectors = self._indexing.own_vectors(going.interactions)
            erase_rows(session, going, self.clock())
            release(session, going.interactions, vectors)
        try:
            self._erase_bytes()
        except StoreError as error:
            raise Unerased(str(error), going.receipt) from error
        self._indexing.catch_up()  # what was stated in other turns, too
        return going.receipt

    def unfinished(self) -> bool:
        """Whether bytes of what was forgotten may still be in the files."""
        with self.database.reading() as session:
            return bool(unfinished(session))

    def _found(self, selection: Selection) -> set[str]:
        if selection.query is None or selection.user_id is None or not selection.query.strip():
            return set()
        least = self.settings.memory.recall_threshold
        with self.database.reading() as session:
            agents = {"", *reading.agents_of(session, selection.user_id)}
        narrowed = Filters(until=selection.before_utc)
        fits = [f for a in agents for f in self._fits(selection.query, selection.user_id, a, narrowed, FORGOTTEN)]
        # All that says it, and not only what recall would show. What was found by the turns around it is not asked for.
        ids = {fit.row.id for fit in fits if fit.score - fit.parts["neighbours"] >= least}
        return {i for i, memory in self.memories(ids).items() if memory.user_id == selection.user_id}

    def _asked(self, query: str) -> Query:
        self._indexing.pending()
        return asking(query, self.embedder)

    def _fits(self, query: str, user_id: str, agent_id: str, filters: Filters, most: int) -> list[Fit]:
        """What this user can see and the filters admit, best first."""
        asked = self._asked(query)
        found = candidates(self._indexing.index, asked, user_id, agent_id, filters, most, self.weights)
        return [fit for fit in found.ranked(self.weights) if filters.admit(fit.row)]

    def _turned(self, as_of: float | None, said: Sequence[Memory]) -> tuple[dict[str, Memory], dict[str, Memory]]:
        with self.database.reading() as session:
            return ended_by_turn(session, said), corrected(session, [m for m in said if m.kind == "turn"], as_of)

    def _erase_bytes(self) -> None:
        erase_bytes(self.settings.home, self.database, self._indexing, self.clock())

    def rebuild_index(self, progress: Callable[[int], None] | None = None) -> int:
        """Drop the index and make it again from SQL, also with another embedder; goes on where it was interrupted.

        What turns left and users stated or corrected is taken in again first. Returns how many memories this call
        indexed; `progress` is told so.
        """
        with self._lock:
            with self._writing() as session:
                insert_missing_memories(session, self.interactions())
                restate_all(session, self.interactions())
                remember_all_corrections(session)
            count = self._indexing.rebuild(progress or (lambda _: None))
            with self._writing() as session:
                recentre(session, self._indexing.topic_sums())
                self._indexing.end_rebuild(session)
            self._topics.reload()
            self._erase_bytes()
        return count

    def compact(self) -> tuple[int, int]:
        """Give back the space of what is gone, and make recall quick again: bytes of the home before and after."""
        return compact(self.settings.home, self.database, self._indexing)

    def export(self, path: Path | str | None = None) -> tuple[Path, Counter[str]]:
        """Write every fact as lines of JSON, into the home by default: the file, and how many lines of each type."""
        now = self.clock()
        named = f"memory-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}.jsonl"
        to = self.settings.home / EXPORTS / named if path is None else Path(path)
        with self.database.moment() as session:
            return to, write_export(session, to, now)

    def restore(self, path: Path | str) -> Restored:
        """Bring an export in. What is held already is known again, and what was forgotten here stays out."""
        restoring = Restoring(Path(path).name, self.embedder.dimension)
        for lines in batches(Path(path)):
            with self.database.reading() as session:
                texts = new_texts_of(session, lines)
            vectors = self._vectors(texts)
            with self._writing() as session:
                restoring.batch(session, lines, vectors)
            self._indexing.written(restoring.fresh, {i.id for i in restoring.replaced}, vectors, restoring.stale)
        with self._writing() as session:
            restoring.finish(session)
        self._topics.reload()
        return restoring.report

    def verify(self) -> list[str]:
        """What disagrees: ids that do not re-derive, references to nothing, SQL and index apart. Empty is sound."""
        return disagreements(self.database, self._indexing)

    # -- inside ---

    def _moment(self, created_utc: float | None) -> float:
        now = self.clock()
        return now if created_utc is None else checked_past("created_utc", created_utc, now)

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        self.database.require_own_process()  # before a lock that nobody in it holds any more
        with self._lock:
            try:
                with self.database.writing() as session:
                    yield session
            except BaseException:
                self._topics.reload()  # they may hold what was rolled back
                raise

    def _vectors(self, texts: Iterable[str]) -> dict[str, Vector]:
        """Embedded before the transaction, so that no other writer waits for it."""
        self.require_index()
        return self._indexing.embed_missing({}, texts)

    def _insert(
        self,
        session: Session,
        new: Sequence[Interaction],
        replaced: Mapping[str, str],
        vectors: dict[str, Vector],
    ) -> tuple[list[Interaction], list[str]]:
        """The interactions as they were written, and the ids of memories that are no more."""
        gone = reading.by_id(session, replaced) if replaced else []
        if gone:
            remove_replaced(session, gone, replaced, self._indexing.own_vectors(gone))
        self._indexing.embed_missing(vectors, (i.text for i in new if request_of(i.turn)))
        written = insert_interactions(session, new, vectors, self._topics, self.clock())
        return written, add_statements(session, written, gone)
