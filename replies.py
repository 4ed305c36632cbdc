"""What an assistant answers, whole or piece by piece: made in a thread of its own, read where it is shown."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from threading import TIMEOUT_MAX, Event, Thread
from time import monotonic
from weakref import finalize

from anyio import CapacityLimiter, get_cancelled_exc_class, to_thread

from .errors import InputError, ServingError


class Listener:
    """Whoever waits for a reply as a whole. `dropped` is set by one who does not want it any more."""

    def __init__(self) -> None:
        self.dropped = Event()

    def hear(self, piece: str) -> None:
        """Take the next piece."""

    def heard_all(self, patience_s: float) -> None:
        """Returns when every piece was taken, or nobody wants it any more: none was taken for `patience_s`."""

    def drop(self) -> None:
        self.dropped.set()


class Reading(Listener):
    """Pieces that are read one by one, each when the reader asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: SimpleQueue[str | None] = SimpleQueue()  # None: they have ended, and then: it is recorded
        self.asked_on = Event()
        self.taken = monotonic()  # the latest

    def hear(self, piece: str) -> None:
        self.pieces.put(piece)

    def heard_all(self, patience_s: float) -> None:
        self.pieces.put(None)
        began = monotonic()
        while (left := max(began, self.taken) + patience_s - monotonic()) > 0:
            if self.asked_on.wait(min(left, TIMEOUT_MAX)):
                return
        self.drop()  # the next turn of the session waits for it

    def drop(self) -> None:
        super().drop()
        self.asked_on.set()


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

    What `Assistant.reply` would raise, the loop over it raises. Use it in a `with`: an answer that is not read to its
    end is broken off and not kept.
    """

    def __init__(self, answering: Callable[[Listener], Reply]) -> None:
        self._reading, self._reply = Reading(), Future[Reply]()
        finalize(self, self._reading.drop)  # where it is left without being closed
        try:
            given = answering, self._reading, self._reply
            # a process that ends does not wait for what nobody reads any more
            Thread(target=_answer, args=given, name="nightschool-reply", daemon=True).start()
        except RuntimeError as error:  # no more threads in this container
            raise ServingError(f"the reply cannot start its thread: {error}") from error

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Break the answer off, unless it was read to its end."""
        self._reading.drop()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        if not self._reading.asked_on.is_set() and (piece := self._reading.pieces.get()) is not None:
            self._reading.taken = monotonic()
            return piece
        self._reading.asked_on.set()
        self._reply.result()
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """The whole of it, once its pieces have ended; InputError before."""
        if not self._reply.done():
            raise InputError("stream: the reply has not ended; read its pieces to the end first")
        return self._reply.result()


def _answer(answering: Callable[[Listener], Reply], reading: Reading, reply: Future[Reply]) -> None:
    """Knows nothing of the stream, which could not be given up otherwise."""
    try:
        reply.set_result(answering(reading))
    except BaseException as error:  # it belongs to whoever reads, whatever it is
        reply.set_exception(error)
    finally:
        reading.pieces.put(None)


class AsyncReplyStream:
    """The same for `async for`; each piece is awaited in a thread of `limiter`.

    A wait that is cancelled breaks the answer off: its piece would be lost.
    """

    def __init__(self, stream: ReplyStream, limiter: CapacityLimiter) -> None:
        self._stream, self._limiter = stream, limiter

    def __aiter__(self) -> AsyncReplyStream:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await to_thread.run_sync(next, self._stream, None, abandon_on_cancel=True, limiter=self._limiter)
        except get_cancelled_exc_class():
            self._stream.close()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def reply(self) -> Reply:
        """The whole of it, once its pieces have ended; InputError before."""
        return self._stream.reply
