"""Topics that say the same in other words, put together: one group, one recurrence.

Topics as they are assigned are narrow and never change hands. Their groups are derived whenever they are asked for, by
average linkage over the directions in which the topics differ, cut where the data says: the merge similarities fall
into two heaps, within a group and between groups, and Otsu's threshold parts them. So groups merge and split as turns
come, and nothing is recorded. The invariant: the same topics give the same groups, and a group is named by the oldest
topic in it, so its id survives every merge.

Not covered: topics that are all unrelated. Otsu's threshold then parts one heap, and the nearest are merged all the
same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from .topics import LABEL_WORDS, TopicState

MIN_TOPICS = 50  # with fewer there is no heap to tell from another: each stands alone
MOST_TOPICS = 4096  # the largest that are compared, 16 million cosines; smaller ones stand alone
DIRECTIONS = 64  # principal components kept: fewer words of one request, more of what requests share
BACKGROUND = 2.0  # standard deviations above the mean cosine of two topics: below it nothing is merged


def groups(topics: Sequence[TopicState]) -> dict[str, str]:
    """The group of each topic by id. O(n²) in memory and about O(n²) in time, n up to MOST_TOPICS."""
    own = {t.id: t.id for t in topics}
    compared = sorted(topics, key=lambda t: (-t.size, t.created_utc, t.id))[:MOST_TOPICS]
    if len(compared) < MIN_TOPICS:
        return own
    compared.sort(key=lambda t: (t.created_utc, t.id))
    oldest: dict[int, str] = {}
    for topic, cluster in zip(compared, _clusters(_directions(compared)), strict=True):
        own[topic.id] = oldest.setdefault(int(cluster), topic.id)
    return own


def _clusters(units: NDArray[np.float64]) -> NDArray[np.int32]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    cosines = units @ units.T
    pairs = cosines[np.triu_indices(len(units), 1)]
    distances = np.round(1 - cosines, 6).clip(0)  # rounded, so that another machine's last bits cut nothing else
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average")
    cut = min(otsu(tree[:, 2]), 1 - float(pairs.mean() + BACKGROUND * pairs.std()))
    found: NDArray[np.int32] = fcluster(tree, cut, "distance")
    return found


def _directions(topics: Sequence[TopicState]) -> NDArray[np.float64]:
    means = _unit(np.stack([t.centroid_sum for t in topics]).astype(np.float64))
    centred = means - means.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return _unit(centred @ axes[:, -DIRECTIONS:])


def otsu(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The threshold that parts `values` in two heaps with the largest variance between them (Otsu 1979)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) < 2:
        return float(ordered[0])
    below = np.arange(1, len(ordered))
    above = len(ordered) - below
    sums = np.cumsum(ordered)[:-1]
    between = below * above * (sums / below - (ordered.sum() - sums) / above) ** 2
    best = int(between.argmax())
    return float(ordered[best] + ordered[best + 1]) / 2


def labels(topics: Sequence[TopicState], group_of: Mapping[str, str]) -> dict[str, str]:
    """The words that tell each group apart: frequent in the labels of its topics, rare in those of others."""
    members: dict[str, list[TopicState]] = defaultdict(list)
    for topic in topics:
        members[group_of[topic.id]].append(topic)
    words = {group: _words(some) for group, some in members.items()}
    spread = Counter(word for counts in words.values() for word in counts)
    several = {group: _telling(words[group], spread, len(words)) for group, some in members.items() if len(some) > 1}
    return {group: several.get(group, some[0].label) for group, some in members.items()}


def _words(topics: Sequence[TopicState]) -> Counter[str]:
    counts = Counter[str]()
    for topic in topics:
        counts.update(dict.fromkeys(topic.label.split(), topic.size))
    return counts


def _telling(counts: Counter[str], spread: Counter[str], groups: int) -> str:
    scores = {word: n * log(1 + groups / spread[word]) for word, n in counts.items()}
    return " ".join(sorted(scores, key=lambda word: (-scores[word], word))[:LABEL_WORDS])


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit
