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
from ..memory.conversations import owner_of
from ..memory.signals import KEPT, assess, correction_of, events_of, label
from ..memory.topics import Recurrence, recurrence
from ..memory.types import Feedback, Interaction, Satisfaction, Signal
from ..settings import CensorSettings, DatasetSettings, Settings
from .prompts import Prompts, Words, plain
from .types import Excluded

Vectors = Mapping[str, NDArray[np.float32]]  # unit vectors of requests by interaction id
ClusterOf = Callable[[Interaction], str]
DISPUTED = "people disagree on this answer"
ONLY_MASKED = "the better answer differs only in what is masked"


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
    draft_id: str | None = None  # of what nobody said: the base wrote it

    @property
    def liked(self) -> bool:
        return self.score > 0


@dataclass(frozen=True)
class Gathered:
    answers: list[Answer]  # liked or disliked
    corrected: list[tuple[Answer, Answer]]  # what should have been said, and what was
    regenerated: list[tuple[Answer, Answer]]  # the reply that was asked for in place of another, and that one


@dataclass(frozen=True)
class Reading:
    """What a reader made of turns, by interaction; `reader_id` is empty where nothing was read.

    `fitted_on` are the interactions whose words it was fitted on here: those rated, and the turns around them. None for
    the one that ships.
    """

    reader_id: str = ""
    signals: Mapping[str, Signal] = field(default_factory=dict)
    fitted_on: frozenset[str] = frozenset()


UNREAD = Reading()


@dataclass(frozen=True)
class Exclusions:
    """Why an answer to these interactions is left out, collected along the way."""

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
    reading: Reading,
) -> Gathered:
    """Every reply that the Censor labels, every correction, and what was asked for in place of another.

    Recurrence and silence are as of the latest interaction; `reading` is what a reader made of unrated turns.
    """
    gathering = _Gathering(prompts, feedback, vectors, settings, excluded, reading)
    for interaction in prompts.interactions.values():
        gathering.take(interaction)
    for old, new in gathering.again:
        gathering.compare(old, new)
    return gathering.gathered


class _Gathering:
    """One pass over the memory. `again` are the replies for which another was asked for, each with that other one."""

    def __init__(
        self,
        prompts: Prompts,
        feedback: Mapping[str, Sequence[Feedback]],
        vectors: Vectors,
        settings: Settings,
        excluded: Exclusions,
        reading: Reading,
    ) -> None:
        self._prompts, self._feedback, self._vectors = prompts, feedback, vectors
        self._censor, self._excluded, self._reading = settings.censor, excluded, reading
        self._recurs = recurrences(prompts, settings.dataset)
        self._latest = max((i.created_utc for i in prompts.interactions.values()), default=0.0)
        old = (i for i in prompts.interactions.values() if "regenerated" in events_of(self._given(i)))
        self.again = [(i, new) for i in old if (new := prompts.another(i))]
        self._instead = {new.id for _, new in self.again if not new.turn}  # of no turn of their own
        self.gathered = Gathered([], [], [])

    def take(self, interaction: Interaction) -> None:
        """The reply, if it is labelled, and what should have been said instead; or why nothing of it is learnt."""
        given, satisfaction = self._given(interaction), self._met(interaction)
        labelled = label(satisfaction, self._censor) is not None
        said = any((f.rating, f.correction, f.comment) != (None, None, None) for f in given)
        if not (labelled or said):
            return
        if why := self._unfit(interaction) or self._in_place(interaction):
            self._excluded.add(why, [interaction.id])
            return
        reply, correction = self._answer(interaction, satisfaction), correction_of(interaction, given)
        better = self._correct(reply, correction) if correction else None
        if labelled and reply.completion:
            # else one person said of the same both yes and no
            if better is None or plain(better.completion) != plain(reply.completion):
                self.gathered.answers.append(reply)
        elif said and not correction:
            why = "rated neither good nor bad" if reply.completion else "the reply is empty"
            self._excluded.add(why, [interaction.id])

    def compare(self, old: Interaction, new: Interaction) -> None:
        """The pair, if the new reply was liked or kept or the old one disliked, and nothing speaks against it.

        That another was asked for is too little alone. A side that is not judged counts as neutral: half the margin.
        """
        met_new, met_old = self._met(new), self._met(old)
        better = label(met_new, self._censor) == "liked" or not KEPT.isdisjoint(events_of(self._given(new)))
        worse = label(met_old, self._censor) == "disliked"
        against = met_new.score < 0 or label(met_old, self._censor) == "liked"
        differ = new.reply.strip() != old.reply.strip() and new.reply.strip() and old.reply.strip()
        if against or not (better or worse) or not differ or self._in_place(old):
            return
        if faults := [(why, i.id) for i in (old, new) if (why := self._unfit(i))]:
            for why, interaction_id in faults:
                self._excluded.add(why, [interaction_id])
            return
        chosen, rejected = self._answer(new, met_new), self._answer(old, met_old)
        pair = chosen if better else _neutral(chosen), rejected if worse else _neutral(rejected)
        self.gathered.regenerated.append(pair)

    def _given(self, interaction: Interaction) -> Sequence[Feedback]:
        return self._feedback.get(interaction.id, ())

    def _met(self, interaction: Interaction) -> Satisfaction:
        given = self._given(interaction)
        return assessed(interaction, given, self._prompts, self._vectors, self._reading, now=self._latest)

    def _answer(self, interaction: Interaction, satisfaction: Satisfaction) -> Answer:
        prompts = self._prompts
        return Answer(
            interaction,
            interaction.reply.strip(),
            satisfaction.score,
            satisfaction.confidence,
            self._recurs[topic_of(interaction)].value,
            prompts.key(interaction),
            prompts.key_without_request(interaction),
            (*prompts.sources(interaction), *self._reaction(interaction, satisfaction)),
        )

    def _reaction(self, interaction: Interaction, satisfaction: Satisfaction) -> list[str]:
        """The turn whose words judged the reply, where nobody rated it."""
        reaction = None if satisfaction.explicit else self._prompts.reaction(interaction)
        return [reaction.id] if reaction else []

    def _correct(self, reply: Answer, correction: Feedback) -> Answer:
        better = _corrected(reply, correction)
        self.gathered.answers.append(better)
        if reply.completion:
            self.gathered.corrected.append((better, reply))
        return better

    def _unfit(self, interaction: Interaction) -> str | None:
        """Why nothing can be learnt from it, if so."""
        if self._prompts.repeats_forgotten(interaction):
            return "a memory that the reply or one before it was given is forgotten"
        if self._prompts.missing_turns(interaction):
            return "a turn that the reply was given is forgotten"
        asked = any(m["role"] != "assistant" for m in self._prompts.prompt(interaction))
        return None if asked else "a greeting that answers nobody"

    def _in_place(self, interaction: Interaction) -> str | None:
        in_place = interaction.id in self._instead
        return "it stands in place of a reply that its prompt would hold" if in_place else None


