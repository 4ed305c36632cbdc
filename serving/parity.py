"""Whether an engine applies an adapter as its trainer did: log-probabilities of a few fixed answers, compared.

The trainer records them with the adapter and without it; after loading, the engine must give the same. A server that
took up no module, transposed a weight or serves another base gives others, and says nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    """ServingError where the engine's nats per token differ by more than `tolerance` from those of the trainer.

    `recorded` holds log-probabilities of the answers of TALKS, in order, under `base` and `adapter`.
    """
    base, tokens = _scored(engine, None)
    gap = _gap(base, recorded["base"], tokens)
    if gap > tolerance:
        raise ServingError(
            f"the engine's base is {gap:.3f} nats per token away from the base that adapter {adapter_id} was trained"
            f" on, at most {tolerance} are allowed; see serving.parity_tolerance"
        )
    adapted, _ = _scored(engine, adapter_id)
    if base == adapted and _gap(recorded["adapter"], recorded["base"], tokens) > LEAST_EFFECT:
        raise ServingError(f"the engine took up no module of adapter {adapter_id}: it answers as the base does")
    gap = _gap(adapted, recorded["adapter"], tokens)
    if gap > tolerance:
        raise ServingError(
            f"adapter {adapter_id} is {gap:.3f} nats per token away from what its trainer recorded, at most"
            f" {tolerance} are allowed; see serving.parity_tolerance"
        )


def _scored(engine: Engine, adapter_id: str | None) -> tuple[list[float], list[int]]:
    scores = engine.score([prompt for prompt, _ in TALKS], [answer for _, answer in TALKS], adapter=adapter_id)
    return [score.logprob for score in scores], [score.tokens for score in scores]


def _gap(found: Sequence[float], wanted: Sequence[float], tokens: Sequence[int]) -> float:
    """The largest difference per token; NaN counts as infinitely far."""
    gaps = [abs(f - w) / n for f, w, n in zip(found, wanted, tokens, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)
