"""The Censor: what the words of a conversation say about how an answer was met.

What a person said outright (a thumb, a rating, a correction, an edit) decides alone. Without it the next turn, the
reply itself and what the app saw done with it (copied, accepted, regenerated) are read for cues,
`score = 2σ(b + Σ a_j s_j) − 1` over signals s_j in [-1, 1], with hand-set coefficients a_j and b = 0: no cue, no
opinion. One of the signals is what a fitted `reader.Reader` makes of the turn: its log-odds, capped at a_j. The
confidence grows with the evidence and falls when cues disagree:
`c = .8 · (1 − exp(−Σ|a_j s_j| / 2)) · |Σ a_j s_j| / Σ|a_j s_j|`. With the default `min_confidence` of .5 the evidence
must reach 1.96, so the invariant: no weak cue (a_j < 1.96) labels a turn alone, the shipped reader neither, and no
guess outranks a thumb.

The times of turns (`delay`, `session_end`, `abandoned`) are evidence of weight 0, shown and not counted: no open set
has both times and ratings to fit them on.

Not covered: languages other than English, irony.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from math import exp, log1p
from typing import Literal

import numpy as np

from ..content import content_id
from ..settings import CensorSettings
from .cues import CONFUSION, GRATITUDE, REFUSAL, THANKS_FOR_NOTHING, is_correction, plain, sentiment, vocabulary
from .types import Feedback, Interaction, Satisfaction, Signal

Label = Literal["liked", "disliked"]

RULES = 4  # to be raised with any change to what is computed here or in `cues` that shows in none of their numbers

COEFFICIENTS = {
    # the next turn
    "correction_cue": 2.4,  # "no, I meant", "that's wrong"
    "gratitude": 1.5,  # thanks close a conversation too, whatever the answer was
    "sentiment": 1.2,
    "confusion": 1.2,  # "what?", "that makes no sense"
    "rephrasing": 1.5,  # the same request again; a follow-up question may look like it
    # what was said of the reply without a thumb
    "comment": 3.0,
    # what was done with the reply, as the app reports it
    "copied": 1.2,  # to be used, or to be complained of
    "accepted": 1.5,
    "regenerated": 1.5,  # out of curiosity, too
    # when it was met: not fitted, so not counted
    "delay": 0.0,
    "session_end": 0.0,
    "abandoned": 0.0,
    # the reply
    "empty": 4.0,
    "refusal": 1.2,  # sometimes right to refuse
    "repeated": 1.5,
    # the whole turn, read by a model: weak on people it was not fitted on, see censor.md
    "learned": 1.5,
    "learned_at_home": 3.0,
}
INFERRED_CEILING = 0.8  # a guess is never as sure as a thumb
REPHRASING_FROM, REPHRASING_FULL = 0.7, 0.95  # cosines of two requests
MIN_WORDS_TO_REPHRASE = 3  # "yes" after "yes" is no rephrased request
DONE = {"copied": 1.0, "accepted": 1.0, "regenerated": -1.0}
KEPT = frozenset({"copied", "accepted"})
LONGEST_EDIT = 2000  # words that are compared
LONGEST_DELAY = 3600.0  # seconds
SESSION_OVER = 1800.0  # seconds in which nobody says anything more


@cache
def censor_id(reader_id: str = "") -> str:
    """The version of the Censor: the content id of its rules, numbers and words, and of the reader beside them."""
    numbers = [INFERRED_CEILING, REPHRASING_FROM, REPHRASING_FULL, MIN_WORDS_TO_REPHRASE, LONGEST_EDIT]
    return content_id([RULES, COEFFICIENTS, numbers, vocabulary(), reader_id])


def assess(
    interaction: Interaction,
    feedback: Sequence[Feedback],
    reaction: Interaction | None,
    cosine: float | None,
    earlier_replies: Collection[str] = (),
    learned: Signal | None = None,
    reader_id: str = "",
    silence: float = 0.0,
) -> Satisfaction:
    """How `interaction` went.

    `reaction` is the next turn of the session, `cosine` that of the two requests, `learned` what the reader of that id
    made of it, `silence` the seconds since the last turn of the session, if it is this one.
    """
    censor = censor_id(reader_id)
    explicit = explicit_signals(interaction, feedback)
    if explicit:
        score = sum(s.value for s in explicit) / len(explicit)
        return Satisfaction(interaction.id, score, 1.0, explicit, explicit=True, censor=censor)
    if asked_anew(interaction, feedback, reaction):
        reaction = None
    signals = (
        *reply_signals(interaction, earlier_replies),
        *reaction_signals(interaction, reaction, cosine),
        *comment_signals(feedback),
        *event_signals(feedback),
        *timing_signals(interaction, reaction, silence),
        *([learned] if learned else []),
    )
    score, confidence = combine(signals)
    return Satisfaction(interaction.id, score, confidence, signals, explicit=False, censor=censor)


def label(satisfaction: Satisfaction, settings: CensorSettings) -> Label | None:
    """`liked`, `disliked`, or None where we do not know or it was in between."""
    return label_of(satisfaction.score, satisfaction.confidence, settings)


def label_of(score: float, confidence: float, settings: CensorSettings) -> Label | None:
    if confidence < settings.min_confidence or settings.disliked_below < score < settings.liked_above:
        return None
    return "liked" if score >= settings.liked_above else "disliked"


def combine(signals: Sequence[Signal]) -> tuple[float, float]:
    """Score and confidence of inferred signals; the formulas are in the module's docstring."""
    terms = [COEFFICIENTS[s.name] * s.value for s in signals]
    total, evidence = sum(terms), sum(abs(t) for t in terms)
    if evidence == 0:
        return 0.0, 0.0
    score = 2 / (1 + exp(-total)) - 1
    return score, INFERRED_CEILING * (1 - exp(-evidence / 2)) * abs(total) / evidence