def assessed(
    interaction: Interaction,
    given: Sequence[Feedback],
    prompts: Prompts,
    vectors: Vectors,
    reading: Reading,
    now: float,
) -> Satisfaction:
    """How it went, with what the turns around it show as of `now`, seconds since 1970."""
    reaction = prompts.reaction(interaction)
    cosine = None
    if reaction and interaction.id in vectors and reaction.id in vectors:
        cosine = float(vectors[interaction.id] @ vectors[reaction.id])
    learned, silence = reading.signals.get(interaction.id), 0.0
    if prompts.is_last(interaction):
        silence = now - interaction.created_utc
    earlier = prompts.earlier_replies(interaction)
    return assess(interaction, given, reaction, cosine, earlier, learned, reading.reader_id, silence)


def _corrected(reply: Answer, correction: Feedback) -> Answer:
    text = (correction.correction or "").strip()
    return replace(reply, completion=text, score=1.0, confidence=1.0, correction_id=correction.id)


def _neutral(answer: Answer) -> Answer:
    return replace(answer, score=0.0, confidence=1.0)


def recurrences(prompts: Prompts, settings: DatasetSettings) -> dict[str, Recurrence]:
    interactions = prompts.interactions.values()
    visits = [(topic_of(i), owner_of(i), i.created_utc) for i in interactions]
    latest = max((i.created_utc for i in interactions), default=0.0)
    return recurrence(visits, latest, settings.half_life_days, settings.max_user_recurrence)


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
    return canonical_json(owner_of(interaction))


def choose_clusters(sizes: Mapping[str, int], settings: DatasetSettings) -> frozenset[str]:
    """About `held_out_share` of the answers in whole clusters, in the order of their hashed names.

    A cluster is passed over if it overshoots by more than half of itself; one alone is never held out. One that is too
    large to be held out at all does not count: else all the others would be held out in its place.
    """
    most = 2 * settings.held_out_share * sum(sizes.values())
    fitting = {name: size for name, size in sizes.items() if size <= most}
    target = settings.held_out_share * sum(fitting.values())
    taken, held = 0, set[str]()
    for name in sorted(fitting, key=lambda name: content_id([settings.seed, name])):
        if taken + sizes[name] / 2 <= target:
            held.add(name)
            taken += sizes[name]
    return frozenset(held) if len(sizes) > 1 else frozenset()


# -- folding ---


def fold(
    answers: Iterable[Answer], said: Callable[[Answer], Words], settings: CensorSettings, excluded: Exclusions
) -> list[Answer]:
    """One answer for each prompt and completion that are `said` in the same words.

    Its score is the mean over people by confidence, of each their own mean: who meets it often has no more votes. Its
    confidence is the highest. How often it was said counts through the recurrence of its topic. Where people disagree
    it teaches nothing.
    """
    groups: dict[Words, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[said(answer)].append(answer)
    folded: list[Answer] = []
    for group in groups.values():
        answer = _fold(group)
        if settings.disliked_below < answer.score < settings.liked_above:
            own = {a.interaction.id for a in group}
            excluded.add(DISPUTED if len(own) > 1 else ONLY_MASKED, own)
        else:
            folded.append(answer)
    return sorted(folded, key=lambda a: (a.interaction.created_utc, a.interaction.id, a.correction_id or ""))


def _fold(group: list[Answer]) -> Answer:
    # a reply stands for corrections of the same words, the latest for all
    head = max(group, key=lambda a: (a.correction_id is None, a.interaction.created_utc, a.interaction.id))
    people: dict[str, list[Answer]] = defaultdict(list)
    for answer in group:
        people[answer.interaction.user_id].append(answer)
    votes = [_vote(own) for own in people.values()]
    return replace(
        head,
        score=sum(confidence * score for score, confidence in votes) / sum(confidence for _, confidence in votes),
        confidence=max(a.confidence for a in group),
        recurrence=max(a.recurrence for a in group),
        sources=merged(head.sources, *(a.sources for a in group)),
    )


def _vote(own: Sequence[Answer]) -> tuple[float, float]:
    """Score and confidence of what one person showed of an answer."""
    mean = sum(a.confidence * a.score for a in own) / sum(a.confidence for a in own)
    return mean, max(a.confidence for a in own)


def merged(first: tuple[str, ...], *others: tuple[str, ...]) -> tuple[str, ...]:
    """The ids of all, without repetition: those of `first` in their order, then the rest sorted."""
    rest = {i for ids in others for i in ids}
    return (*first, *sorted(rest.difference(first)))
