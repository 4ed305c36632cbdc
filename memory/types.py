"""The nouns of memory: frozen values without I/O.

Times are `*_utc`: seconds since 1970 in UTC, as float. Owners are the same three everywhere: `user_id`, `agent_id`
(empty = no agent of its own) and `session_id`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..content import Message

DEFAULT_USER = "default"

MemoryKind = Literal["turn", "note", "fact", "preference", "correction"]
OF_TURNS: tuple[MemoryKind, ...] = ("turn", "correction")  # in which the user asked and was answered
FeedbackEvent = Literal["copied", "accepted", "regenerated", "edited"]


@dataclass(frozen=True)
class Interaction:
    """One turn and our reply.

    `turn` holds the messages since the previous reply of the session (usually one user message; also system and tool
    messages); `text` is the request being answered, the latest user message of the session. The full prompt is the
    turns and replies of the session up to `position`. Text that memory injected stands in neither: only `memory_ids`.
    """

    id: str
    user_id: str
    agent_id: str
    session_id: str
    position: int
    turn: tuple[Message, ...]
    text: str
    reply: str
    created_utc: float
    adapter_id: str | None = None
    memory_ids: tuple[str, ...] = ()
    topic_id: str | None = None


@dataclass(frozen=True)
class Feedback:
    """What a person said of a reply or did with it; any of the four may be missing.

    `rating` is in [-1, 1], a thumb is ±1. `event`: the app saw the reply `copied`, `accepted` (used as it stands),
    `regenerated` (another one was asked for) or `edited`, into what `correction` says then.
    """

    id: str
    interaction_id: str
    rating: float | None
    correction: str | None
    comment: str | None
    created_utc: float
    event: FeedbackEvent | None = None


@dataclass(frozen=True)
class Draft:
    """An answer that the base wrote by night to a remembered prompt, and nobody was given.

    `source_ids`: the interaction whose prompt it is, and every other whose words are in that prompt.
    """

    id: str
    interaction_id: str
    text: str
    base_id: str
    source_ids: tuple[str, ...]
    created_utc: float


@dataclass(frozen=True)
class Memory:
    """A stored unit: a `turn` made from an interaction, a `correction` of its reply, a `note` that somebody asked to be
    remembered, or a `fact` or `preference` that a user stated of a `subject`. A statement or a correction holds from
    `created_utc` to `valid_to`, and a note until it is replaced; None: it still does. The sources of a statement are
    the turns that said so, as many as it was repeated.
    """

    id: str
    user_id: str
    agent_id: str
    session_id: str
    kind: MemoryKind
    text: str
    created_utc: float
    source_ids: tuple[str, ...] = ()
    shared: bool = False
    subject: str = ""
    valid_to: float | None = None

    def held(self, as_of: float | None) -> bool:
        """Whether it held at that time, or holds now."""
        began = as_of is None or self.created_utc <= as_of
        return began and (self.valid_to is None or (as_of is not None and as_of < self.valid_to))


@dataclass(frozen=True)
class Recall:
    memory: Memory
    score: float  # in [0, 1]
    parts: dict[str, float]  # why it was found: score by part


@dataclass(frozen=True)
class Signal:
    """One piece of evidence, `value` in [-1, 1]."""

    name: str
    value: float


@dataclass(frozen=True)
class Satisfaction:
    """How one interaction went: `score` in [-1, 1], `confidence` in [0, 1]. `censor` is the version that scored it."""

    interaction_id: str
    score: float
    confidence: float
    signals: tuple[Signal, ...]
    explicit: bool
    censor: str  # see `signals.censor_id`


@dataclass(frozen=True)
class Topic:
    """What people keep asking. `recurrence` is the decayed count over distinct sessions."""

    id: str
    label: str
    recurrence: float
    sessions: int
    last_seen_utc: float


@dataclass(frozen=True)
class Selection:
    """What to forget. Owner and time narrow; ids and what a query finds are joined; without both, all of the scope.

    Ids that are given and empty are none, and not all of the scope.
    """

    user_id: str | None = None
    session_id: str | None = None
    before_utc: float | None = None
    interaction_ids: tuple[str, ...] | None = None
    memory_ids: tuple[str, ...] | None = None
    query: str | None = None


@dataclass(frozen=True)
class ForgetPlan:
    """What a `forget` would erase and taint. `token` is the content id of all that would go, and good for that only."""

    token: str
    selection: Selection
    interaction_ids: tuple[str, ...]
    memory_ids: tuple[str, ...]
    feedback_ids: tuple[str, ...]
    user_ids: tuple[str, ...]  # whose it is
    exports: tuple[str, ...]  # files of ours in the home that may hold it
    tainted_snapshots: tuple[str, ...]
    tainted_adapters: tuple[str, ...]


@dataclass(frozen=True)
class ForgetReceipt:
    """What one `forget` erased, and what was made of it, tainted: snapshots keep the ids, adapters their manifests."""

    interactions: int
    memories: int
    feedback: int
    tainted_snapshots: tuple[str, ...]
    tainted_adapters: tuple[str, ...]
    exports: tuple[str, ...] = ()