def learned_signal(log_odds: float, at_home: bool) -> Signal | None:
    """A reader's log-odds that the answer satisfied as a signal; None where it has no opinion."""
    name = "learned_at_home" if at_home else "learned"
    value = round(max(-1.0, min(1.0, log_odds / COEFFICIENTS[name])), 3)
    return Signal(name, value) if value else None


def explicit_signals(interaction: Interaction, feedback: Sequence[Feedback]) -> tuple[Signal, ...]:
    """The latest rating, and −1 for a correction or minus the share of words that an edit changed.

    The score is their mean, so praise with a correction is 0.
    """
    latest = sorted(feedback, key=lambda f: (f.created_utc, f.id))
    ratings = [f.rating for f in latest if f.rating is not None]
    signals = [Signal("rating", max(-1.0, min(1.0, ratings[-1])))] if ratings else []
    correction = correction_of(interaction, latest)
    if correction and correction.event == "edited":
        signals.append(Signal("edit", -changed_share(interaction.reply, correction.correction or "")))
    elif correction:
        signals.append(Signal("correction", -1.0))
    return tuple(signals)


def changed_share(reply: str, edited: str) -> float:
    """0 for the same words to 1 for none in common in the same order; of the first LONGEST_EDIT words.

    1 − 2·L / (n + m), with L the length of the longest common subsequence, in n steps over m words each.
    """
    said, meant = (text.split()[:LONGEST_EDIT] for text in (reply, edited))
    if not said or not meant:
        return float(said != meant)
    numbers = {word: n for n, word in enumerate({*said, *meant})}
    against = np.array([numbers[word] for word in meant])
    common = np.zeros(len(meant) + 1, dtype=np.int32)  # with as many of `meant`, and the words of `said` up to here
    for word in said:
        longer = np.maximum(common[1:], common[:-1] + (against == numbers[word]))
        common[1:] = np.maximum.accumulate(longer)
    return round(1 - 2 * int(common[-1]) / (len(said) + len(meant)), 3)


