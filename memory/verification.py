"""What disagrees in a store. The invariant that it checks: every id re-derives from its content, every reference leads
somewhere, and SQL and the index hold the same memories.

Not covered, since no id is made of them: which adapter answered, what it was shown, times, and where a note was made.
An import brings answers of adapters that were never here, and what a reply was shown may have been forgotten, so that
an id which leads nowhere is no disagreement; `audit why` names it.

SQL is read as it was at one moment. The index follows a little later than a commit, and erased bytes later still, so
what disagrees is told only if it still does once those who write are through.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby

from sqlalchemy import inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..content import content_id
from ..errors import StoreError
from .conversations import (
    draft_id,
    feedback_id,
    interaction_id,
    leaves_memory,
    note_id,
    owner_of,
    request_of,
    turn_memory_id,
)
from .corrections import every_correction
from .database import FIRST_TABLES, VERSIONS, Database, open_engine
from .forgetting import unfinished
from .indexing import Indexing
from .reading import every_interaction
from .rows import ROWS_A_PAGE, review_of, to_feedback, to_memory, turn_memory
from .stated_rows import Subject, derived
from .statements import stated
from .tables import DraftRow, FeedbackRow, MemoryRow
from .topic_rows import miscounted
from .types import Interaction

PAUSE_S = 0.3  # in which a writer goes on from one transaction to the next
PATIENCE_S = 5.0  # with bytes that are being erased: index, log and receipt are a transaction each


def is_empty(url: str) -> bool:
    """Whether that database holds no tables of ours; not of one that cannot be read, for opening it says why."""
    engine = open_engine(url)
    try:
        tables = set(inspect(engine).get_table_names())
    except SQLAlchemyError:
        return False
    finally:
        engine.dispose()
    return VERSIONS not in tables and not tables >= FIRST_TABLES


def disagreements(database: Database, indexing: Indexing) -> list[str]:
    found = _at_a_moment(database, indexing)
    if not found:
        return []
    _await_writers(database)
    still = set(_at_a_moment(database, indexing))
    return [line for line in found if line in still]


def _await_writers(database: Database) -> None:
    """Until a writer will have brought the index up to what it committed, and what it erases is gone.

    What nobody is erasing any more, after a crash or where a file cannot be deleted, costs `PATIENCE_S`.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        time.sleep(PAUSE_S)
        with suppress(StoreError), database.writing() as session:
            if not unfinished(session):
                return


def _at_a_moment(database: Database, indexing: Indexing) -> list[str]:
    with database.moment() as session:
        found = _wrong_rows(session)
    with database.moment() as session:  # one of its own, as close to the index as can be
        return [*found, *_index_apart(session, indexing)]


def _wrong_rows(session: Session) -> list[str]:
    found: list[str] = []
    expected: dict[str, str] = {}  # memory id: the id of its text, of every turn that leaves one
    known: set[str] = set()
    turns: Counter[str] = Counter()
    made: dict[Subject, list[Interaction]] = defaultdict(list)  # the turns in which a user stated something of it
    for _, said in groupby(every_interaction(session), key=owner_of):
        text, topic_id = "", None
        for interaction in said:
            known.add(interaction.id)
            if leaves_memory(interaction):
                expected[turn_memory_id(interaction.id)] = content_id(turn_memory(interaction).text)
            if request := request_of(interaction.turn):
                text, topic_id = request, interaction.topic_id
                turns[topic_id or ""] += 1
                for statement in stated(request):
                    made[interaction.user_id, interaction.agent_id, statement.subject].append(interaction)
            found += _wrong_interaction(interaction, text, topic_id)
    found += [
        f"receipt {i}: the forgotten bytes may still be in the files; open the store again" for i in unfinished(session)
    ]
    found += _wrong_feedback(session, known)
    found += _wrong_drafts(session, known)
    found += _wrong_memories(session, known, expected)
    found += _wrong_statements(session, made)
    found += _wrong_corrections(session)
    found += miscounted(session, turns)
    return found


