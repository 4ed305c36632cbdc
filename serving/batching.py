"""Concurrent callers in one batch: a thread of its own steps all answers, and callers wait for theirs.

The invariant: only that thread uses the model, and between two steps it takes in what has come meanwhile, so nobody
waits for another's answer to end. A row that fails, is late or is given up leaves the others as they were. The thread
starts with the first piece of work and ends when nothing is left, or with the step in which the process ends.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, RLock, Thread
from typing import Any, TypeVar

import torch

from ..errors import ServingError
from .adapters import Lora
from .decoding import Batch, Forward, Layers, Row
from .engine import Limit

T = TypeVar("T")
THREAD = "nightschool-engine"
ENDING = Event()  # the process ends
BATCH_ROWS = 32
BATCH_TOKENS = 8192  # that one forward pass reads, padding included
PREFIX_TOKENS = 8192  # kept for prompts that go on where an earlier one ended
LEAST_PREFIX = 32  # a shorter one is read again more quickly than it is looked up and read alone


@dataclass(frozen=True)
class Limits:
    """Of answers that are stepped together, and of all that are on their way; later ones wait their turn."""

    rows: int
    columns: int  # of the cache, of all rows when their answers have their full length, padding included
    running: int  # tokens


CPU = Limits(BATCH_ROWS, BATCH_TOKENS, 4 * BATCH_TOKENS)
# a step reads the weights once for all its rows; of Qwen3-30B-A3B so many columns are 12 GiB
CARD = Limits(64, 64 * 2048, 64 * 2048)


@dataclass(eq=False)
class Request(Row):
    """A row that a caller waits for, for its pieces or only for its end."""

    limit: Limit = field(default_factory=Limit)
    streamed: bool = False
    given_up: bool = False  # nobody waits for it any more
    failed: bool = False  # with others in its batch; from then on it runs alone
    _pieces: SimpleQueue[str | None] = field(default_factory=SimpleQueue)

    def pieces(self) -> Iterator[str]:
        """The answer as it grows; ServingError when it broke off, or at once when its caller's limit is over."""
        yield from iter(self._next, None)
        if self.answer.error:
            raise self.answer.error

    def _next(self) -> str | None:
        while True:  # a pass of the model may last much longer than the limit
            with suppress(Empty):
                return self._pieces.get(timeout=self.limit.slice())
            self._require_time()

    def deliver(self) -> None:
        if self.streamed and (piece := self.answer.fresh()):  # every piece wakes a thread, and the model waits for it
            self._pieces.put(piece)
        if self.answer.done:
            self._pieces.put(None)

    def fail(self, error: ServingError) -> None:
        self.answer.fail(error)
        self.deliver()

    def goes_on(self) -> bool:
        """False when it is done, given up, cancelled or late, or the process ends."""
        try:
            _require_process()
            self._require_time()
        except ServingError as error:
            if not self.answer.done:
                self.fail(error)
        return not (self.answer.done or self.given_up)

    def _require_time(self) -> None:
        try:
            self.limit.left()
        except ServingError as error:
            tokens, most = len(self.answer.ids), self.answer.sampling.max_tokens
            raise ServingError(f"{error}; {tokens} of at most {most} tokens were ready") from None


