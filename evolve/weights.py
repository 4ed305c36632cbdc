"""How much a row teaches: satisfaction, multiplied by how often its topic comes back.

    pair       w = c · m · log(1 + n_k),   m = (s_chosen − s_rejected) / 2
    example    w = c · s · log(1 + n_k),   s > 0: only what was liked is imitated
    thumb      w = c · |s| · log(1 + n_k)

c in [0, 1] is the confidence in the satisfaction, s in [-1, 1] its score, and n_k the decayed count of the topic over
distinct sessions (`memory.topics.recurrence`). Liked and disliked thumbs are brought to the same weight together
(`balanced`), of which the cap takes some where one kind is rare. The weights of one part of a snapshot are then scaled
to mean 1 and capped (`normalise`). Where several people use one adapter, the rows of a user who supplies more than a
set share of the weight are scaled down to that share (`limit_share`), and all to mean 1 under the cap once more: where
the others are so few that they would have to weigh more than the cap, the share gives way. A pair counts for whoever
met its chosen answer and for whoever met the rejected one. Where so few met one of the two kinds that no weights would
keep the share, the pairs of each are scaled down to that share of what all weighed (`limit_sum`), so that pairs weigh
less beside thumbs. Synthetic pairs together are held to a set share, too (`limit_marked`).

The invariant: frequency multiplies satisfaction and never replaces it. n_k ≥ 0 enters through a factor that is never
negative, so it turns no sign: what was not preferred weighs 0 however often it is asked, and what nobody is sure about
(c = 0) weighs 0 too. The logarithm makes the hundredth session count less than the second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import accumulate
from math import log1p

MOST_BALANCE = 4.0


def pair_weight(confidence: float, margin: float, recurrence: float) -> float:
    return confidence * max(0.0, margin) * log1p(max(0.0, recurrence))


def pair_margin(chosen_score: float, rejected_score: float) -> float:
    return (chosen_score - rejected_score) / 2


def example_weight(confidence: float, score: float, recurrence: float) -> float:
    return pair_weight(confidence, score, recurrence)


def thumb_weight(confidence: float, score: float, recurrence: float) -> float:
    return pair_weight(confidence, abs(score), recurrence)


def balanced(weights: Sequence[float], liked: Sequence[bool]) -> list[float]:
    """`weights` with the liked and the disliked at the same sum, neither raised more than `MOST_BALANCE` times.

    Where nine of ten answers are liked, an unpaired loss would otherwise learn to raise everything. (arXiv 2402.01306
    balances its two kinds likewise.)
    """
    sums = {kind: sum(w for w, like in zip(weights, liked, strict=True) if like is kind) for kind in (True, False)}
    if not all(sums.values()):
        return list(weights)
    half = sum(sums.values()) / 2
    factor = {kind: min(MOST_BALANCE, half / own) for kind, own in sums.items()}
    return [w * factor[like] for w, like in zip(weights, liked, strict=True)]


def normalise(weights: Sequence[float], cap: float) -> list[float]:
    """`min(cap, λw)` with the λ that makes the mean 1, so that the mean and the cap hold together.

    λ is exact: with the k largest at the cap, the others share what is left, and k is the smallest number for which
    none of the others exceeds the cap. If too few weights are positive to reach the mean (fewer than n / cap of them),
    all of those are at the cap. Order and zeros are kept.
    """
    if cap < 1:
        raise ValueError(f"a cap of {cap} is below the mean of 1; set dataset.weight_cap to 1 or more")
    ascending = sorted(w for w in weights if w > 0)
    sums = list(accumulate(ascending))  # from the smallest up: subtracting outliers from a total would lose digits
    for capped, (largest, rest) in enumerate(zip(reversed(ascending), reversed(sums), strict=True)):
        scale = (len(weights) - capped * cap) / rest
        if scale * largest <= cap * (1 + 1e-12):  # else the last bits of a product may leave nothing for anybody
            return [min(cap, scale * w) for w in weights]
    return [cap if w > 0 else 0.0 for w in weights]


def limit_share(weights: Sequence[float], owners: Sequence[Hashable], share: float) -> list[float]:
    """`weights` with no owner's sum above `share` of the whole. Up to 1 / share owners are left as they are.

    The level L that no owner exceeds is exact: with the k largest sums at L, L = share · (rest + k · L), and k is the
    smallest number for which none of the others exceeds L.
    """
    ascending = sorted(total for total in _sums(weights, owners).values() if total > 0)
    if share * len(ascending) <= 1:
        return list(weights)
    limited = enumerate(zip(reversed(ascending), reversed(list(accumulate(ascending))), strict=True))
    levels = ((share * rest / (1 - k * share), largest) for k, (largest, rest) in limited)
    return limit_sum(weights, owners, next(level for level, largest in levels if largest <= level))


def limit_sum(weights: Sequence[float], owners: Sequence[Hashable], most: float) -> list[float]:
    """`weights` with no owner's sum above `most`."""
    sums = _sums(weights, owners)
    return [w * min(1.0, most / sums[owner]) if w > 0 else w for w, owner in zip(weights, owners, strict=True)]


def _sums(weights: Sequence[float], owners: Sequence[Hashable]) -> dict[Hashable, float]:
    sums: dict[Hashable, float] = defaultdict(float)
    for owner, weight in zip(owners, weights, strict=True):
        sums[owner] += weight
    return sums


def limit_marked(weights: Sequence[float], marked: Sequence[bool], share: float) -> list[float]:
    """`weights` with those that are marked scaled down together to at most `share` of the whole, below 1."""
    sums = [sum(w for w, mark in zip(weights, marked, strict=True) if mark is kind) for kind in (True, False)]
    scale = min(1.0, share / (1 - share) * sums[1] / sums[0]) if sums[0] else 1.0
    return [w * scale if mark else w for w, mark in zip(weights, marked, strict=True)]
