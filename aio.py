"""The assistant for asyncio and trio, in worker threads.

The invariant: what waits for its turn, a reply or what is recorded, takes no thread from calls of another kind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial, wraps
from math import inf
from typing import Any, Concatenate, ParamSpec, TypeVar

from anyio import CapacityLimiter, Semaphore, fail_after, to_thread

from .errors import ServingError
from .memory.types import DEFAULT_USER
from .replies import AsyncReplyStream, Listener, Reply
from .sdk import Assistant

P = ParamSpec("P")
R = TypeVar("R")
THREADS = 40  # of `AsyncAssistant` for each kind of call


def _threaded(
    method: Callable[Concatenate[Assistant, P], R], limiter: str = "_others"
) -> Callable[Concatenate[AsyncAssistant, P], Coroutine[Any, Any, R]]:
    """The call of `AsyncAssistant` that runs `method` in a thread of those that `limiter` counts."""

    @wraps(method)
    async def call(front: AsyncAssistant, /, *args: P.args, **kwargs: P.kwargs) -> R:
        own = getattr(front.sync, method.__name__)  # of a subclass, too
        return await to_thread.run_sync(partial(own, *args, **kwargs), limiter=getattr(front, limiter))

    return call


class AsyncAssistant:
    """`Assistant` for asyncio and trio: the same calls, each run in a worker thread.

    Anything else that blocks goes by `call`: `await front.call(assistant.store.counts)`. Replies and what is recorded
    wait for their turn, each in threads of their own, and hold up no call of another kind. Use it in one event loop;
    close the `Assistant`.
    """

    def __init__(self, assistant: Assistant) -> None:
        self.sync, self._streams = assistant, Semaphore(THREADS)
        limiters = (CapacityLimiter(THREADS) for _ in range(4))
        self._replying, self._streaming, self._recording, self._others = limiters

    async def call(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await to_thread.run_sync(partial(method, *args, **kwargs), limiter=self._others)

    async def reply(
        self, text: str, *, user_id: str = DEFAULT_USER, agent_id: str = "", session_id: str | None = None
    ) -> Reply:
        """As `Assistant.reply`. One that is cancelled returns at once, and is not recorded.

        But one that is cancelled so late that it is written already, and is indexed or waits for that, stays: it is the
        last of its session then (`store.latest_interactions`).
        """
        listener = Listener()
        answer = partial(self.sync._reply, text, user_id, agent_id, session_id, listener)
        try:
            return await to_thread.run_sync(answer, abandon_on_cancel=True, limiter=self._replying)
        finally:
            listener.drop()

    @asynccontextmanager
    async def stream(
        self, text: str, *, user_id: str = DEFAULT_USER, agent_id: str = "", session_id: str | None = None
    ) -> AsyncIterator[AsyncReplyStream]:
        """As `Assistant.stream`: `async with front.stream(...) as answer: async for piece in answer: ...`.

        ServingError where as many as there are threads are still read after `serving.timeout_seconds`.
        """
        await self._await_place()
        try:
            with self.sync.stream(text, user_id=user_id, agent_id=agent_id, session_id=session_id) as stream:
                yield AsyncReplyStream(stream, self._streaming)
        finally:
            self._streams.release()

    async def _await_place(self) -> None:
        seconds = self.sync.settings.serving.timeout_seconds
        try:
            with fail_after(seconds or inf):
                await self._streams.acquire()
        except TimeoutError:
            raise ServingError(
                f"{THREADS} replies are being read in pieces, the most at once, and none has ended after {seconds:g} s"
                " (serving.timeout_seconds); leave those that nobody reads"
            ) from None

    rate = _threaded(Assistant.rate)
    remember = _threaded(Assistant.remember)
    recall = _threaded(Assistant.recall)
    memories = _threaded(Assistant.memories)
    history = _threaded(Assistant.history)
    forget = _threaded(Assistant.forget)
    forget_apply = _threaded(Assistant.forget_apply)
    record = _threaded(Assistant.record, "_recording")
