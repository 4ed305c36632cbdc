"""What users state of themselves: facts and preferences, by conservative rules. Pure.

A statement has a `subject`, of which one value holds at a time, so that a newer one supersedes an older: "I live in
Oslo" and "I moved to Rome" are both of `home`. The rules want a plain first-person sentence and a value of the shape
that its subject has (a birthday is a date), and would rather miss one than keep junk, which would end what is true:
questions, wishes, conditions, quotations and what hangs on the talk around it ("I like the ending") are passed over.
English only. What is kept is the user's sentence, word for word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from .words import MONTHS

StatementKind = Literal["fact", "preference"]

MOST_WORDS = 30  # of a sentence
MOST_VALUE_WORDS = 8
MOST_SUBJECT = 200  # characters
MOST_TEXT = 2000  # characters of a turn that are read; what is longer was pasted rather than said
MOST_QUOTED = 100_000  # with what is quoted in it


@dataclass(frozen=True)
class Statement:
    kind: StatementKind
    subject: str  # such as `home`, `favourite colour`, `taste: olives`
    value: str  # casefolded, to be compared
    text: str  # the sentence


@dataclass(frozen=True)
class Rule:
    kind: StatementKind
    subject: str  # `{0}` stands for the first group
    pattern: re.Pattern[str]
    value: str  # empty: the last group


def _rule(kind: StatementKind, subject: str, *parts: str, value: str = "") -> Rule:
    return Rule(kind, subject, re.compile("".join((OPENING, *parts, END)), re.IGNORECASE), value)


OPENING = (
    r"^(?:(?:and|but|so|well|oh|yes|yeah|yep|no|nope|ok|okay|hi|hello|hey|also|actually|by the way|honestly|personally"
    r"|please)[, ]+)*"
)
END = r"(?:\s*,?\s*(?:now|these days|at the moment))?\s*[.!]*$"
ADVERBS = r"(?:(?:really|just|also|still|now|currently|actually|absolutely|do|personally|originally)\s+)*"
I_AM, I_DO, MY = r"i(?:['’]m|\s+am)\s+" + ADVERBS, r"i\s+" + ADVERBS, r"my\s+"
SINCE = r"(?:\s+(?:last|this|in|a|two|three)\s[\w ]+)?"
BREAKS = r"it|this|that|them|these|those|to|you|your|when|if|how|what|because|but"
THING = rf"((?:(?!\b(?:{BREAKS})\b)[^,.;:!?()])+)"
# What follows "is" and is said of a thing, where its value would be another word. In small letters: Gone is a film.
NO_VALUE = (
    r"(?-i:(?:not|no|never|none|being|becoming|getting|going|coming|dying|killing|driving|playing|losing|winning|broken"
    r"|dead|down|gone|closed|lost|missing|wrong|full|changed|unknown|different|terrible|awful|stressful)\b)"
)
NO_NAME = (
    rf"(?:{NO_VALUE}|(?-i:(?:misspel\w+|mispronounced|mistaken|spel\w+|written|pronounced|listed|taken|known|hard"
    r"|difficult|easy|long|short|common|rare|unusual|unique|weird|strange|funny|boring|ugly|pretty|important|irrelevant"
    r"|private|secret|confidential|fine|good|great|bad|ok|okay|really|very|so|too|quite|rather|almost|already|still"
    r"|again|only|just|often|always|every|everywhere|here|there|away|back|up|off|out|on|in|at|under|over|for|from|with"
    r"|without|of|by|after|before|near|next|to|as|like|today|tomorrow|tonight|soon|later|attached|above|below)\b))"
)
WORD = rf"(?!{NO_NAME})[^\W\d_][\w'’-]*"
# Two words in any letters, since people type small ones, or up to four in capitals.
NAME = (
    rf"((?!not?\b|never\b)(?:{WORD}(?:\s+{WORD})?"
    r"|(?-i:[A-ZÀ-Þ][\w'’-]*(?:\s+(?:[A-ZÀ-Þ][\w'’.-]*|de|da|di|du|la|le|van|von|der|den|al|bin|of)){1,3})))"
)
NO_CALLER = (
    rf"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day|{'|'.join(MONTHS)}|today|tonight|tomorrow|back|later"
    r"|(?-i:[A-Z]{3,}))\b"
)
# Where people are from at work, or move to on a screen; a place would be ended by it.
NO_PLACE = (
    r"(?!(?:(?-i:HR|IT|QA|PR|PM|CS|R&D)|home|sales|marketing|finance|legal|support|accounting|accounts|engineering"
    r"|purchasing|operations|production|plan|version|stage|phase|step|level|team|chapter|section|windows|linux|mac"
    r"|macos|ubuntu|debian|fedora|arch|android|ios|python|rust|typescript|vim|emacs|gmail|outlook|chrome|firefox"
    r"|safari|postgres|postgresql|mysql|aws|azure|gcp|kubernetes|github|gitlab|slack|teams|notion|zoom|jira)\b)"
)
PLACE = r"(?-i:((?:the\s+)?[A-Z][\w'’.-]*(?:(?:\s+|,\s*)(?:[A-Z][\w'’.-]*|de|of|the|la|upon|on))*))"
IS = r"\s+is\s+(?:(?:now|still|currently|actually)\s+)?"
NUMBER = r"(\+?[\d(][\d\s()./-]{3,}\d)"
SIZE = r"((?:(?:eu|uk|us)\s+)?\d{1,2}(?:[.,]\d|½)?(?:\s+(?:eu|uk|us))?)"
BLOOD = r"((?:ab|a|b|o)\s?(?:[+−-]|(?:rh\s)?(?:positive|negative))?)"
MONTH = rf"(?:{'|'.join(MONTHS)}|{'|'.join(month[:3] for month in MONTHS)}|sept)\.?"
DAY, YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:,?\s+\d{4})?"
DATE = (
    rf"(?:on\s+)?(?:the\s+)?({DAY}\s+(?:of\s+)?{MONTH}{YEAR}|{MONTH}\s+(?:the\s+)?{DAY}{YEAR}"
    r"|\d{1,4}[./-]\d{1,2}(?:[./-]\d{1,4})?)"
)
FAVOURITE = (
    r"favou?rite\s+(?!(?:one|part|thing|character|scene|moment)\b)(\w+(?:\s\w+){0,2}?)\s+(?:is|are)\s+"
    rf"(?!{NO_VALUE})"
)
MANNER = (
    r"((?:answer|reply|respond|use|give me|write|speak|explain|format|call me"
    r"|keep (?:it|them|(?:(?:your|the|all|my) )?(?:answers?|replies|reply|responses?|explanations?|sentences|texts?)))"
    r"\b[^?]*?)"
)

LATER = r"(?:always|from now on,?|in (?:the )?future,?)\s+(?:please\s+)?"

RULES = (
    _rule("fact", "name", MY, r"name(?:['’]s|\s+is)\s+", NAME),
    _rule("fact", "name", r"call me\s+(?-i:(?=[A-Z]))", rf"(?!{NO_CALLER})", NAME),
    _rule("fact", "age", I_AM, r"(\d{1,3})\s+years?\s+old"),
    _rule("fact", "home", I_DO, r"(?:live|reside)\s+(?:in|near)\s+", PLACE),
    _rule("fact", "home", r"i(?:['’]ve|\s+have)?\s+(?:just\s+|recently\s+)?moved\s+to\s+", NO_PLACE, PLACE, SINCE),
    _rule("fact", "origin", I_AM, r"from\s+", NO_PLACE, PLACE),
    _rule("fact", "birthplace", r"i\s+was\s+born\s+in\s+", PLACE),
    _rule("fact", "work", I_DO, r"work\s+as\s+", THING),
    _rule("fact", "employer", I_DO, r"work\s+(?:for|at)\s+(?!home(?!\s\w))", PLACE),
    _rule("fact", "allergy: {0}", I_AM, r"allergic\s+to\s+", THING, value="yes"),
    _rule("fact", "allergy: {0}", I_AM, r"not\s+allergic\s+to\s+", THING, value="no"),
    _rule("fact", "diet", I_AM, r"(?:an?\s+)?(vegetarian|vegan|pescatarian)"),
    _rule("fact", "{0}", I_AM, r"(gluten[- ]free|lactose[- ]intolerant)", value="yes"),
    _rule("fact", "my {0}'s name", MY, r"(\w+(?:\s\w+)?)(?:['’]s\s+name\s+is|\s+is\s+(?:called|named))\s+", NAME),
    _rule("fact", "my {0}", MY, r"(e-?mail(?:\s+address)?)", IS, r"([^\s@]+@[^\s@]+)"),
    _rule("fact", "my {0}", MY, r"(phone(?:\s+number)?)", IS, NUMBER),
    _rule("fact", "my {0}", MY, r"(birthday|wedding anniversary)", IS, DATE),
    _rule("fact", "my {0}", MY, r"(shoe size)", IS, SIZE),
    _rule("fact", "my {0}", MY, r"(blood type)", IS, BLOOD),
    _rule("fact", "my {0}", MY, r"(home ?town)", IS, PLACE),
    _rule("fact", "my {0}", MY, r"(time ?zone)", IS, r"(?-i:(?=[A-Z]))", THING),
    _rule("fact", "my {0}", MY, r"(occupation|profession)", IS, rf"(?!{NO_NAME})", THING),
    _rule("fact", "my {0}", MY, r"(native language|mother tongue)", IS, NAME),
    _rule("preference", "favourite {0}", MY, FAVOURITE, THING),
    _rule("preference", "taste: {0}", I_DO, r"(?:like|love|enjoy|adore|prefer)\s+", THING, value="likes"),
    _rule("preference", "taste: {0}", I_DO, r"(?:hate|dislike|detest|can['’]?t stand)\s+", THING, value="dislikes"),
    _rule(
        "preference",
        "taste: {0}",
        r"i\s+(?:don['’]?t|do not)\s+(?:really\s+)?(?:like|enjoy)\s+",
        THING,
        value="dislikes",
    ),
    _rule("preference", "answers: language", LATER, r"(?:answer|reply|respond|write|speak)\s+(?:to me\s+)?in\s+(\w+)"),
    _rule(
        "preference",
        "answers: {0}",
        LATER,
        MANNER,
        value="wanted",
    ),
    _rule("preference", "answers: {0}", r"never\s+", MANNER, value="unwanted"),
)

SENTENCE = re.compile(r"[^.!?\n]+(?:[.](?=\w)[^.!?\n]*)*[.!?]*")
QUOTED = re.compile(
    r"```[^\n]*?```|```[\w+-]*[ \t]*\n.*?(?:```|\Z)|^[ \t]*~~~[^\n~]*\n.*?(?:^[ \t]*~~~|\Z)|^[ \t]*>[^\n]*$"
    r"|\"[^\"”]*[\"”]|„[^„“”\"]*[“”\"]|“(?:[^“”\"]|“[^“”\"]{0,400}[”\"]){0,4000}[”\"]|[“„][^“”\"„]*?(?:\n\n|\Z)",
    re.DOTALL | re.MULTILINE,
)
UNSURE = re.compile(
    r"\?|\b(?:if|would|could|might|maybe|perhaps|wish|imagine|suppose|pretend|guess|used to|think|said|says|told|he|she"
    r"|they|we)\b",
    re.IGNORECASE,
)
VAGUE = re.compile(
    r"^(?:(?:(?:it|this|that|these|those|them|him|her|you|one|both|all|everything|anything|nothing|here|there|some"
    r"|something|other|others|another|any|more|same|most of|also|his|their|its|your|our)\b)|the\s+(?-i:(?![A-Z])))",
    re.IGNORECASE,
)
TRAILING = re.compile(
    r"(?:\s+(?:too|also|though|as well|either|especially|a ?lot|(?:so|very|too) much|better|the best|myself|any ?more"
    r"|at all))+$"
)


def stated(text: str) -> list[Statement]:
    """What a user's turn states, the last word on each subject."""
    found: dict[str, Statement] = {}
    for sentence in SENTENCE.findall(QUOTED.sub(" ", text[:MOST_QUOTED])[:MOST_TEXT]):
        if statement := _stated(sentence.strip()):
            found[statement.subject] = statement
    return list(found.values())


