"""Reading unrated turns with the learned part of the Censor, and fitting it anew on the ratings given here.

The reader that ships knows other people and other bots. With `censor.refit_from` ratings from enough people (or
sessions) a reader is fitted on those, from nothing, every night: so it has never seen what was forgotten. Its evidence
is how far a turn stands from what is usual here, if it stands on that side of one half, too. Its coefficients lie in
the home as `censor-<id>.safetensors`, of the last night only, and are erased whenever anything is forgotten. The
invariant: the same memory is read with the same numbers, whenever it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..memory.cues import Exchange
from ..memory.reader import (
    FOLDS,
    PARTIAL,
    Reader,
    features,
    fit_reader,
    load_reader,
    readers_in,
    shipped_reader,
)
from ..memory.signals import asked_anew, explicit_signals, learned_signal
from ..memory.types import Feedback, Interaction, Satisfaction
from ..settings import CensorSettings
from .answers import UNREAD, Reading, Vectors, assessed, session_cluster
from .prompts import Prompts

if TYPE_CHECKING:
    from ..memory.store import MemoryStore

Given = Mapping[str, Sequence[Feedback]]


def read(
    store: MemoryStore,
    prompts: Prompts,
    feedback: Given,
    vectors: Vectors,
    settings: CensorSettings,
    teaches: Callable[[Interaction], bool] = lambda _: True,
) -> Reading:
    """The latest `read_turns` unrated replies, read. Nothing if the store's vectors are of another embedder.

    A reader is fitted on ratings of what `teaches` alone: what is held out shall reach nothing that is taught.
    """
    reading = _read(store, prompts, feedback, vectors, settings, teaches)
    if not reading.fitted_on:
        for old in readers_in(store.settings.home):
            old.unlink(missing_ok=True)  # who forgets erases it, too
    return reading


def _read(
    store: MemoryStore,
    prompts: Prompts,
    feedback: Given,
    vectors: Vectors,
    settings: CensorSettings,
    teaches: Callable[[Interaction], bool],
) -> Reading:
    shipped = shipped_reader()
    if not settings.read_turns or store.embedder.name != shipped.embedder:
        return UNREAD
    recent = sorted(prompts.interactions.values(), key=lambda i: (i.created_utc, i.id), reverse=True)
    rated = {i.id: score for i in recent if (score := rating_of(i, feedback.get(i.id, ()))) is not None}
    unread = [i for i in recent if i.id not in rated and i.reply.strip()][: settings.read_turns]
    if not unread:
        return UNREAD
    most = max(settings.read_turns, settings.refit_from)
    taught = [i for i in recent if i.id in rated and i.reply.strip() and teaches(i)][:most]
    taught = taught if len(taught) >= settings.refit_from else []
    exchanges = {i.id: _exchange(i, prompts, feedback) for i in (*unread, *taught)}
    vector_of = vectors_of(store, exchanges, _requests(prompts, vectors))
    reader = refitted(taught, rated, exchanges, vector_of, shipped) or shipped
    fitted_on = frozenset(i for t in taught for i in prompts.exchanged(t)) if reader.at_home else frozenset()
    if reader.at_home:
        store.keep_reader(reader, fitted_on)
    reading = _reading(reader, {i.id: exchanges[i.id] for i in unread}, vector_of)
    return replace(reading, fitted_on=fitted_on)


def met(store: MemoryStore, interaction_id: str, settings: CensorSettings) -> Satisfaction:
    """How that reply was met, as the Censor of now has it: with the reader of the last night, else the one that ships.

    NotFound if there is no such interaction.
    """
    session, feedback = store.session_of(interaction_id), store.feedback()
    prompts, reading = Prompts(session, {}), UNREAD
    asked, given = prompts.interactions[interaction_id], feedback.get(interaction_id, ())
    inferred = rating_of(asked, given) is None
    vectors = store.request_vectors([i.id for i in session]) if inferred else {}
    reader = reader_at_hand(store) if settings.read_turns and asked.reply.strip() and inferred else None
    if reader:
        exchanges = {asked.id: _exchange(asked, prompts, feedback)}
        reading = _reading(reader, exchanges, vectors_of(store, exchanges, _requests(prompts, vectors)))
    return assessed(asked, given, prompts, vectors, reading, store.clock())


def reader_at_hand(store: MemoryStore) -> Reader | None:
    """The reader that reads now, without fitting one anew; none for vectors of another embedder."""
    kept = [load_reader(path) for path in readers_in(store.settings.home) if PARTIAL not in path.name]
    reader = kept[0] if kept else shipped_reader()
    return reader if reader.embedder == store.embedder.name else None


def _reading(reader: Reader, exchanges: Mapping[str, Exchange], vector_of: Vectors) -> Reading:
    odds = evidence(reader, list(exchanges.values()), vector_of)
    found = {i: learned_signal(float(o), reader.at_home) for i, o in zip(exchanges, odds, strict=True)}
    return Reading(reader.id, {name: signal for name, signal in found.items() if signal})


def evidence(reader: Reader, exchanges: Sequence[Exchange], vector_of: Vectors) -> NDArray[np.float64]:
    """How far the log-odds that each answer satisfied are from what is usual.

    0 where they say otherwise: what rather satisfied than not is not disliked for having done so less than others.
    """
    odds = reader.log_odds(exchanges, vector_of)
    beyond = odds - reader.usual
    return np.where(odds * beyond > 0, beyond, 0.0)


def _exchange(interaction: Interaction, prompts: Prompts, feedback: Given) -> Exchange:
    """The answer in its place; the request that a button sent once more is nobody's reaction."""
    exchange = prompts.exchange(interaction)
    anew = asked_anew(interaction, feedback.get(interaction.id, ()), prompts.reaction(interaction))
    return replace(exchange, reaction=None) if anew else exchange


