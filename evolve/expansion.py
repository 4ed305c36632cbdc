"""Pairs that nobody gave: answers drawn from the base to remembered prompts, ranked by what the Censor predicts.

For the prompts of topics that come back, as many a topic as its recurrence earns, the base writes some drafts; where
the reader finds one likely to satisfy and another likely not to, they are a pair, marked `synthetic`. No request is
invented: more prompts of a topic are what others asked in it. Prompts of held-out users, and such that are judged
there, are never drafted for, and the pairs' weight together is held to `dataset.expand_share` of all.

Off by default: what is predicted is weaker than what people say. Even when it is on, only a reader that was fitted on
ratings given here predicts (`censor.refit_from`); its odds are calibrated on people it was not fitted on, so one that
has learnt nothing finds no margin and makes no pair. The base writes, and not the live adapter: what an adapter says
holds what taught it, and forgetting could not follow that.

The invariants: a draft lies in SQL beside its sources and is erased with any of them; the same memory with the same
base makes the same pairs, since what was drafted for a prompt is not drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from ..memory.conversations import draft_id, request_of
from ..memory.reader import Reader
from ..memory.signals import assess, label_of, learned_signal
from ..memory.topics import Recurrence
from ..memory.types import Draft, Interaction
from ..serving.engine import Engine, Sampling
from ..settings import Settings
from .answers import Answer, topic_of
from .contrasts import Contrast
from .prompts import Prompts, plain
from .reception import evidence, vectors_of
from .types import Prompt
from .weights import pair_margin

if TYPE_CHECKING:
    from ..memory.store import MemoryStore

DRAFTS = 4  # to a prompt
PROMPTS_A_PAIR = 4  # that are drafted for, since most find no clear margin
MOST_PROMPTS = 200  # a night
MARGIN = 0.25  # of two predicted scores, half their distance
LEAST_SESSIONS = 2  # that ask about a topic


@dataclass(frozen=True)
class Author:
    """Who writes drafts: the base, through whichever engine holds it. `write` gives one text a prompt."""

    base_id: str
    write: Callable[[Sequence[Prompt]], Sequence[str]]


def base_of(engine: Engine, settings: Settings, progress: Callable[[str], None]) -> Author:
    """The base that `engine` holds, writing at temperature 1 with the seed of the data set."""

    def write(prompts: Sequence[Prompt]) -> Sequence[str]:
        progress(f"drafting {len(prompts)} answers for synthetic pairs")
        sampling = Sampling(settings.serving.max_tokens, temperature=1.0, seed=settings.dataset.seed)
        return engine.generate(prompts, adapter=None, sampling=sampling)

    return Author(engine.base_id, write)


class Expansion:
    """Drafting and ranking for one night. `reader` is the one that read this night."""

    def __init__(self, store: MemoryStore, author: Author, reader: Reader, settings: Settings, now: float) -> None:
        self._store, self._author, self._reader = store, author, reader
        self._settings, self._now = settings, now

    def contrasts(
        self, prompts: Prompts, open_to: Sequence[Interaction], recurs: Mapping[str, Recurrence], given: int
    ) -> list[Contrast]:
        """Contrasts to prompts among `open_to`, few enough beside so many that people gave; frequent topics first."""
        share = self._settings.dataset.expand_share
        wanted = int(share / (1 - share) * given)
        if not (wanted and self._reader.at_home):
            return []
        asked = list(islice(by_recurrence(open_to, recurs), min(MOST_PROMPTS, PROMPTS_A_PAIR * wanted)))
        drafts = self._drafted(prompts, asked)
        answers = self._predicted(prompts, asked, drafts, recurs)
        found = (self._clear(answers[i.id]) for i in asked if i.id in answers)
        return list(islice(filter(None, found), wanted))

    def _drafted(self, prompts: Prompts, asked: Sequence[Interaction]) -> dict[str, list[Draft]]:
        """By interaction; what is missing is written and kept."""
        held = self._held(asked)
        missing = [i for i in asked if i.id not in held]
        texts = iter(self._author.write([prompts.prompt(i) for i in missing for _ in range(DRAFTS)]) if missing else ())
        self._store.keep_drafts([self._draft(prompts, i, next(texts)) for i in missing for _ in range(DRAFTS)])
        return self._held(asked)

    def _held(self, asked: Sequence[Interaction]) -> dict[str, list[Draft]]:
        held = self._store.drafts([i.id for i in asked])
        own = {i: [d for d in drafts if d.base_id == self._author.base_id] for i, drafts in held.items()}
        return {i: drafts for i, drafts in own.items() if drafts}

    def _draft(self, prompts: Prompts, interaction: Interaction, text: str) -> Draft:
        base_id, text = self._author.base_id, text.replace("\0", "").strip()
        named = draft_id(interaction.id, base_id, text)
        return Draft(named, interaction.id, text, base_id, prompts.sources(interaction), self._now)

    def _predicted(
        self,
        prompts: Prompts,
        asked: Sequence[Interaction],
        drafts: Mapping[str, Sequence[Draft]],
        recurs: Mapping[str, Recurrence],
    ) -> dict[str, list[Answer]]:
        """The drafts as answers with the satisfaction that the Censor predicts, by interaction."""
        written = [(i, draft) for i in asked for draft in drafts.get(i.id, ()) if draft.text]
        exchanges = {d.id: replace(prompts.exchange(i), reply=d.text, reaction=None) for i, d in written}
        vector_of = vectors_of(self._store, exchanges, {})
        odds = evidence(self._reader, list(exchanges.values()), vector_of)
        found: dict[str, list[Answer]] = {}
        for (interaction, draft), o in zip(written, odds, strict=True):
            made = self._answer(prompts, interaction, draft, float(o), recurs[topic_of(interaction)].value)
            found.setdefault(interaction.id, []).append(made)
        return found

    def _answer(self, prompts: Prompts, interaction: Interaction, draft: Draft, odds: float, recurs: float) -> Answer:
        learned = learned_signal(odds, self._reader.at_home)
        earlier = prompts.earlier_replies(interaction)
        met = assess(replace(interaction, reply=draft.text), (), None, None, earlier, learned, self._reader.id)
        keys = prompts.key(interaction), prompts.key_without_request(interaction)
        sources = prompts.sources(interaction)
        return Answer(interaction, draft.text, met.score, met.confidence, recurs, *keys, sources, draft_id=draft.id)

    def _clear(self, answers: Sequence[Answer]) -> Contrast | None:
        """The best against the worst, if the one should be liked and the other disliked, by a clear margin."""
        ranked = sorted(answers, key=lambda a: (-a.score, str(a.draft_id)))
        best, worst, censor = ranked[0], ranked[-1], self._settings.censor
        labels = [label_of(a.score, 1.0, censor) for a in (best, worst)]
        clear = pair_margin(best.score, worst.score) >= MARGIN and labels == ["liked", "disliked"]
        return Contrast(best, worst, "synthetic") if clear else None


def by_recurrence(interactions: Iterable[Interaction], recurs: Mapping[str, Recurrence]) -> list[Interaction]:
    """Of topics that come back, the latest of each wording, in an order in which each topic has its share (D'Hondt)."""
    latest = sorted(interactions, key=lambda i: (-i.created_utc, i.id))
    worded: dict[str, dict[str, Interaction]] = {}
    for interaction in latest:
        topic = topic_of(interaction)
        if request_of(interaction.turn) and recurs[topic].sessions >= LEAST_SESSIONS:
            worded.setdefault(topic, {}).setdefault(plain(interaction.text), interaction)
    seats = [
        (-recurs[topic].value / (n + 1), interaction.id, interaction)
        for topic, asked in worded.items()
        for n, interaction in enumerate(asked.values())
    ]
    return [interaction for _, _, interaction in sorted(seats, key=lambda seat: seat[:2])]
