"""Questions put to SQL, each one function of a session. None of them writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, String, Subquery, cast, func, select, tuple_
from sqlalchemy.orm import Session

from ..errors import NotFound
from ..settings import DatasetSettings
from .conversations import Owner, checked_text, owner_of, request_of
from .database import Database
from .grouping import groups, labels
from .rows import ROWS_A_PAGE, rows_in, scalars_in, to_draft, to_feedback, to_interaction, to_memory
from .tables import AdapterRow, Base, CycleRow, DraftRow, FeedbackRow, InteractionRow, MemoryRow, SnapshotRow, TopicRow
from .topic_rows import earliest_request
from .topics import TopicState, recurrence
from .types import Draft, Feedback, Interaction, Memory, Topic

LEAST_OF_ID = 9  # letters of an id that name it in place of the whole: b2: and six
Named = TypeVar("Named", InteractionRow, AdapterRow, CycleRow)
PLACE = (InteractionRow.user_id, InteractionRow.agent_id, InteractionRow.session_id, InteractionRow.position)


def of_session(owner: Owner) -> Select[InteractionRow]:
    return select(InteractionRow).filter_by(**owner._asdict())


def in_pages(database: Database) -> Iterator[Interaction]:
    """Every interaction, by owner and position. No transaction stays open between two pages."""
    page = select(InteractionRow).order_by(*PLACE).limit(ROWS_A_PAGE)
    after = page
    while True:
        with database.reading() as session:
            found = [to_interaction(row) for row in session.scalars(after)]
        yield from found
        if len(found) < ROWS_A_PAGE:
            return
        last = found[-1]
        after = page.where(tuple_(*PLACE) > tuple_(*owner_of(last), last.position))


def every_interaction(session: Session) -> Iterator[Interaction]:
    """The same of one moment, in the caller's transaction."""
    rows = select(InteractionRow).order_by(*PLACE).execution_options(yield_per=ROWS_A_PAGE)
    yield from map(to_interaction, session.scalars(rows))


def by_id(session: Session, interaction_ids: Iterable[str]) -> list[Interaction]:
    return list(map(to_interaction, scalars_in(session, select(InteractionRow), InteractionRow.id, interaction_ids)))


def latest(session: Session, owner: Owner) -> Interaction | None:
    row = session.scalars(of_session(owner).order_by(InteractionRow.position.desc()).limit(1)).first()
    return None if row is None else to_interaction(row)


def newest(session: Session, limit: int, user_id: str | None) -> list[Interaction]:
    """The latest replies of everybody or of one user, newest first."""
    chosen = select(InteractionRow).order_by(InteractionRow.created_utc.desc(), InteractionRow.id).limit(limit)
    if user_id is not None:
        chosen = chosen.where(InteractionRow.user_id == user_id)
    return list(map(to_interaction, session.scalars(chosen)))


def the_one(session: Session, kind: type[Named], start: str, what: str, see: str) -> Named:
    """By id or by the beginning of one; NotFound if that is too short or not the beginning of one alone."""
    one = f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
    if row := session.get(kind, checked_text(f"the id of {one}", start)):
        return row
    if len(start) < LEAST_OF_ID:
        raise NotFound(f"{start!r} is too short to name {one}: give {LEAST_OF_ID} letters of its id; see `{see}`")
    found = session.scalars(select(kind).where(kind.id.startswith(start, autoescape=True)).limit(2)).all()
    if len(found) != 1:
        raise NotFound(f"{'several' if found else 'no'} {what}s have an id that begins with {start!r}; see `{see}`")
    return found[0]


def before(session: Session, interaction: Interaction) -> Interaction | None:
    """The one before it in its session."""
    earlier = of_session(owner_of(interaction)).where(InteractionRow.position < interaction.position)
    row = session.scalars(earlier.order_by(InteractionRow.position.desc()).limit(1)).first()
    return None if row is None else to_interaction(row)