def _usual(taught: Sequence[Interaction], rated: Mapping[str, float]) -> float:
    """Log-odds that an answer satisfies here. Where nine of ten do, nine in ten is no evidence for any of them."""
    satisfied = sum((rated[i.id] + 1) / 2 for i in taught) / len(taught)
    return log(satisfied / (1 - satisfied))


def rating_of(interaction: Interaction, given: Sequence[Feedback]) -> float | None:
    explicit = explicit_signals(interaction, given)
    return sum(s.value for s in explicit) / len(explicit) if explicit else None


def refitted(
    taught: Sequence[Interaction],
    rated: Mapping[str, float],
    exchanges: Mapping[str, Exchange],
    vector_of: Vectors,
    shipped: Reader,
) -> Reader | None:
    """A reader fitted on `taught`; None if they are too few, of one opinion, or of too few people and sessions."""
    satisfied = np.array([(rated[i.id] + 1) / 2 for i in taught])
    groups = next((g for g in _groupings(taught) if len(set(g)) >= FOLDS), None)
    if groups is None or satisfied.std() < 1e-6:
        return None
    found = features([exchanges[i.id] for i in taught], vector_of, shipped.coherence)
    target = (satisfied - satisfied.mean()) / satisfied.std()
    reader = fit_reader(found, target, satisfied, groups, shipped.coherence, shipped.embedder)
    return replace(reader, usual=_usual(taught, rated))


def _groupings(interactions: Sequence[Interaction]) -> tuple[list[str], list[str]]:
    return [i.user_id for i in interactions], [session_cluster(i) for i in interactions]


def vectors_of(store: MemoryStore, exchanges: Mapping[str, Exchange], held: Vectors) -> dict[str, NDArray[np.float32]]:
    """By text, of all that the exchanges say: what is not `held` is embedded."""
    texts = {text for exchange in exchanges.values() for text in exchange.texts if text.strip()}
    missing = sorted(texts - held.keys())
    return dict(held) | dict(zip(missing, store.embedder.embed(missing), strict=True))


def _requests(prompts: Prompts, vectors: Vectors) -> dict[str, NDArray[np.float32]]:
    return {i.text: vectors[i.id] for i in prompts.interactions.values() if i.id in vectors}