def _wrong_interaction(interaction: Interaction, text: str, topic_id: str | None) -> Iterator[str]:
    derived = interaction_id(owner_of(interaction), interaction.position, interaction.turn, interaction.reply)
    if interaction.id != derived:
        yield f"interaction {interaction.id}: its content has the id {derived}"
    if interaction.text != text:
        yield f"interaction {interaction.id}: its text is not the latest request of its session"
    if interaction.topic_id != topic_id or (text and topic_id is None):
        yield f"interaction {interaction.id}: its topic {interaction.topic_id} is not that of its request"


def _wrong_feedback(session: Session, known: set[str]) -> Iterator[str]:
    for row in session.scalars(select(FeedbackRow).order_by(FeedbackRow.id)).yield_per(ROWS_A_PAGE):
        derived = feedback_id(row.interaction_id, review_of(to_feedback(row)))
        if row.id != derived:
            yield f"feedback {row.id}: its content has the id {derived}"
        if row.interaction_id not in known:
            yield f"feedback {row.id}: its interaction {row.interaction_id} does not exist"


def _wrong_drafts(session: Session, known: set[str]) -> Iterator[str]:
    for row in session.scalars(select(DraftRow).order_by(DraftRow.id)).yield_per(ROWS_A_PAGE):
        derived = draft_id(row.interaction_id, row.base_id, row.text)
        if row.id != derived:
            yield f"draft {row.id}: its content has the id {derived}"
        if row.interaction_id not in known:
            yield f"draft {row.id}: its interaction {row.interaction_id} does not exist"


def _wrong_memories(session: Session, known: set[str], expected: dict[str, str]) -> Iterator[str]:
    missing = dict(expected)
    for row in session.scalars(select(MemoryRow).order_by(MemoryRow.id)).yield_per(ROWS_A_PAGE):
        if row.kind == "note" and row.id != note_id(row.user_id, row.agent_id, row.shared, row.text):
            yield f"memory {row.id}: its content has another id"
        if row.kind == "turn" and missing.pop(row.id, None) != content_id(row.text):
            yield f"memory {row.id}: it is not the memory of its turn"
        for source in row.source_ids:
            if source not in known:
                yield f"memory {row.id}: its source {source} does not exist"
    yield from (
        f"memory {i}: it is missing, and its turn is there; run `nightschool memory rebuild`" for i in sorted(missing)
    )


def _wrong_statements(session: Session, made: Mapping[Subject, Sequence[Interaction]]) -> Iterator[str]:
    wanted = {memory.id: memory for subject, turns in made.items() for memory in derived(*subject, turns)}
    for row in session.scalars(select(MemoryRow).where(MemoryRow.subject != "")).yield_per(ROWS_A_PAGE):
        if wanted.pop(row.id, None) != to_memory(row):
            yield f"memory {row.id}: it is not what its turns state; run `nightschool memory rebuild`"
    yield from (f"memory {i}: it was stated and is missing; run `nightschool memory rebuild`" for i in sorted(wanted))


def _wrong_corrections(session: Session) -> Iterator[str]:
    wanted = {memory.id: memory for memory in every_correction(session)}
    for row in session.scalars(select(MemoryRow).where(MemoryRow.kind == "correction")).yield_per(ROWS_A_PAGE):
        if wanted.pop(row.id, None) != to_memory(row):
            yield f"memory {row.id}: it is not what its turn was corrected to; run `nightschool memory rebuild`"
    yield from (f"memory {i}: a correction that is missing; run `nightschool memory rebuild`" for i in sorted(wanted))


def _index_apart(session: Session, indexing: Indexing) -> Iterator[str]:
    try:
        indexing.check_whole()
        indexing.pending()  # whatever keeps it from being written, recall will meet, too
        held = Counter(indexing.index.ids())
    except StoreError as error:
        yield str(error)
        return
    marked = {i: is_marked for i, is_marked in session.execute(select(MemoryRow.id, MemoryRow.indexed))}
    lost = sorted(i for i, is_marked in marked.items() if is_marked and i not in held)
    yield from (f"memory {i}: it is not in the index; run `nightschool memory rebuild`" for i in lost)
    yield from (f"memory {i}: the index has it and SQL does not" for i in sorted(held.keys() - marked.keys()))
    yield from (f"memory {i}: the index has it {n} times" for i, n in sorted(held.items()) if n > 1)
