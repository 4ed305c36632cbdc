"""Whether an engine applies an adapter as its trainer did: log-probabilities of a few fixed answers, compared.

The trainer records them with the adapter and without it; after loading, the engine's base must give the same, and the
adapter must move it as far. A server that took up no module, transposed a weight or serves another base gives others,
and says nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from ..content import Message
from ..errors import ServingError
from .engine import Engine

TALKS: tuple[tuple[list[Message], str], ...] = (
    ([{"role": "user", "content": "Good evening! How was your day?"}], "It was a long one, but a good one. And yours?"),
    ([{"role": "user", "content": "Which of the two would you take?"}], "The smaller one: it costs less to run."),
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When does the shop open tomorrow?"}],
        "At nine.",
    ),
)
LEAST_EFFECT = 1e-4  # nats per token; below it an adapter may well look like its base


def check(engine: Engine, adapter_id: str, recorded: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """ServingError where the engine's base is further than `tolerance` nats per token from the trainer's, or what the
    adapter adds to it by as much more: products in FP8 round both, each in its own way.

    Over the tokens of all answers, as a short one alone is moved further. `recorded` holds log-probabilities of the
    answers of TALKS, in order, under `base` and `adapter`.
    """
    base, tokens = _scored(engine, None)
    rounding = _apart(base, recorded["base"]) / tokens
    if rounding > tolerance:
        raise ServingError(
            f"the engine's base is {rounding:.3f} nats per token away from the base that adapter {adapter_id} was"
            f" trained on, at most {tolerance} are allowed; see serving.parity_tolerance"
        )
    adapted, _ = _scored(engine, adapter_id)
    if base == adapted and _apart(recorded["adapter"], recorded["base"]) / tokens > LEAST_EFFECT:
        raise ServingError(f"the engine took up no module of adapter {adapter_id}: it answers as the base does")
    gap = _apart(_gained(adapted, base), _gained(recorded["adapter"], recorded["base"])) / tokens
    if gap > tolerance + rounding:
        raise ServingError(
            f"adapter {adapter_id} is {gap:.3f} nats per token away from what its trainer recorded of its effect, at"
            f" most {tolerance + rounding:.3g} are allowed; see serving.parity_tolerance"
        )


def _scored(engine: Engine, adapter_id: str | None) -> tuple[list[float], int]:
    """Log-probabilities of the answers, and how many tokens these have together."""
    scores = engine.score([prompt for prompt, _ in TALKS], [answer for _, answer in TALKS], adapter=adapter_id)
    return [score.logprob for score in scores], sum(score.tokens for score in scores)


def _gained(adapted: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(adapted, base, strict=True)]


def _apart(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Nats, over all answers; NaN counts as infinitely far."""
    nats = sum(abs(f - w) for f, w in zip(found, wanted, strict=True))
    return nats if nats == nats else inf