def asking(session: Session, interactions: Sequence[Interaction]) -> dict[str, str]:
    """By interaction, the one with the request that it answers: itself, unless it is a turn of tools."""
    found = {i.id: i.id for i in interactions if request_of(i.turn)}
    of_tools = {i.id for i in interactions} - found.keys()
    for owner in {owner_of(i) for i in interactions if i.id in of_tools}:
        request = None
        for said in map(to_interaction, session.scalars(of_session(owner).order_by(InteractionRow.position))):
            request = said.id if request_of(said.turn) else request
            if request and said.id in of_tools:
                found[said.id] = request
    return found


def feedback(session: Session, interaction_ids: Collection[str] | None = None) -> dict[str, list[Feedback]]:
    rows = select(FeedbackRow).order_by(FeedbackRow.created_utc, FeedbackRow.id)
    found: dict[str, list[Feedback]] = {}
    of = FeedbackRow.interaction_id
    for row in session.scalars(rows) if interaction_ids is None else scalars_in(session, rows, of, interaction_ids):
        found.setdefault(row.interaction_id, []).append(to_feedback(row))
    return found


def drafts(session: Session, interaction_ids: Iterable[str]) -> dict[str, list[Draft]]:
    found: dict[str, list[Draft]] = {}
    for row in scalars_in(session, select(DraftRow).order_by(DraftRow.id), DraftRow.interaction_id, interaction_ids):
        found.setdefault(row.interaction_id, []).append(to_draft(row))
    return found


def known(session: Session, interaction_ids: Iterable[str]) -> set[str]:
    """Those that are held."""
    return set(scalars_in(session, select(InteractionRow.id), InteractionRow.id, interaction_ids))


def memories(session: Session, ids: Iterable[str]) -> dict[str, Memory]:
    return {row.id: to_memory(row) for row in scalars_in(session, select(MemoryRow), MemoryRow.id, ids)}


def shown(session: Session, memory_ids: Collection[str], among: Iterable[ColumnElement[bool]] = ()) -> list[str]:
    """The interactions, of all or of those that these conditions are true of, whose reply was given one of these."""
    if not memory_ids:
        return []
    wanted, given = set(memory_ids), select(InteractionRow.id, InteractionRow.memory_ids)
    some = session.execute(given.where(cast(InteractionRow.memory_ids, String) != "[]", *among))
    return [i for i, ids in some if not wanted.isdisjoint(ids)]


def topics(session: Session, known: Sequence[TopicState], now: float, settings: DatasetSettings) -> list[Topic]:
    """The groups of the `known` topics, most recurrent first."""
    row, group_of = InteractionRow, groups(known)
    found = session.execute(select(row.topic_id, *PLACE[:3], row.created_utc).where(row.topic_id.is_not(None)))
    visits = [(group_of[str(topic_id)], tuple(owner), time) for topic_id, *owner, time in found]
    counted = recurrence(visits, now, settings.half_life_days, settings.max_user_recurrence)
    words = labels(known, group_of)
    made = [Topic(i, words[i], r.value, r.sessions, r.last_seen_utc) for i, r in counted.items()]
    return sorted(made, key=lambda topic: (-topic.recurrence, topic.id))


def agents_of(session: Session, user_id: str) -> list[str]:
    return list(session.scalars(select(MemoryRow.agent_id).where(MemoryRow.user_id == user_id).distinct()))


def topic_requests(session: Session, interaction_ids: Iterable[str]) -> dict[str, str]:
    """The request that founded the topic of each of these that is there and has one."""
    named = select(InteractionRow.id, InteractionRow.topic_id)
    topics = {i: topic for i, topic in rows_in(session, named, InteractionRow.id, interaction_ids) if topic}
    founding = {topic: earliest_request(session, topic) for topic in set(topics.values())}
    return {i: founding[topic] for i, topic in topics.items()}


def counts(session: Session) -> dict[str, int]:
    sources: dict[str, type[Base] | Subquery] = {
        "users": select(InteractionRow.user_id).distinct().subquery(),
        "sessions": select(*PLACE[:3]).distinct().subquery(),
        "interactions": InteractionRow,
        "feedback": FeedbackRow,
        "memories": MemoryRow,
        "topics": TopicRow,
        "snapshots": SnapshotRow,
        "adapters": AdapterRow,
    }
    return {name: session.scalars(select(func.count()).select_from(t)).one() for name, t in sources.items()}
