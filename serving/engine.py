"""What every engine does, embedded or served: answer, stream, score, and hold adapters under immutable ids.

A call ends with what was asked for, or with a ServingError at its time limit or when its `cancel` is set by another
thread. What the model has begun, a token or a pass, is not broken off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from threading import Event
from typing import Protocol

from ..content import Message
from ..errors import InputError, ServingError

Prompt = Sequence[Message]
Pieces = Generator[str, None, None]  # of an answer, as they come; closing it ends the answer
SLICE_S = 0.1  # after so long a call that waits sees that it was cancelled
LEAST_PROMPT = 16  # tokens that must be left for the prompt
CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "adapter.json"  # of an adapter
ON_LATE = "allow more time (for replies serving.timeout_seconds) or fewer tokens"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; temperature 0 is greedy. `stop` strings end the answer and are left out of it.

    An answer that is not whole `timeout_s` seconds after its call is a ServingError; 0 = wait as long as it takes.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    timeout_s: float = 0.0

    def __post_init__(self) -> None:
        _require_timeout("sampling", self.timeout_s)
        for name, good, wanted in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none of them empty"),
            ("seed", abs(self.seed) < 2**40, "below 2**40"),  # rows of one call have seeds of their own
        ):
            if not good:
                raise InputError(f"sampling: {name} is {getattr(self, name)!r}; it is {wanted}")


@dataclass(frozen=True)
class Limit:
    """When a call gives up: `timeout_s` seconds after its start (0 = never), or when `cancel` is set."""

    timeout_s: float = 0.0
    cancel: Event | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        _require_timeout("the call", self.timeout_s)
        if not isinstance(self.cancel, Event | None):
            raise InputError(f"cancel is a {type(self.cancel).__name__}; it is a threading.Event, or None")

    def left(self) -> float | None:
        """Seconds, None without a limit; ServingError when none are left, or the call was cancelled."""
        if self.cancel and self.cancel.is_set():
            raise ServingError("the call was cancelled")
        if not self.timeout_s:
            return None
        seconds = self.started + self.timeout_s - time.monotonic()
        if seconds <= 0:
            raise self.missed()
        return seconds

    def wait(self, once: Callable[[float], bool]) -> None:
        """Until `once`, which waits as long as it is told (seconds), says that it is so."""
        self.left()
        while not once(self.slice()):
            self.left()

    def slice(self) -> float:
        """Seconds to wait before one looks again, 0 when none are left."""
        left = self.started + self.timeout_s - time.monotonic() if self.timeout_s else SLICE_S
        return max(0.0, min(SLICE_S, left))

    def missed(self) -> ServingError:
        return ServingError(f"not done within timeout_s = {self.timeout_s:g}; {ON_LATE}")


def _require_timeout(what: str, seconds: float) -> None:
    if not 0 <= seconds <= 1e9:
        raise InputError(f"{what}: timeout_s is {seconds!r}; it is 0 (no limit) to 1e9")


@dataclass(frozen=True)
class Score:
    """Log-probability (nats) of an answer with its end-of-turn token, given its prompt; one figure a token."""

    token_logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)

    @property
    def tokens(self) -> int:
        return len(self.token_logprobs)


def room_for_prompt(context: int, reserved: int) -> int:
    """Tokens of the context that an answer of `reserved` leaves."""
    room = context - reserved
    if room < LEAST_PROMPT:
        raise ServingError(
            f"an answer of {reserved} tokens leaves no room for a prompt in the context of {context}; ask for a shorter"
            " one (for replies serving.max_tokens)"
        )
    return room


def require_pairs(prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
    if len(prompts) != len(answers):
        raise InputError(
            f"score: there are {len(prompts)} prompts and {len(answers)} answers; give one answer a prompt"
        )


def of_another_base(adapter_id: str, made_for: object, serving: str) -> str:
    """Why the adapter is refused, and what to do."""
    return (
        f"adapter {adapter_id} was trained on base {made_for}, but {serving} is serving;"
        " set serving.base back, or run `nightschool night` to train for this base"
    )


class Engine(Protocol):
    """`adapter` is the id of a loaded adapter; None is the base, exactly."""

    @property
    def base_id(self) -> str: ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapter: str | None = None,
        sampling: Sampling = ...,
        cancel: Event | None = None,
    ) -> list[str]: ...

    def stream(self, prompt: Prompt, *, adapter: str | None = None, sampling: Sampling = ...) -> Pieces: ...

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        adapter: str | None = None,
        timeout_s: float = 0.0,
        cancel: Event | None = None,
    ) -> list[Score]: ...

    def load(self, adapter_id: str, path: Path) -> None: ...

    def unload(self, adapter_id: str) -> None: ...

    def discard(self, adapter_ids: Collection[str]) -> None:
        """Unload those that another process left where this one answers from; of none loaded here."""

    def adapters(self) -> list[str]: ...

    def close(self) -> None:
        """Give back what the engine holds; it answers no more."""
        ...
