"""The Censor: what the words of a conversation say about how an answer was met.

What a person said outright (a thumb, a rating, a correction) decides alone. Without it the next turn and the reply
itself are read for cues, `score = 2σ(b + Σ a_j s_j) − 1` over signals s_j in [-1, 1], with hand-set coefficients a_j
and b = 0: no cue, no opinion. The confidence grows with the evidence and falls when cues disagree:
`c = .8 · (1 − exp(−Σ|a_j s_j| / 2)) · |Σ a_j s_j| / Σ|a_j s_j|`. With the default `min_confidence` of .5 the evidence
must reach 1.96, so the invariant: no weak cue (a_j < 1.96) labels a turn alone, and no guess outranks a thumb.

Not covered: languages other than English, irony, delay and abandonment, a model fitted on rated turns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from math import exp
from typing import Literal

from ..settings import CensorSettings
from .types import Feedback, Interaction, Satisfaction, Signal

Label = Literal["liked", "disliked"]

COEFFICIENTS = {
    # the next turn
    "correction_cue": 2.4,  # "no, I meant", "that's wrong"
    "gratitude": 1.5,  # thanks close a conversation too, whatever the answer was
    "sentiment": 1.2,
    "confusion": 1.2,  # "what?", "that makes no sense"
    "rephrasing": 1.5,  # the same request again; a follow-up question may look like it
    # what was said of the reply without a thumb
    "comment": 3.0,
    # the reply
    "empty": 4.0,
    "refusal": 1.2,  # sometimes right to refuse
    "repeated": 1.5,
}
INFERRED_CEILING = 0.8  # a guess is never as sure as a thumb
REPHRASING_FROM, REPHRASING_FULL = 0.7, 0.95  # cosines of two requests
MIN_WORDS_TO_REPHRASE = 3  # "yes" after "yes" is no rephrased request


def assess(
    interaction: Interaction,
    feedback: Sequence[Feedback],
    reaction: Interaction | None,
    cosine: float | None,
    earlier_replies: Collection[str] = (),
) -> Satisfaction:
    """How `interaction` went. `reaction` is the next turn of the session and `cosine` that of the two requests."""
    explicit = explicit_signals(interaction, feedback)
    if explicit:
        score = sum(s.value for s in explicit) / len(explicit)
        return Satisfaction(interaction.id, score, 1.0, explicit, explicit=True)
    signals = (
        *reply_signals(interaction, earlier_replies),
        *reaction_signals(interaction, reaction, cosine),
        *comment_signals(feedback),
    )
    score, confidence = combine(signals)
    return Satisfaction(interaction.id, score, confidence, signals, explicit=False)


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


def explicit_signals(interaction: Interaction, feedback: Sequence[Feedback]) -> tuple[Signal, ...]:
    """The latest rating, and −1 for a correction; the score is their mean, so praise with a correction is 0."""
    latest = sorted(feedback, key=lambda f: (f.created_utc, f.id))
    ratings = [f.rating for f in latest if f.rating is not None]
    signals = [Signal("rating", max(-1.0, min(1.0, ratings[-1])))] if ratings else []
    if correction_of(interaction, latest):
        signals.append(Signal("correction", -1.0))
    return tuple(signals)


def correction_of(interaction: Interaction, feedback: Sequence[Feedback]) -> Feedback | None:
    """The latest feedback that says what the answer should have been, and says something else than it was."""
    for given in sorted(feedback, key=lambda f: (f.created_utc, f.id), reverse=True):
        text = (given.correction or "").strip()
        if text and text != interaction.reply.strip():
            return given
    return None


def comment_signals(feedback: Sequence[Feedback]) -> tuple[Signal, ...]:
    value = sentiment(_plain(" ".join(f.comment or "" for f in feedback)))
    return (Signal("comment", value),) if value else ()


def reply_signals(interaction: Interaction, earlier_replies: Collection[str] = ()) -> tuple[Signal, ...]:
    reply = _plain(interaction.reply)
    if not reply:
        return (Signal("empty", -1.0),)
    found = []
    if REFUSAL.search(reply):
        found.append(Signal("refusal", -1.0))
    if any(reply == _plain(earlier) for earlier in earlier_replies) or reply == _plain(interaction.text):
        found.append(Signal("repeated", -1.0))
    return tuple(found)


def reaction_signals(
    interaction: Interaction, reaction: Interaction | None, cosine: float | None
) -> tuple[Signal, ...]:
    if reaction is None:
        return ()
    said = _plain(reaction.text)
    # "No." to "Did you mean the rear wheel?" answers a question and corrects nothing
    answers = interaction.reply.rstrip().endswith("?")
    values = {
        "correction_cue": -1.0 if CORRECTION.search(said) or (DENIAL.match(said) and not answers) else 0.0,
        "confusion": -1.0 if CONFUSION.search(said) else 0.0,
        "gratitude": 1.0 if GRATITUDE.search(said) and not THANKS_FOR_NOTHING.search(said) else 0.0,
        "sentiment": sentiment(said),
        "rephrasing": rephrasing(_plain(interaction.text), said, cosine),
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


def sentiment(text: str) -> float:
    """Praise minus blame by word, in [-1, 1]; a negation within two words before turns a word's sign."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text)
    total = 0
    for i, word in enumerate(words):
        sign = (word in PRAISE) - (word in BLAME)
        total += -sign if sign and NEGATIONS.intersection(words[max(0, i - 2) : i]) else sign
    return max(-1.0, min(1.0, total / 2))


