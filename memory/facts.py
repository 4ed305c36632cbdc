"""What SQL holds, to be read: turns, feedback, memories, topics.

The invariant: nothing here writes, and nothing needs the embedder or the index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from sqlalchemy import select

from ..errors import NotFound
from ..settings import Settings
from . import reading
from .conversations import Owner, checked_kind, checked_limit, checked_owner, checked_text, owner_of
from .database import Database
from .grouping import groups
from .rows import to_interaction, to_memory
from .stated_rows import statements_of
from .tables import InteractionRow, MemoryRow
from .topic_rows import states
from .types import Draft, Feedback, Interaction, Memory, MemoryKind, Topic


class Facts:
    def __init__(self, database: Database, settings: Settings, dimension: int) -> None:
        self.database, self.settings = database, settings
        self._dimension = dimension  # of the centroids of topics

    def interaction(self, interaction_id: str) -> Interaction:
        with self.database.reading() as session:
            row = session.get(InteractionRow, interaction_id)
            if row is None:
                raise NotFound(f"no interaction {interaction_id}; see `nightschool audit answers`")
            return to_interaction(row)

    def id_of(self, start: str) -> str:
        """The id of the one interaction whose id begins with `start`; NotFound if it is not one alone."""
        with self.database.reading() as session:
            return reading.the_one(session, InteractionRow, start, "interaction", "nightschool audit answers").id

    def newest(self, limit: int, *, user_id: str | None = None) -> list[Interaction]:
        """The latest `limit` interactions of everybody or of one user, newest first."""
        with self.database.reading() as session:
            return reading.newest(session, limit, user_id)

    def knows(self, user_id: str) -> bool:
        """Whether anything is held of that user."""
        of = [select(row.id).where(row.user_id == user_id).limit(1) for row in (InteractionRow, MemoryRow)]
        with self.database.reading() as session:
            return any(session.scalars(rows).first() is not None for rows in of)

    def users(self) -> set[str]:
        """Of whom something is held."""
        of = [select(row.user_id).distinct() for row in (InteractionRow, MemoryRow)]
        with self.database.reading() as session:
            return {user for rows in of for user in session.scalars(rows)}

    def interactions(self) -> Iterator[Interaction]:
        """Every interaction of everybody, session by session, in order; read in pages."""
        return reading.in_pages(self.database)

    def session_of(self, interaction_id: str) -> list[Interaction]:
        """Every interaction of its session, in order; NotFound if it is not held."""
        rows = reading.of_session(owner_of(self.interaction(interaction_id))).order_by(InteractionRow.position)
        with self.database.reading() as session:
            return [to_interaction(row) for row in session.scalars(rows)]

    def latest_interactions(self, user_id: str, agent_id: str, session_id: str, most: int) -> list[Interaction]:
        """The last `most` of a session, in order."""
        with self.database.reading() as session:
            rows = reading.of_session(Owner(user_id, agent_id, session_id)).order_by(InteractionRow.position.desc())
            return [to_interaction(row) for row in session.scalars(rows.limit(most))][::-1]

    def first_interaction(self, user_id: str, agent_id: str, session_id: str) -> Interaction | None:
        """The one that a session begins with, of those that are held."""
        with self.database.reading() as session:
            rows = reading.of_session(Owner(user_id, agent_id, session_id)).order_by(InteractionRow.position)
            return next(map(to_interaction, session.scalars(rows.limit(1))), None)

    def feedback(self, interaction_ids: Collection[str] | None = None) -> dict[str, list[Feedback]]:
        """All feedback by interaction, oldest first; or that on some."""
        with self.database.reading() as session:
            return reading.feedback(session, interaction_ids)

    def drafts(self, interaction_ids: Iterable[str]) -> dict[str, list[Draft]]:
        """What the base wrote by night to the prompts of these interactions, by interaction."""
        with self.database.reading() as session:
            return reading.drafts(session, interaction_ids)

    def history(self, *, user_id: str, agent_id: str = "", subject: str | None = None) -> list[Memory]:
        """What this user stated of each subject, in order of time: what holds and what held before."""
        checked_owner(user_id, agent_id, "")
        if subject is not None:
            checked_text("subject", subject)
        with self.database.reading() as session:
            return statements_of(session, user_id, agent_id, subject)

    def memories(self, ids: Iterable[str]) -> dict[str, Memory]:
        """Those of `ids` that exist."""
        with self.database.reading() as session:
            return reading.memories(session, ids)

    def memories_of(
        self, user_id: str, *, agent_id: str | None = None, kind: MemoryKind | None = None, limit: int
    ) -> list[Memory]:
        """The latest `limit` memories of this user, of all agents or of one, newest first."""
        checked_owner(user_id, agent_id or "", "")
        wanted = {"user_id": user_id, "agent_id": agent_id, "kind": checked_kind(kind)}
        rows = select(MemoryRow).filter_by(**{name: value for name, value in wanted.items() if value is not None})
        latest = rows.order_by(MemoryRow.created_utc.desc(), MemoryRow.id).limit(checked_limit(limit))
        with self.database.reading() as session:
            return list(map(to_memory, session.scalars(latest)))

    def sort_ids(self, ids: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those that name memories apart from those that name interactions, or nothing: (interactions, memories)."""
        held = self.memories(ids)
        return tuple(i for i in ids if i not in held), tuple(i for i in ids if i in held)

    def topics(self, now: float) -> list[Topic]:
        """What people keep asking, most recurrent first."""
        with self.database.moment() as session:
            known = states(session, self._dimension)
            return reading.topics(session, known, now, self.settings.dataset)

    def topic_groups(self) -> dict[str, str]:
        """Which of `topics` each interaction's own, narrow topic belongs to, by id."""
        with self.database.reading() as session:
            return groups(states(session, self._dimension))

    def held(self, interaction_ids: Iterable[str]) -> set[str]:
        """Those of these interactions that are held."""
        with self.database.reading() as session:
            return reading.known(session, interaction_ids)

    def topic_requests(self, interaction_ids: Iterable[str]) -> dict[str, str]:
        """The request that founded the topic of each of these; those without a topic or forgotten are missing."""
        with self.database.reading() as session:
            return reading.topic_requests(session, interaction_ids)

    def counts(self) -> dict[str, int]:
        with self.database.reading() as session:
            return reading.counts(session)