def correction_of(interaction: Interaction, feedback: Sequence[Feedback]) -> Feedback | None:
    """The latest feedback that says what the answer should have been; None where that is what it was."""
    said = [f for f in feedback if (f.correction or "").strip()]
    latest = max(said, key=lambda f: (f.created_utc, f.id), default=None)
    return latest if latest and str(latest.correction).strip() != interaction.reply.strip() else None


def comment_signals(feedback: Sequence[Feedback]) -> tuple[Signal, ...]:
    value = sentiment(plain(" ".join(f.comment or "" for f in feedback)))
    return (Signal("comment", value),) if value else ()


def event_signals(feedback: Sequence[Feedback]) -> tuple[Signal, ...]:
    """What was done with the reply, each once however often."""
    done = events_of(feedback)
    return tuple(Signal(name, value) for name, value in DONE.items() if name in done)


def events_of(feedback: Sequence[Feedback]) -> frozenset[str]:
    return frozenset(given.event for given in feedback if given.event)


def asked_anew(interaction: Interaction, feedback: Sequence[Feedback], reaction: Interaction | None) -> bool:
    """Whether the next turn is the same request, sent once more by the button that regenerates: nobody's reaction."""
    again = reaction is not None and plain(reaction.text) == plain(interaction.text)
    return again and "regenerated" in events_of(feedback)


def timing_signals(interaction: Interaction, reaction: Interaction | None, silence: float) -> tuple[Signal, ...]:
    """`delay` from this reply to the next, 0 to 1 at LONGEST_DELAY; or that the session ended, and at a question."""
    if reaction is not None:
        waited = min(LONGEST_DELAY, max(0.0, reaction.created_utc - interaction.created_utc))
        return (Signal("delay", round(log1p(waited) / log1p(LONGEST_DELAY), 3)),) if waited else ()
    if silence < SESSION_OVER:
        return ()
    asked = interaction.reply.rstrip().endswith("?")
    return (Signal("session_end", 1.0), *([Signal("abandoned", -1.0)] if asked else []))


def reply_signals(interaction: Interaction, earlier_replies: Collection[str]) -> tuple[Signal, ...]:
    reply = plain(interaction.reply)
    if not reply:
        return (Signal("empty", -1.0),)
    found = []
    if REFUSAL.search(reply):
        found.append(Signal("refusal", -1.0))
    if any(reply == plain(earlier) for earlier in earlier_replies) or reply == plain(interaction.text):
        found.append(Signal("repeated", -1.0))
    return tuple(found)


def reaction_signals(
    interaction: Interaction, reaction: Interaction | None, cosine: float | None
) -> tuple[Signal, ...]:
    if reaction is None:
        return ()
    said = plain(reaction.text)
    answers = interaction.reply.rstrip().endswith("?")
    values = {
        "correction_cue": -1.0 if is_correction(said, answers) else 0.0,
        "confusion": -1.0 if CONFUSION.search(said) else 0.0,
        "gratitude": 1.0 if GRATITUDE.search(said) and not THANKS_FOR_NOTHING.search(said) else 0.0,
        "sentiment": sentiment(said),
        "rephrasing": rephrasing(plain(interaction.text), said, cosine),
    }
    return tuple(Signal(name, value) for name, value in values.items() if value)


def rephrasing(request: str, again: str, cosine: float | None) -> float:
    """0 to −1 as the cosine of two requests goes from REPHRASING_FROM to REPHRASING_FULL."""
    if min(len(request.split()), len(again.split())) < MIN_WORDS_TO_REPHRASE:
        return 0.0
    if request == again:
        return -1.0
    if cosine is None:
        return 0.0
    return -max(0.0, min(1.0, (cosine - REPHRASING_FROM) / (REPHRASING_FULL - REPHRASING_FROM)))
