"""What an assistant answers, whole or piece by piece: made in a thread of its own, read where it is shown."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING
from weakref import finalize

from .errors import InputError, ServingError

if TYPE_CHECKING:
    from anyio import CapacityLimiter

Heard = Callable[[str], object]  # takes each piece as it comes
Answering = Callable[[Heard, Event], "Reply"]  # ServingError soon after the event is set


@dataclass(frozen=True)
class Reply:
    """An answer and where it came from. `id` is what `rate` and `nightschool audit why` take."""

    text: str
    id: str
    session_id: str
    adapter_id: str | None  # None = the base answered
    memory_ids: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


class ReplyStream:
    """The pieces of one reply in order. When they end it is recorded, and `reply` tells of it.

    What `Assistant.reply` would raise, the loop over it raises. Use it in a `with`: an answer that is left before its
    end is broken off and not kept.
    """

    def __init__(self, answering: Answering) -> None:
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._reply: Future[Reply] = Future()
        self._dropped = Event()
        finalize(self, self._dropped.set)  # where it is left without being closed
        work = partial(_answer, answering, self._pieces, self._reply, self._dropped)
        try:
            Thread(target=work, name="nightschool-reply").start()
        except RuntimeError as error:  # no more threads in this container
            raise ServingError(f"the reply cannot start its thread: {error}") from error

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Break the answer off, unless it is recorded already."""
        self._dropped.set()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        if (piece := self._pieces.get()) is not None:
            return piece
        self._pieces.put(None)  # for whoever asks again
        self._reply.result()
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """The whole of it, once its pieces have ended; InputError before."""
        if not self._reply.done():
            raise InputError("stream: the reply has not ended; read its pieces to the end first")
        return self._reply.result()


def _answer(
    answering: Answering, pieces: SimpleQueue[str | None], reply: Future[Reply], dropped: Event
) -> None:  # knows nothing of the stream, which could not be given up otherwise
    try:
        reply.set_result(answering(pieces.put, dropped))
    except BaseException as error:  # it belongs to whoever reads, whatever it is
        reply.set_exception(error)
    finally:
        pieces.put(None)


class AsyncReplyStream:
    """The same for `async for`; each piece is awaited in a thread of `limiter`."""

    def __init__(self, stream: ReplyStream, limiter: CapacityLimiter) -> None:
        self._stream, self._limiter = stream, limiter

    def __aiter__(self) -> AsyncReplyStream:
        return self

    async def __anext__(self) -> str:
        from anyio import to_thread

        piece = await to_thread.run_sync(next, self._stream, None, abandon_on_cancel=True, limiter=self._limiter)
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def reply(self) -> Reply:
        """The whole of it, once its pieces have ended; InputError before."""
        return self._stream.reply