class Batcher:
    def __init__(self, forward: Forward, device: str, threads: int) -> None:
        """`threads` of torch, on a CPU."""
        self._forward, self._device, self._threads = forward, device, threads
        self.limits = CARD if device.startswith("cuda") else CPU
        self._lock = RLock()  # of the two queues and `_working`; what is collected meanwhile may hand in a job
        self._waiting: deque[Request] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._working = False
        # from here on the thread's own
        self._batches: list[Batch] = []
        self._prefixes = Prefixes(PREFIX_TOKENS)

    def add(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._wake()
            self._waiting += requests

    def hand_in(self, job: Callable[[], T]) -> Future[T]:
        """What `job` will return; it may use the model, and runs between two steps. Only others may wait for it."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                _require_process()
                future.set_result(job())
            except BaseException as error:  # it belongs to the caller, whatever it is
                future.set_exception(error)

        with self._lock:
            self._wake()
            self._jobs.append(run)
        return future

    def forget(self) -> None:
        """Let go of what was read of conversations."""
        self._prefixes = Prefixes(PREFIX_TOKENS)

    def _wake(self) -> None:
        """Before anything is queued: the thread waits for the lock that the caller holds."""
        _require_process()
        if not self._working:
            try:
                # the process waits for who reads an answer, and only then, in `_end`, for the thread
                Thread(target=self._work, name=THREAD, daemon=True).start()
            except RuntimeError as error:  # no more threads in this container
                raise ServingError(f"the engine cannot start its thread: {error}") from error
            self._working = True

    # -- the thread ---

    def _work(self) -> None:
        # a thread takes over the number that holds when it begins, and an embedder may have set it to one meanwhile
        torch.set_num_threads(self._threads)
        while self._turn():
            pass

    def _turn(self) -> bool:
        with self._lock:
            job = self._jobs.popleft() if self._jobs else None
            fresh = self._admitted()
            if not (job or fresh or self._batches):
                self._working = False
                return False
        if job:
            job()
        try:
            self._batches += self._grouped(fresh)
            for batch in self._batches:
                self._step(batch)
            self._join()
        except Exception as error:  # a dead thread would leave every caller waiting
            self._give_up([*fresh, *(_request(row) for batch in self._batches for row in batch.rows)], error)
        return True

    def _give_up(self, requests: Sequence[Request], error: Exception) -> None:
        self._batches = []
        for request in requests:
            if not request.answer.done:
                request.fail(_broken(request, error))
            request.deliver()  # once more does no harm

    def _admitted(self) -> list[Request]:
        """Those of the waiting, in order, for which there is room; the first one always has it when nothing runs.

        One that failed among others begins when nothing else runs: memory may have been too short for all.
        """
        self._waiting = deque(request for request in self._waiting if request.goes_on())
        running = sum(row.size for batch in self._batches for row in batch.rows)
        fresh: list[Request] = []
        while self._waiting and (not running or self._has_room(self._waiting[0], running)):
            fresh.append(self._waiting.popleft())
            running += fresh[-1].size
        return fresh

    def _has_room(self, row: Request, running: int) -> bool:
        return not row.failed and running + row.size <= self.limits.running

    def _grouped(self, fresh: Sequence[Request]) -> list[Batch]:
        """Batches of what is read from its beginning, and one each for rows of which something was read before."""
        pasts = [None if row.failed else self._prefixes.longest(row.lora, row.ids) for row in fresh]
        alone = [[i] for i, row in enumerate(fresh) if row.failed or pasts[i] is not None]
        rest = [i for i in range(len(fresh)) if [i] not in alone]
        groups = [[rest[i] for i in group] for group in batches([fresh[i].size for i in rest])]
        return [Batch([fresh[i] for i in g], self._device, pasts[g[0]]) for g in [*alone, *groups]]

    def _step(self, batch: Batch) -> None:
        batch.keep([i for i, row in enumerate(batch.rows) if _request(row).goes_on()])
        if not batch.rows:
            return
        try:
            batch.step(self._forward)
        except Exception as error:
            self._retry(batch, error)
            return
        for i, row in enumerate(batch.rows):
            if row.answer.done and not row.answer.error and batch.divisible:
                with suppress(RuntimeError, MemoryError):  # no room for it: then it is read again
                    self._prefixes.add(row.lora, *batch.read_so_far(i))
            _request(row).deliver()
        batch.keep([i for i, row in enumerate(batch.rows) if not row.answer.done])

    def _retry(self, batch: Batch, error: Exception) -> None:
        """Every row of a failed batch goes on alone; the one that fails then was the reason."""
        rows = [_request(row) for row in batch.rows]
        batch.keep([])
        for row in rows:
            if row.answer.done:  # it had its last token before the step failed
                row.deliver()
            elif row.failed or len(rows) == 1:
                row.fail(_broken(row, error))
            row.failed = True
        with self._lock:
            self._waiting.extendleft(row for row in reversed(rows) if not row.answer.done)

    def _join(self) -> None:
        joined: list[Batch] = []
        for batch in filter(lambda batch: batch.rows, self._batches):
            host = next((other for other in joined if _fit(other, batch, self.limits)), None)
            if host is None or not _joins(host, batch):
                joined.append(batch)
        self._batches = joined


@atexit.register  # which comes when all threads but daemons have ended: who still waits will not live to read an answer
def _end() -> None:
    """Wait for the steps that are under way: a thread that dies inside of torch aborts the process."""
    ENDING.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def _require_process() -> None:
    if ENDING.is_set():
        raise ServingError("the process ends, so the engine answers no more")


def _request(row: Row) -> Request:
    assert isinstance(row, Request)
    return row


def _broken(request: Request, error: Exception) -> ServingError:
    return ServingError(f"the answer broke off after {len(request.answer.ids)} tokens: {error}")


def _joins(host: Batch, batch: Batch) -> bool:
    """False where there is no room for both side by side: then they go on apart."""
    try:
        host.join(batch)
    except (RuntimeError, MemoryError):
        return False
    return True


def _fit(one: Batch, other: Batch, limits: Limits) -> bool:
    rows = len(one.rows) + len(other.rows)
    width = max(batch.padded // len(batch.rows) for batch in (one, other))
    alone = any(_request(row).failed for row in [*one.rows, *other.rows])
    if rows > limits.rows or rows * width > limits.columns or alone:
        return False
    return one.divisible and other.divisible


def batches(sizes: Sequence[int], tokens: int = BATCH_TOKENS, rows: int = BATCH_ROWS) -> Iterator[list[int]]:
    """Indices in groups of like size, the longest first, each of at most so many `rows` and, when padded, `tokens`."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if group and (len(group) == rows or (len(group) + 1) * sizes[group[0]] > tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


# -- what was read before ---


@dataclass(frozen=True, eq=False)
class Prefix:
    lora: weakref.ref[Lora]  # a kept prefix does not keep its adapter
    ids: list[int]
    layers: Layers

    def shared(self, lora: Lora, ids: Sequence[int]) -> int:
        """How many first tokens it has in common with `ids`, the last one left out: it is read to go on."""
        if self.lora() is not lora:
            return 0
        most = min(len(self.ids), len(ids) - 1)
        return next((i for i in range(most) if self.ids[i] != ids[i]), most)


class Prefixes:
    """Keys and values of the last conversations, at most so many tokens of them, the longest unused leaving first."""

    def __init__(self, tokens: int) -> None:
        self._limit = tokens
        self._kept: list[Prefix] = []

    def add(self, lora: Lora, ids: list[int], layers: Layers) -> None:
        if len(ids) > self._limit:
            return  # all others would leave, and it with them
        self._kept = [p for p in self._kept if p.lora() and p.shared(lora, [*ids, -1]) < len(p.ids)]
        self._kept.append(Prefix(weakref.ref(lora), ids, layers))
        while sum(len(prefix.ids) for prefix in self._kept) > self._limit:
            self._kept.pop(0)

    def longest(self, lora: Lora, ids: Sequence[int]) -> Any:
        """A cache of the first tokens of `ids`, at least half of them, or None."""
        from transformers import DynamicCache

        best = max(self._kept, key=lambda prefix: prefix.shared(lora, ids), default=None)
        shared = best.shared(lora, ids) if best else 0
        if best is None or shared < max(LEAST_PREFIX, len(ids) // 2):
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return DynamicCache([(keys[..., :shared, :], values[..., :shared, :]) for keys, values in best.layers])
