"""Whether an engine applies an adapter as its trainer did: log-probabilities of a few fixed answers, compared.

The trainer records them with the adapter and without it; after loading, the engine's base must give the same, and the
adapter must move it as far. A server that took up no module, transposed a weight or serves another base gives others,
and says nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from math import inf

from ..content import Message
from ..errors import ServingError
from .chat import on_day
from .engine import Engine, Score

TALKS: tuple[tuple[list[Message], str], ...] = (
    ([{"role": "user", "content": "Good evening! How was your day?"}], "It was a long one, but a good one. And yours?"),
    ([{"role": "user", "content": "Which of the two would you take?"}], "The smaller one: it costs less to run."),
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "When does the shop open tomorrow?"}],
        "At nine.",
    ),
)
DAY = datetime(2026, 1, 5)  # on which they are said: some templates tell the date, and a record is older than a check
LEAST_EFFECT = 1e-4  # nats per token; below it an adapter may well look like its base
TELLING = 5e-3  # nats per token; above it an effect stands out of the 1e-3 by which a server's two scorings may differ
LEAST_SHARE = 0.5  # of its effect; 1 is all of it, 0 none
ROUNDED = 8  # times what rounding does to the base; an effect that is smaller may be turned by it into any other


def check(engine: Engine, adapter_id: str, recorded: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """ServingError where the engine's base is further than `tolerance` nats per token from the trainer's, or what the
    adapter adds to it by as much more: products in FP8 round both, each in its own way. And where little or nothing of
    an adapter is applied, though its effect is smaller than that.

    Over the tokens of all answers, as a short one alone is moved further. `recorded` holds log-probabilities of the
    answers of TALKS, in order, under `base` and `adapter`.
    """
    recorded = {name: _figures(adapter_id, recorded, name) for name in ("base", "adapter")}
    base = _scored(engine, None)
    tokens = sum(score.tokens for score in base)
    rounding = _size(_gained(_logprobs(base), recorded["base"])) / tokens
    if rounding > tolerance:
        raise ServingError(
            f"the engine's base is {rounding:.3f} nats per token away from the base that adapter {adapter_id} was"
            f" trained on, at most {tolerance} are allowed; see serving.parity_tolerance"
        )
    adapted = _scored(engine, adapter_id)
    wanted = _gained(recorded["adapter"], recorded["base"])
    _require_applied(adapter_id, base, adapted, wanted, rounding)
    gap = _size(_gained(_gained(_logprobs(adapted), _logprobs(base)), wanted)) / tokens
    if gap > tolerance + rounding:
        raise ServingError(
            f"adapter {adapter_id} is {gap:.3f} nats per token away from what its trainer recorded of its effect, at"
            f" most {tolerance + rounding:.3g} are allowed; see serving.parity_tolerance"
        )


def _require_applied(
    adapter_id: str, base: Sequence[Score], adapted: Sequence[Score], wanted: Sequence[float], rounding: float
) -> None:
    """ServingError where the engine hardly moves the tokens, or moves the answers along `wanted` by less than half.

    Rounding adds to how far the tokens are moved and never takes away; where they are moved to it may turn about.
    """
    effect = _size(wanted) / sum(score.tokens for score in base)
    if list(base) == list(adapted) and effect > LEAST_EFFECT:
        raise ServingError(f"the engine took up no module of adapter {adapter_id}: it answers as the base does")
    share = _share(_gained(_logprobs(adapted), _logprobs(base)), wanted)
    moved = _moved(base, adapted) / effect if effect else 1.0
    if effect > TELLING and (moved < LEAST_SHARE or (share < LEAST_SHARE and effect > ROUNDED * rounding)):
        raise ServingError(
            f"the engine applies {min(share, moved):.2f} of adapter {adapter_id}, where 1 is what its trainer recorded"
            f" of its effect ({effect:.3f} nats per token) and {LEAST_SHARE} the least; start the server by"
            " `nightschool serve`, with the rank and the modules of the adapter"
        )


def _figures(adapter_id: str, recorded: Mapping[str, Sequence[float]], name: str) -> Sequence[float]:
    found = recorded.get(name) or []
    if len(found) != len(TALKS) or not all(isinstance(figure, int | float) for figure in found):
        raise ServingError(
            f"adapter {adapter_id}: what its trainer recorded of its effect is damaged, or of another version of"
            " nightschool; run `nightschool night`"
        )
    return found


def _scored(engine: Engine, adapter_id: str | None) -> list[Score]:
    with on_day(DAY):
        return engine.score([prompt for prompt, _ in TALKS], [answer for _, answer in TALKS], adapter=adapter_id)


def _logprobs(scores: Sequence[Score]) -> list[float]:
    return [score.logprob for score in scores]


def _moved(base: Sequence[Score], adapted: Sequence[Score]) -> float:
    """Nats, of the mean token."""
    pairs = zip(base, adapted, strict=True)
    moves = [abs(a - b) for one, other in pairs for a, b in zip(other.token_logprobs, one.token_logprobs, strict=True)]
    return sum(moves) / len(moves)


def _share(found: Sequence[float], wanted: Sequence[float]) -> float:
    """How much of `wanted` there is in `found`, by projection; 1 where nothing is wanted."""
    length = sum(w * w for w in wanted)
    return sum(f * w for f, w in zip(found, wanted, strict=True)) / length if length else 1.0


def _gained(adapted: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(adapted, base, strict=True)]


def _size(gained: Sequence[float]) -> float:
    """Nats, over all answers; NaN counts as infinitely many."""
    nats = sum(map(abs, gained))
    return nats if nats == nats else inf
