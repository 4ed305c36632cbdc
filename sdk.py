"""What an application embeds: an assistant that answers, remembers and listens. It never trains.

The invariant: each reply is recorded with the adapter that gave it and the memories it was shown, before it is
returned.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import inf
from pathlib import Path
from secrets import randbits
from threading import Condition, Event, Lock, RLock, get_ident
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakSet, WeakValueDictionary

from .content import Message
from .errors import InputError, NotFound, Overtaken, ServingError, StoreError, Unerased
from .memory.conversations import Owner, checked_ids, checked_new_owner, checked_text, fault_of
from .memory.prompt import REACH, opening_out_of_reach, prompt_of
from .memory.types import (
    DEFAULT_USER,
    Feedback,
    FeedbackEvent,
    ForgetPlan,
    ForgetReceipt,
    Interaction,
    Memory,
    MemoryKind,
    Recall,
)
from .replies import Listener, Reply, ReplyStream
from .settings import ServingSettings, Settings, folder_of, load_settings

if TYPE_CHECKING:
    from .evolve.live import Live
    from .evolve.registry import Registry
    from .memory.store import MemoryStore
    from .serving.engine import Engine

log = logging.getLogger("nightschool")
AT_HAND = 2000  # characters of a session's end that every base has room for, beside notes
LOOK_S = 0.2  # between two looks whether a reply that waits is still wanted
MOST_WAITING = 8  # turns of one session, the one that is answered with them
MOST_LISTED = 1000  # memories of one user, unless more are asked for


@dataclass
class _Turns:
    """The queue of one session: its turns are answered one at a time, in the order in which they came."""

    moved: Condition = field(default_factory=Condition)
    threads: deque[int] = field(default_factory=deque)  # the first has the turn

    def has(self, thread: int) -> bool:
        return bool(self.threads) and self.threads[0] == thread

    def queue(self, thread: int, most: float) -> bool:
        """Join the line. False if this thread has the turn: an engine that records while it answers must not wait."""
        with self.moved:
            if self.has(thread):
                return False
            if len(self.threads) >= most:
                raise ServingError(f"{most} turns of this session wait for an answer already; ask again after them")
            self.threads.append(thread)
            return True

    def leave(self, thread: int) -> None:
        with self.moved:
            self.threads.remove(thread)
            self.moved.notify_all()


def open(
    home: Path | str | None = None, *, settings: Settings | None = None, engine: Engine | None = None
) -> Assistant:
    """An assistant over the memory in `home` (default: NIGHTSCHOOL_HOME, else ~/.nightschool), made if missing."""
    from .evolve.registry import Registry
    from .memory.store import MemoryStore

    if settings is None:
        settings = load_settings(home)
    elif home is not None and folder_of(home).resolve() != settings.home.resolve():
        raise InputError(f"home is {home}, and settings.home {settings.home}; give one of them")
    store = MemoryStore(settings)
    registry = Registry.of(store)
    try:
        _withdraw(registry)  # what a crash interrupted
    except BaseException:
        store.close()
        raise
    return Assistant(settings, store, registry, engine)


class Assistant:
    """Answers with the live adapter, remembers, and listens. One may be shared by threads.

    `reply` and `record` without `session_id` belong to this object's own session, what has no `user_id` to the default
    user.
    """

    def __init__(
        self, settings: Settings, store: MemoryStore, registry: Registry, engine: Engine | None = None
    ) -> None:
        self.settings, self.store, self.registry = settings, store, registry
        self._engine = engine
        self._opened_engine: Engine | None = None  # by us, so ours to close
        self._opening = RLock()
        self._unopened: tuple[ServingError | None, float] = None, 0.0  # why the engine could not be, and when
        self._live: Live | None = None
        self._session_id = uuid4().hex
        self._turns: WeakValueDictionary[tuple[str, ...], _Turns] = WeakValueDictionary()  # that are being answered
        self._naming = Lock()  # of `_turns`
        self._streams: WeakSet[ReplyStream] = WeakSet()  # that somebody may still read

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for stream in list(self._streams):
            stream.close()
        self.store.close()
        if self._opened_engine:
            self._opened_engine.close()

    @property
    def engine(self) -> Engine:
        """The serving engine, loaded when first needed. Who waited while another call tried that fails with it."""
        asked = time.monotonic()
        with self._opening:
            if self._engine is None:
                error, failed = self._unopened
                if error and failed > asked:
                    raise ServingError(str(error)) from error
                self._engine = self._opened_engine = self._open_engine()
            return self._engine

    def _open_engine(self) -> Engine:
        try:
            return _opened(self.settings.serving)
        except ServingError as error:
            self._unopened = error, time.monotonic()
            raise

    def _following(self) -> Live:
        """The live adapter in `engine`."""
        from .evolve.live import Live

        engine = self.engine  # not under the lock, where nobody sees how long another has waited
        with self._opening:
            if self._live is None:
                self._live = Live(self.registry, engine, self.settings.serving.parity_tolerance)
            return self._live

    # -- the day ---

    def reply(
        self, text: str, *, user_id: str = DEFAULT_USER, agent_id: str = "", session_id: str | None = None
    ) -> Reply:
        """Answer `text` in its session, with what memory knows, and record both.

        ServingError if the engine has no whole answer after `serving.timeout_seconds`, or an empty one, StoreError if
        what it was shown was forgotten meanwhile; then nothing is recorded. Turns of one session are answered one after
        another. While another process makes the index anew, it answers without notes, and the log tells.
        """
        return self._reply(text, user_id, agent_id, session_id, Listener())

    def stream(
        self, text: str, *, user_id: str = DEFAULT_USER, agent_id: str = "", session_id: str | None = None
    ) -> ReplyStream:
        """`reply`, in pieces as they come: `with assistant.stream(...) as answer: for piece in answer: ...`.

        `answer.reply` is what `reply` returns, once they have ended. Left before, the answer is broken off.
        """
        stream = ReplyStream(partial(self._reply, text, user_id, agent_id, session_id))
        self._streams.add(stream)
        return stream

    def _reply(self, text: str, user_id: str, agent_id: str, session_id: str | None, listener: Listener) -> Reply:
        """An answer that nobody saw to its end is no part of the session."""
        if not checked_text("text", text).strip():
            raise InputError("reply: text is empty; give the user's words")
        owner = self._owner(user_id, agent_id, session_id)
        turn: list[Message] = [{"role": "user", "content": text}]
        with self._turn_of(owner, listener.dropped):
            self.store.require_index()  # what could not be recorded is not answered
            earlier = self.store.latest_interactions(*owner, REACH)
            opening = self._out_of_reach(owner, earlier)
            memories = self._known(text, user_id, agent_id, earlier)
            prompt = prompt_of(opening, earlier, turn, [m.text for m in memories])
            with self._following().hold() as adapter_id:
                answer = self._said(prompt, adapter_id, listener)
            if not answer.strip():
                raise ServingError(f"{adapter_id or 'the base'} answered nothing, so nothing was recorded; ask again")
            listener.heard_all(self.settings.serving.timeout_seconds or inf)
            _require_wanted(listener.dropped)
            shown: dict[str, Any] = {
                "memory_ids": [m.id for m in memories],
                "after": [i.id for i in (*opening, *earlier)],
            }
            shown["check"] = partial(self._check_still, memories, adapter_id, listener.dropped)
            kept = self.store.record(turn, answer, **owner._asdict(), adapter_id=adapter_id, **shown)
        return Reply(answer, kept.id, owner.session_id, adapter_id, kept.memory_ids)

    def _out_of_reach(self, owner: Owner, earlier: Sequence[Interaction]) -> list[Interaction]:
        return opening_out_of_reach(self.store.first_interaction(*owner) if len(earlier) == REACH else None, earlier)

    def _check_still(self, memories: Sequence[Memory], adapter_id: str | None, dropped: Event) -> None:
        """While it is written: somebody still wants it, and nothing that made it was forgotten meanwhile."""
        _require_wanted(dropped)
        held = self.store.memories([m.id for m in memories])
        # of a statement another turn may say the same in other words, and by the same id
        if any(m.id in held and held[m.id].text != m.text for m in memories) or adapter_id in self.registry.tainted():
            raise Overtaken(
                "what the reply was made from changed or was forgotten meanwhile; nothing was recorded, ask again"
            )

    def _owner(self, user_id: str, agent_id: str, session_id: str | None) -> Owner:
        """Of a turn: in this object's own session where none is named."""
        owner = checked_new_owner(user_id, agent_id, self._session_id if session_id is None else session_id)
        if not owner.session_id:
            raise InputError("session_id is empty; name one, or leave it out")
        return owner

    def _said(self, prompt: Sequence[Message], adapter_id: str | None, listener: Listener) -> str:
        """What the engine answers, which ends it where it is not wanted any more."""
        from .serving.engine import Sampling

        serving, said = self.settings.serving, list[str]()
        seed = randbits(31)  # one for all would draw the same answer for everybody
        sampling = Sampling(serving.max_tokens, serving.temperature, seed=seed, timeout_s=serving.timeout_seconds)
        with closing(self.engine.stream(prompt, adapter=adapter_id, sampling=sampling)) as pieces:
            for piece in pieces:
                _require_wanted(listener.dropped)
                _require_sound(piece, adapter_id)
                listener.hear(piece)
                said.append(piece)
        return "".join(said)

    def _turns_of(self, owner: Owner) -> _Turns:
        with self._naming:
            return self._turns.setdefault(owner, _Turns())

    @contextmanager
    def _turn_of(self, owner: Owner, dropped: Event, most: float = MOST_WAITING) -> Iterator[None]:
        """Held while one is answered: the next turn of a session is answered, and recorded, after this one."""
        turns, thread = self._turns_of(owner), get_ident()
        queued = turns.queue(thread, most)
        try:
            self._await_turn(turns, thread, dropped)
            yield
        finally:
            if queued:
                turns.leave(thread)

    def _await_turn(self, turns: _Turns, thread: int, dropped: Event) -> None:
        seconds = self.settings.serving.timeout_seconds
        until = time.monotonic() + (seconds or inf)
        with turns.moved:
            while not turns.has(thread):
                _require_wanted(dropped)
                if (left := until - time.monotonic()) <= 0:
                    raise ServingError(
                        f"the turn before is still being answered after {seconds:g} s (serving.timeout_seconds)"
                    )
                turns.moved.wait(min(LOOK_S, left))
        _require_wanted(dropped)

    def _known(self, text: str, user_id: str, agent_id: str, earlier: Sequence[Interaction]) -> list[Memory]:
        """What memory holds on `text` beside what the last turns say, which stand in the prompt whatever its room."""
        if not self.settings.memory.recall_limit:
            return []
        latest = earlier[::-1]
        sizes = accumulate(sum(len(m["content"]) for m in i.turn) + len(i.reply) for i in latest)
        at_hand = [i.id for i, size in zip(latest, sizes, strict=True) if size <= AT_HAND]
        try:
            found = self.store.recall(text, user_id=user_id, agent_id=agent_id, beside=at_hand)
        except StoreError as error:
            log.warning("answering without what memory holds: %s", error)
            return []
        return [r.memory for r in found]

    def record(
        self,
        turn: str | Sequence[Message],
        reply: str,
        *,
        user_id: str = DEFAULT_USER,
        agent_id: str = "",
        session_id: str | None = None,
        memory_ids: Sequence[str] = (),
        created_utc: float | None = None,
    ) -> Interaction:
        """Keep a turn that something else answered. `created_utc`: seconds since 1970, default now.

        `memory_ids` are of the memories that it was shown, so that the reply is traced to them, and teaches nothing
        once one of them is forgotten; NotFound for one that the user cannot see. It waits for its turn in the session
        as `reply` does, and ServingError tells where that lasts too long.
        """
        messages: Sequence[Message] = [{"role": "user", "content": turn}] if isinstance(turn, str) else turn
        owner = self._owner(user_id, agent_id, session_id)
        with self._turn_of(owner, Event(), inf):  # not between what a reply is shown and its record
            shown = checked_ids("memory_ids", memory_ids) or ()
            check = partial(self._check_visible, shown, user_id, agent_id)
            given: dict[str, Any] = {"memory_ids": shown, "created_utc": created_utc, "check": check}
            return self.store.record(messages, reply, **owner._asdict(), **given)

    def _check_visible(self, memory_ids: Sequence[str], user_id: str, agent_id: str) -> None:
        """As `recall` sees it: the user's own with this agent or with none, and what is shared."""
        held = self.store.memories(memory_ids)
        own = (user_id, agent_id), (user_id, "")
        visible = {i for i, memory in held.items() if memory.shared or (memory.user_id, memory.agent_id) in own}
        if missing := sorted(set(memory_ids) - visible):
            raise NotFound(f"user {user_id!r} has no memory {', '.join(missing)}; nothing was recorded")

    def rate(
        self,
        reply: Reply | Interaction | str,
        rating: float | None = None,
        *,
        correction: str | None = None,
        comment: str | None = None,
        event: FeedbackEvent | None = None,
        user_id: str | None = None,
    ) -> Feedback:
        """What a person said of a reply: `rating` in [-1, 1] (a thumb is ±1), the answer they wanted, or a comment.

        Or did with it, `event`: "copied", "accepted", "edited" (into `correction`) or "regenerated"; then ask for the
        other reply by the same request in the same session. Give `user_id` where the id comes from outside: NotFound
        if the reply was given to somebody else.
        """
        interaction_id = reply.id if isinstance(reply, Reply | Interaction) else reply
        return self.store.rate(
            interaction_id, rating=rating, correction=correction, comment=comment, event=event, user_id=user_id
        )

    def remember(
        self,
        text: str,
        *,
        user_id: str = DEFAULT_USER,
        agent_id: str = "",
        session_id: str = "",
        shared: bool = False,
        source_ids: Sequence[str] = (),
        replaces: str | None = None,
        created_utc: float | None = None,
    ) -> Memory:
        """Keep a note. Private to the user unless `shared`.

        It falls with any of `source_ids`, the turns of theirs that it is made from, and is recalled in place of the
        note of theirs that it `replaces`. `created_utc`: seconds since 1970, default now.
        """
        return self.store.remember(
            text,
            user_id=user_id,
            agent_id=agent_id,
            session_id=session_id,
            shared=shared,
            source_ids=source_ids,
            replaces=replaces,
            created_utc=created_utc,
        )

    def recall(
        self,
        query: str,
        *,
        user_id: str = DEFAULT_USER,
        agent_id: str = "",
        session_id: str | None = None,
        kind: MemoryKind | None = None,
        since: float | None = None,
        until: float | None = None,
        as_of: float | None = None,
        limit: int | None = None,
        threshold: float | None = None,
    ) -> list[Recall]:
        """What memory holds on `query`, best first; nothing below the threshold, by default that of the settings.

        Of all sessions unless one is given; from `since` to before `until`, or as if it were the time `as_of` (seconds
        since 1970).
        """
        return self.store.recall(
            query,
            user_id=user_id,
            agent_id=agent_id,
            session_id=session_id,
            kind=kind,
            since=since,
            until=until,
            as_of=as_of,
            limit=limit,
            threshold=threshold,
        )

    def memories(
        self,
        *,
        user_id: str = DEFAULT_USER,
        agent_id: str | None = None,
        kind: MemoryKind | None = None,
        limit: int = MOST_LISTED,
    ) -> list[Memory]:
        """What is held of this user, of all agents unless one is given, newest first."""
        return self.store.memories_of(user_id, agent_id=agent_id, kind=kind, limit=limit)

    def history(self, *, user_id: str = DEFAULT_USER, agent_id: str = "", subject: str | None = None) -> list[Memory]:
        """What this user stated of each subject, in order of time: what holds (`valid_to` is None) and what did."""
        return self.store.history(user_id=user_id, agent_id=agent_id, subject=subject)

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
        """What would be erased; nothing changes before `forget_apply(plan)`.

        Owner and time narrow; ids and what the query finds are joined, and without both it is all of the scope. An
        empty list of ids is no id, and nothing would be erased. A query finds all that says it from
        `memory.recall_threshold` on, of all agents, and needs `user_id`.
        """
        return self.store.forget(
            user_id=user_id,
            session_id=session_id,
            before_utc=before_utc,
            interaction_ids=interaction_ids,
            memory_ids=memory_ids,
            query=query,
        )

    def forget_apply(self, plan: ForgetPlan) -> ForgetReceipt:
        """Erase for good what the plan holds, and withdraw what was trained on it, with its weights.

        Unerased if the rows are gone, and not all their bytes or weights.
        """
        try:
            receipt = self.store.forget_apply(plan)
        finally:  # the rows may be gone although their bytes could not be erased yet
            _withdraw(self.registry)
        if kept := self.registry.unerased(receipt.tainted_adapters):
            raise Unerased(
                f"the rows are deleted, but not yet the weights that learnt from them: {', '.join(map(str, kept))};"
                " delete these files, or make them deletable and open the home again, which erases them",
                receipt,
            )
        return receipt


def _withdraw(registry: Registry) -> None:
    """Take what learnt from forgotten words out of service, and its weights off the disk."""
    registry.withdraw_tainted()
    registry.erase_tainted()


def _require_wanted(dropped: Event) -> None:
    if dropped.is_set():
        raise ServingError("the reply was cancelled, or not read in time, so nothing was recorded")


def _require_sound(piece: str, adapter_id: str | None) -> None:
    """What cannot be kept is not shown either, and is no fault of whoever asked."""
    if fault := fault_of(piece):
        who = adapter_id or "the base"
        raise ServingError(f"a piece of what {who} answered holds {fault}, so nothing was recorded; ask again")


def _opened(serving: ServingSettings) -> Engine:
    if serving.engine == "local":
        from .serving.local import LocalEngine

        return LocalEngine(serving)
    from .serving.vllm import VLLMEngine

    return VLLMEngine(serving)
