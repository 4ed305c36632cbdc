"""Bringing interactions into SQL: the state that a batch meets and the rows that it leaves, in one transaction.

The invariant: what replaces an unanswered turn takes over everything that referred to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, nextafter

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, insert, or_, select
from sqlalchemy.orm import Session

from ..errors import InputError, NotFound, Overtaken
from .conversations import (
    Conversation,
    Owner,
    Planned,
    Review,
    interactions_of,
    leaves_memory,
    owner_of,
    request_of,
    turn_memory_id,
)
from .corrections import remember_corrections
from .passages import of_turn
from .reading import before, by_id, known, memories
from .reading import drafts as read_drafts
from .rows import (
    ROWS_A_PAGE,
    chunks,
    delete_in,
    from_draft,
    from_interaction,
    from_memory,
    from_review,
    rows_in,
    scalars_in,
    to_interaction,
    to_memory,
    turn_memory,
)
from .stated_rows import rename_shown
from .tables import DraftRow, FeedbackRow, InteractionRow, MemoryRow, SnapshotSourceRow
from .topic_rows import TopicRows, release
from .types import Draft, Interaction, Memory

Vector = NDArray[np.float32]
Reviews = Sequence[tuple[str, Review, float]]  # interaction id, what was said of it, when

SESSIONS_A_QUERY = 200


@dataclass(frozen=True)
class Recorded:
    """What bringing in many conversations did; `errors` by index of conversation."""

    new: int
    known: int
    feedback_new: int
    errors: Mapping[int, InputError]
    forgotten: int = 0  # turns left out, since they were forgotten before


class Held:
    """The sessions that a batch touches, as they will be once all that was taken is written."""

    def __init__(self, session: Session, owners: Iterable[Owner]) -> None:
        self._sessions: dict[Owner, dict[int, Interaction]] = {owner: {} for owner in owners}
        self.new: dict[str, Interaction] = {}
        self.replaced: dict[str, str] = {}  # held id: new id
        self.reviews: list[tuple[str, Review, float]] = []
        self.known = self.left_out = 0
        self.forgotten: Collection[str] = ()
        self.to_inherit: set[Owner] = set()  # sessions in which turns of tools may have another request before them
        for found in _of_sessions(session, self._sessions):
            self.rows(owner_of(found))[found.position] = found
        self.rated = rated(session, [i.id for rows in self._sessions.values() for i in rows.values() if not i.reply])

    def rows(self, owner: Owner) -> dict[int, Interaction]:
        return self._sessions[owner]

    def take(self, planned: Planned) -> None:
        self.known, self.left_out = self.known + planned.known, self.left_out + planned.forgotten
        if planned.new:
            owner, place = owner_of(planned.new[0]), planned.new[0].position
            if planned.forgotten or place < max(self.rows(owner), default=0):
                self.to_inherit.add(owner)
        for old, new in planned.replaced.items():
            if self.new.pop(old, None) is None:
                self.replaced[old] = new
            else:  # it came with this batch, perhaps in place of a held one
                self.replaced |= {first: new for first, second in self.replaced.items() if second == old}
        for interaction in planned.new:
            self.new[interaction.id] = interaction
            self.rows(owner_of(interaction))[interaction.position] = interaction
        self.reviews += planned.reviews
        self.rated |= {interaction_id for interaction_id, _, _ in planned.reviews}


def rated(session: Session, interaction_ids: Sequence[str]) -> frozenset[str]:
    """Those that somebody gave feedback on."""
    column = FeedbackRow.interaction_id
    return frozenset(scalars_in(session, select(column), column, interaction_ids))


def new_texts(session: Session, conversations: Iterable[Conversation]) -> list[str]:
    """What has to be embedded of them: the texts of turns that are not held yet."""
    cut = [made for conversation in conversations for made, _ in interactions_of(conversation)]
    held = known(session, [made.id for made in cut])
    new = (made for made in cut if made.id not in held and leaves_memory(made))
    return [text for made in new for text in of_turn(made).texts]


def insert_interactions(
    session: Session, new: Sequence[Interaction], vectors: Mapping[str, Vector], topics: TopicRows, now: float
) -> list[Interaction]:
    """Write the interactions with their topics, and the memories that they leave."""
    ordered = sorted(new, key=lambda i: (owner_of(i), i.position))
    asked = [i for i in ordered if request_of(i.turn)]
    matrix = np.stack([vectors[i.text] for i in asked]) if asked else np.zeros((0, 0), dtype=np.float32)
    found = topics.assign(session, [i.text for i in asked], matrix, now)
    written = _with_topics(session, ordered, dict(zip((i.id for i in asked), found, strict=True)))
    if written:
        session.execute(insert(InteractionRow), [from_interaction(i) for i in written])
    if remembered := [from_memory(turn_memory(i)) for i in ordered if leaves_memory(i)]:
        session.execute(insert(MemoryRow), remembered)
    return written


def insert_missing_memories(session: Session, interactions: Iterable[Interaction]) -> None:
    """Write the memories that these turns should have left and that are not there."""
    left = (turn_memory(i) for i in interactions if leaves_memory(i))
    while some := {memory.id: memory for memory in islice(left, ROWS_A_PAGE)}:
        if missing := [from_memory(some[i]) for i in some.keys() - memories(session, some).keys()]:
            session.execute(insert(MemoryRow), missing)


def insert_reviews(session: Session, reviews: Reviews, now: float) -> int:
    """Write the feedback that is not known yet and say how much it was.

    A file dates what was said of a reply by the reply; where something else was said by then, what is new came `now`.
    """
    rows = {row["id"]: row for row in (from_review(*review) for review in reviews)}
    for held in scalars_in(session, select(FeedbackRow.id), FeedbackRow.id, rows):
        del rows[held]
    latest = _latest_said(session, {row["interaction_id"] for row in rows.values()})
    for row in rows.values():
        if (last := latest.get(row["interaction_id"], -inf)) >= row["created_utc"]:
            row["created_utc"] = max(now, nextafter(last, inf))
        latest[row["interaction_id"]] = row["created_utc"]  # of several in one file the last one counts
    if rows:
        session.execute(insert(FeedbackRow), list(rows.values()))
        remember_corrections(session, {row["interaction_id"] for row in rows.values()})
    return len(rows)


def latest_moment(session: Session, interaction_id: str, now: float) -> float:
    """`now`, or just after what was last said of it where a clock was set back, so that the last word counts."""
    last = _latest_said(session, [interaction_id]).get(interaction_id, -inf)
    return nextafter(last, inf) if last >= now else now


def _latest_said(session: Session, interaction_ids: Collection[str]) -> dict[str, float]:
    """When the last feedback was given, by interaction."""
    of = FeedbackRow.interaction_id
    return dict(rows_in(session, select(of, func.max(FeedbackRow.created_utc)).group_by(of), of, interaction_ids))


def insert_drafts(session: Session, drafts: Sequence[Draft]) -> int:
    """Write those that are new and whose prompt is held: every source, and all memories that its turn was shown."""
    sources = {i.id: i for i in by_id(session, {s for draft in drafts for s in draft.source_ids})}
    shown = memories(session, {m for i in sources.values() for m in i.memory_ids})
    whole = {i for i, interaction in sources.items() if shown.keys() >= set(interaction.memory_ids)}
    kept = [d for d in drafts if d.interaction_id in whole and sources.keys() >= set(d.source_ids)]
    held = {draft.id for found in read_drafts(session, sources).values() for draft in found}
    new = {d.id: from_draft(d) for d in kept if d.id not in held}
    if new:
        session.execute(insert(DraftRow), list(new.values()))
    return len(new)


def remove_replaced(
    session: Session, gone: Sequence[Interaction], replaced: Mapping[str, str], vectors: Mapping[str, Vector]
) -> None:
    """Delete unanswered rows with their memories and places in topics; notes made from them follow their successors."""
    memories = {turn_memory_id(i.id): turn_memory_id(replaced[i.id]) for i in gone}
    delete_in(session, MemoryRow.id, memories)
    delete_in(session, InteractionRow.id, [i.id for i in gone])
    first = min(i.created_utc for i in gone)
    for users in chunks(sorted({i.user_id for i in gone})):
        rename_shown(session, memories, among=(InteractionRow.user_id.in_(users), InteractionRow.created_utc >= first))
        _follow_notes(session, users, replaced)
        _follow_drafts(session, users, replaced)
    _follow_snapshots(session, replaced)
    release(session, gone, vectors)


def _follow_notes(session: Session, users: Sequence[str], replaced: Mapping[str, str]) -> None:
    notes = select(MemoryRow.id, MemoryRow.source_ids).where(MemoryRow.kind == "note", MemoryRow.user_id.in_(users))
    for note_id, sources in session.execute(notes).all():
        if not replaced.keys().isdisjoint(sources):
            session.get_one(MemoryRow, note_id).source_ids = [replaced.get(i, i) for i in sources]


def _follow_drafts(session: Session, users: Sequence[str], replaced: Mapping[str, str]) -> None:
    """What the base wrote to a prompt that held them falls with them."""
    theirs = select(InteractionRow.id).where(InteractionRow.user_id.in_(users))
    for row in session.scalars(select(DraftRow).where(DraftRow.interaction_id.in_(theirs))).all():
        if not replaced.keys().isdisjoint(row.source_ids):
            row.source_ids = [replaced.get(i, i) for i in row.source_ids]


def _follow_snapshots(session: Session, replaced: Mapping[str, str]) -> None:
    """Forgetting a turn finds the snapshots that were made of it before it was answered.

    Their rows keep the id that it had, since they are hashed: `answered_since` finds the turn by it.
    """
    for row in list(scalars_in(session, select(SnapshotSourceRow), SnapshotSourceRow.interaction_id, replaced)):
        session.merge(SnapshotSourceRow(snapshot_id=row.snapshot_id, interaction_id=replaced[row.interaction_id]))
        session.delete(row)


def check_shown(session: Session, last: Interaction | None, after: Sequence[str], memory_ids: Sequence[str]) -> None:
    """That what a reply was shown is there, and nothing came after it; else it would stand where it was not said."""
    if (last.id if last else None) != (after[-1] if after else None):
        raise Overtaken("another turn of this session was kept or forgotten meanwhile; nothing was recorded, ask again")
    if len(by_id(session, after)) < len(after) or len(memories(session, memory_ids)) < len(set(memory_ids)):
        raise Overtaken("what the reply was shown was forgotten meanwhile; nothing was recorded, ask again")


def check_sources(session: Session, note: Memory) -> None:
    """A note is made from interactions of its own user, so that forgetting them reaches it."""
    held = {i.id for i in by_id(session, note.source_ids) if i.user_id == note.user_id}
    if missing := sorted(set(note.source_ids) - held):
        raise NotFound(f"user {note.user_id!r} has no interaction {', '.join(missing)}; the note was not kept")


def end_note(session: Session, replaced: str, note: Memory) -> None:
    """From then on `note` holds in place of that one."""
    row = session.get(MemoryRow, replaced)
    if row is None or (row.kind, row.user_id) != ("note", note.user_id):
        raise NotFound(f"user {note.user_id!r} has no note {replaced}; the note was not kept")
    if row.id == note.id:
        raise InputError(f"the note says the same as {replaced}, which it replaces")
    if (row.shared, row.agent_id) != (note.shared, note.agent_id):  # else it would be taken from those who see it
        seen = "shared" if row.shared else f"of agent {row.agent_id!r}"
        raise InputError(f"the note {replaced} is {seen}; only one that is, too, replaces it")
    if row.valid_to is None:
        row.valid_to = max(row.created_utc, note.created_utc)


def hold_again(session: Session, note: Memory) -> Memory:
    """The one that is known by this id, which holds from now on if it had been replaced."""
    row = session.get_one(MemoryRow, note.id)
    if row.valid_to is not None:
        row.created_utc, row.valid_to, row.indexed = note.created_utc, None, False
    return to_memory(row)


def add_sources(session: Session, note: Memory) -> Memory | None:
    """The note that is known by this id, if there is one, with the sources of both: it falls with any of them."""
    if known := session.get(MemoryRow, note.id):
        known.source_ids = list(dict.fromkeys([*known.source_ids, *note.source_ids]))
        return to_memory(known)
    return None


def _with_topics(session: Session, ordered: Sequence[Interaction], assigned: Mapping[str, str]) -> list[Interaction]:
    """Each with its topic; a turn of tools has that of the request it answers, in this batch or before it."""
    written: list[Interaction] = []
    for interaction in ordered:
        last = written[-1] if written and owner_of(written[-1]) == owner_of(interaction) else None
        if topic_id := assigned.get(interaction.id):
            written.append(replace(interaction, topic_id=topic_id))
        elif last is not None and last.position == interaction.position - 1:
            written.append(replace(interaction, topic_id=last.topic_id))
        else:
            earlier = before(session, interaction)
            written.append(replace(interaction, topic_id=earlier.topic_id if earlier else None))
    return written


def _of_sessions(session: Session, owners: Iterable[Owner]) -> Iterator[Interaction]:
    remaining = iter(owners)
    while some := list(islice(remaining, SESSIONS_A_QUERY)):
        row = InteractionRow
        wanted = (
            and_(row.user_id == o.user_id, row.agent_id == o.agent_id, row.session_id == o.session_id) for o in some
        )
        yield from map(to_interaction, session.scalars(select(row).where(or_(*wanted))))