def _plain(text: str) -> str:
    """Lower case, single spaces, straight apostrophes."""
    return " ".join(text.lower().replace("’", "'").split())


CORRECTION = re.compile(
    r"\b(?:"
    r"i meant\b|(?:that'?s|that is|this is|it'?s|you'?re|you are) (?:just |simply |still |also )?"
    r"(?:wrong|incorrect|not (?:right|correct|true|what i))\b"
    r"|not what i (?:asked|meant|said|wanted)\b|didn'?t (?:answer|ask)\b|did not (?:answer|ask)\b"
    r"|answer (?:my|the) question\b|you (?:misunderstood|misread|got (?:that|it) wrong)\b"
    r"|(?:i|we) (?:already|just) (?:told|said|asked)\b|(?:like|as) i (?:already )?said\b|try again\b"
    r"|wrong (?:answer|one)\b|you (?:already|just) (?:said|asked|told)\b|(?:are|do) you even (?:listen|read)"
    r")"
)
DENIAL = re.compile(r"(?:no|nope|nah|wrong|incorrect)(?:$|[,.!;:-]+(?:$|\s)|\s+(?:i|not|that|it|you)\b)")
CONFUSION = re.compile(
    r"^(?:what|huh|eh|sorry|pardon|excuse me|come again)\s*[?!.]+|\?\?|\bmak(?:es?|ing) no sense\b"
    r"|\b(?:what do you mean|do(?:n'?t| not) understand|what are you (?:talking|saying))\b"
    r"|\bdo(?:es)?(?:n'?t| not) make (?:any )?sense\b"
)
GRATITUDE = re.compile(r"\b(?:thanks|thank you|thank u|thx|ty|cheers|much appreciated|appreciate (?:it|that|the))\b")
THANKS_FOR_NOTHING = re.compile(r"\b(?:no,? (?:thanks|thank you)|thank(?:s| you) (?:for nothing|but))\b")
REFUSAL = re.compile(
    r"\b(?:i (?:can(?:'?t|not)|am (?:unable|not able)|'?m (?:unable|not able)|won'?t be able)\b.{0,20}"
    r"\b(?:help|assist|answer|provide|do that|discuss)|as an ai\b|i (?:do not|don'?t) (?:know|understand)\b)"
)
NEGATIONS = frozenset("not no never isn't wasn't don't doesn't didn't can't couldn't ain't hardly".split(" "))
_PRAISE = """
amazing awesome brilliant clear correct cool delighted excellent exactly fantastic good great glad happy helped helpful
interesting impressive kind like love lovely nice perfect perfectly pleased right smart solved super sweet useful
wonderful works worked wow
"""
_BLAME = """
annoying awful bad boring broken confused confusing crap creepy disappointed disappointing dumb frustrating garbage hate
horrible idiot incorrect irrelevant lame lie lying mistake nonsense pathetic pointless ridiculous rude sad silly stupid
terrible ugh unhelpful useless weird worse worst wrong wtf
"""
PRAISE, BLAME = frozenset(_PRAISE.split()), frozenset(_BLAME.split())