def _stated(sentence: str) -> Statement | None:
    if UNSURE.search(sentence) or not 2 <= len(sentence.split()) <= MOST_WORDS:
        return None
    words = " ".join(sentence.split())  # the patterns would try every part of a long gap
    matches = ((rule, rule.pattern.match(words)) for rule in RULES)
    rule, match = next(((rule, match) for rule, match in matches if match), (RULES[0], None))
    if match is None:
        return None
    given = match[match.lastindex or 1]
    named, value = _plain(match[1]), _plain(given)
    if VAGUE.match(given) or VAGUE.match(match[1]) or not named or not value or len(value.split()) > MOST_VALUE_WORDS:
        return None
    subject = rule.subject.format(named)
    return Statement(rule.kind, subject, rule.value or value, sentence) if len(subject) <= MOST_SUBJECT else None


def _plain(words: str) -> str:
    """Casefolded, without an article in front and what only stresses it behind."""
    words = " ".join(words.casefold().split()).strip(" .,!'\"")
    return TRAILING.sub("", re.sub(r"^(?:the|a|an|my)\s+", "", words))


# -- over time ---


@dataclass(frozen=True)
class Said:
    """A statement with the turn it was made in."""

    statement: Statement
    source_id: str
    created_utc: float
    position: int = 0  # of the turn in its session: an import may give one time to all of it


@dataclass(frozen=True)
class Period:
    """A value of a subject from its first statement until another value was stated; `valid_to` None: it still holds.

    `sources` are the turns that said so, in their order: a repetition adds a source, not a period.
    """

    statement: Statement  # in the words of its first statement
    sources: tuple[str, ...]
    valid_from: float
    valid_to: float | None


def periods(said: Iterable[Said]) -> list[Period]:
    """What was stated of one subject, in any order, as what held when."""
    ordered = sorted(said, key=lambda s: (s.created_utc, s.position, s.source_id))
    runs = [list(run) for _, run in groupby(ordered, key=lambda s: (s.statement.kind, s.statement.value))]
    ends = [run[0].created_utc for run in runs[1:]]
    return [
        Period(run[0].statement, tuple(dict.fromkeys(s.source_id for s in run)), run[0].created_utc, end)
        for run, end in zip(runs, [*ends, None], strict=False)
    ]
