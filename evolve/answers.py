"""Answers whose reception is known: gathered from memory, split into taught and held out, duplicates folded.

The invariant: an answer is on one side of the split only, and so are its user (or session) and its exact words after
the same prompt. Which users are held out depends on their names and the seed, so most stay where they were as memory
grows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..content import canonical_json, content_id
from ..memory.signals import assess, correction_of, label
from ..memory.topics import Recurrence, recurrence
from ..memory.types import Feedback, Interaction, Satisfaction, Signal
from ..settings import CensorSettings, DatasetSettings, Settings
from .prompts import Prompts, plain, session_key
from .types import Excluded

Vectors = Mapping[str, NDArray[np.float32]]  # unit vectors of requests by interaction id
ClusterOf = Callable[[Interaction], str]


@dataclass(frozen=True)
class Answer:
    """A reply, or what should have been said instead (`correction_id`), with the satisfaction it met."""

    interaction: Interaction
    completion: str
    score: float
    confidence: float
    recurrence: float  # of its topic
    key: str  # of the prompt
    key_without_request: str
    sources: tuple[str, ...]  # the interaction first, see `types`
    correction_id: str | None = None

    @property
    def liked(self) -> bool:
        return self.score > 0

    @property
    def words(self) -> tuple[str, str]:
        """Equal words are the same answer to the same prompt, but for case, spaces and punctuation at word ends."""
        return self.key, plain(self.completion)


@dataclass(frozen=True)
class Gathered:
    answers: list[Answer]  # liked or disliked
    corrected: list[tuple[Answer, Answer]]  # what should have been said, and what was


@dataclass(frozen=True)
class Exclusions:
    """Why interactions that carried feedback are left out, collected along the way."""

    found: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, reason: str, ids: Iterable[str]) -> None:
        self.found[reason].update(ids)

    def report(self) -> tuple[Excluded, ...]:
        return tuple(Excluded(reason, tuple(sorted(ids))) for reason, ids in sorted(self.found.items()) if ids)


# -- gathering ---


def gather(
    prompts: Prompts,
    feedback: Mapping[str, Sequence[Feedback]],
    vectors: Vectors,
    settings: Settings,
    excluded: Exclusions,
    learned: Mapping[str, Signal],
) -> Gathered:
    """Every reply that the Censor labels and every correction. Recurrence is as of the latest interaction.

    `learned` is what a reader made of unrated turns, by interaction.
    """
    gathered = Gathered([], [])
    recurs = _recurrence(prompts, settings.dataset)
    for interaction in prompts.interactions.values():
        given = feedback.get(interaction.id, ())
        satisfaction = _assess(interaction, given, prompts, vectors, learned.get(interaction.id))
        labelled = label(satisfaction, settings.censor) is not None
        if not (labelled or given):
            continue
        if prompts.missing_memories(interaction):
            excluded.add("a memory that the reply was given is forgotten", [interaction.id])
            continue
        if not (interaction.position or interaction.turn):
            excluded.add("a greeting that answers nobody", [interaction.id])
            continue
        reply = _answer(interaction, satisfaction, prompts, recurs[topic_of(interaction)].value)
        correction = correction_of(interaction, given)
        if correction:
            better = _corrected(reply, correction)
            gathered.answers.append(better)
            if reply.completion:
                gathered.corrected.append((better, reply))
        if labelled and reply.completion:
            gathered.answers.append(reply)
        elif given and not correction:
            excluded.add("rated neither good nor bad" if reply.completion else "the reply is empty", [interaction.id])
    return gathered


def _assess(
    interaction: Interaction, given: Sequence[Feedback], prompts: Prompts, vectors: Vectors, learned: Signal | None
) -> Satisfaction:
    reaction = prompts.reaction(interaction)
    cosine = None
    if reaction and interaction.id in vectors and reaction.id in vectors:
        cosine = float(vectors[interaction.id] @ vectors[reaction.id])
    return assess(interaction, given, reaction, cosine, prompts.earlier_replies(interaction), learned)


def _answer(interaction: Interaction, satisfaction: Satisfaction, prompts: Prompts, recurs: float) -> Answer:
    return Answer(
        interaction,
        interaction.reply.strip(),
        satisfaction.score,
        satisfaction.confidence,
        recurs,
        prompts.key(interaction),
        prompts.key_without_request(interaction),
        prompts.sources(interaction),
    )


def _corrected(reply: Answer, correction: Feedback) -> Answer:
    text = (correction.correction or "").strip()
    return replace(reply, completion=text, score=1.0, confidence=1.0, correction_id=correction.id)


def _recurrence(prompts: Prompts, settings: DatasetSettings) -> dict[str, Recurrence]:
    interactions = prompts.interactions.values()
    visits = [(topic_of(i), session_key(i), i.created_utc) for i in interactions]
    latest = max((i.created_utc for i in interactions), default=0.0)
    return recurrence(visits, latest, settings.half_life_days)


def topic_of(interaction: Interaction) -> str:
    return interaction.topic_id or interaction.id  # without a topic it is one of its own


# -- the held-out part ---


def hold_out(answers: Sequence[Answer], settings: Settings) -> tuple[ClusterOf, frozenset[str]]:
    """How to name an interaction's cluster, and the clusters held out.

    Clusters are users where that leaves the gate enough of them, else sessions.
    """
    cluster_of, held = user_cluster, frozenset[str]()
    for cluster_of in (user_cluster, session_cluster):
        held = choose_clusters(Counter(cluster_of(a.interaction) for a in answers), settings.dataset)
        if len(held) >= settings.gate.min_clusters:
            break
    return cluster_of, held


def user_cluster(interaction: Interaction) -> str:
    return interaction.user_id


def session_cluster(interaction: Interaction) -> str:
    return canonical_json(session_key(interaction))


def choose_clusters(sizes: Mapping[str, int], settings: DatasetSettings) -> frozenset[str]:
    """About `held_out_share` of the answers in whole clusters, in the order of their hashed names.

    A cluster is passed over if it overshoots by more than half of itself; one alone is never held out.
    """
    target = settings.held_out_share * sum(sizes.values())
    taken, held = 0, set[str]()
    for name in sorted(sizes, key=lambda name: content_id([settings.seed, name])):
        if taken + sizes[name] / 2 <= target:
            held.add(name)
            taken += sizes[name]
    return frozenset(held) if len(sizes) > 1 else frozenset()


# -- folding ---


def fold(answers: Iterable[Answer], settings: CensorSettings, excluded: Exclusions) -> list[Answer]:
    """One answer for each prompt and completion in nearly the same words.

    Its score is the mean by confidence, its confidence the highest. How often it was said counts through the recurrence
    of its topic. Where people disagree it teaches nothing.
    """
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.words].append(answer)
    folded: list[Answer] = []
    for group in groups.values():
        answer = _fold(group)
        if settings.disliked_below < answer.score < settings.liked_above:
            excluded.add("people disagree on this answer", (a.interaction.id for a in group))
        else:
            folded.append(answer)
    return sorted(folded, key=lambda a: (a.interaction.created_utc, a.interaction.id, a.correction_id or ""))


def _fold(group: list[Answer]) -> Answer:
    # a reply stands for corrections of the same words, the latest for all
    head = max(group, key=lambda a: (a.correction_id is None, a.interaction.created_utc, a.interaction.id))
    confidence = sum(a.confidence for a in group)
    return replace(
        head,
        score=sum(a.confidence * a.score for a in group) / confidence,
        confidence=max(a.confidence for a in group),
        recurrence=max(a.recurrence for a in group),
        sources=merged(head.sources, *(a.sources for a in group)),
    )


def merged(first: tuple[str, ...], *others: tuple[str, ...]) -> tuple[str, ...]:
    """The ids of all, without repetition: those of `first` in their order, then the rest sorted."""
    rest = {i for ids in others for i in ids}
    return (*first, *sorted(rest.difference(first)))
