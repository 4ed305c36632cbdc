"""What can be read off the words around one answer, without any vector: the cues, and plain numbers for a model.

An `Exchange` is an answer with the request before it, the turn after it, and what was said earlier in the session.
Everything here is a pure function of those texts. `signals` names the cues to people, one by one; the numbers of
`scalars` are what the learned part of the Censor is fitted on. The invariant: the names of `scalars` and their order
are the same for every exchange, and what the reaction has no part in is the same with and without one.

Not covered: languages other than English, irony.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import log1p


@dataclass(frozen=True)
class Exchange:
    """One answer in its place. `reaction` is None where nobody spoke after it; `earlier_*` are oldest first."""

    request: str
    reply: str
    reaction: str | None
    earlier_requests: tuple[str, ...] = ()
    earlier_replies: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        own = (self.request, self.reply, self.reaction or "")
        return (*own, *self.earlier_requests, *self.earlier_replies)


# -- numbers for a model ---


def scalars(exchange: Exchange) -> dict[str, float]:
    """About sixty numbers between -1 and 10 by name; those that look at the reaction have it in their name."""
    sides = {"request": exchange.request, "reply": exchange.reply, "reaction": exchange.reaction or ""}
    said = {side: plain(text) for side, text in sides.items()}
    found = {f"{side}_{name}": value for side, text in sides.items() for name, value in style(text).items()}
    return found | _cue_numbers(exchange, said) | _overlaps(exchange, said)


def style(raw: str) -> dict[str, float]:
    """How a text is written: length, punctuation, who it speaks of, its mood."""
    text = plain(raw)
    words = words_of(text)
    count = max(1, len(words))
    return {
        "words": log1p(len(words)),
        "chars": log1p(len(text)),
        "word_length": sum(map(len, words)) / count,
        "question": float("?" in text),
        "exclamation": min(3, text.count("!")) / 3,
        "upper": float(raw.strip()[:1].isupper()),
        "distinct": len(set(words)) / count,
        "asks": float(words[:1] != [] and words[0] in INTERROGATIVES),
        "you": sum(w in YOU for w in words) / count,
        "i": sum(w in ME for w in words) / count,
        "negations": min(2, sum(w in NEGATIONS for w in words)) / 2,
        "sentiment": sentiment(text),
        "greets": float(bool(GREETING.search(text))),
        "leaves": float(bool(FAREWELL.search(text))),
        "closed": float(text[-1:] in set(".?!")),
        "digit": float(any(c.isdigit() for c in text)),
    }


def _cue_numbers(exchange: Exchange, said: dict[str, str]) -> dict[str, float]:
    reply, reaction = said["reply"], said["reaction"]
    asked, asks_back = "?" in said["request"], reply.endswith("?")
    earlier = [plain(text) for text in exchange.earlier_replies]
    requests = [said["request"], *map(plain, exchange.earlier_requests)]
    values = {
        "reply_machine": MACHINE.search(reply),
        "reply_swears": SWEARING.search(reply),
        "reply_refusal": REFUSAL.search(reply),
        "reply_repeated": reply in earlier,
        "reply_echo": reply == said["request"],
        "reply_answers_no_question": asked and "?" not in reply,
        "reply_asks_back": asked and "?" in reply,
        "reaction_machine": MACHINE.search(reaction),
        "reaction_laughs": LAUGHTER.search(reaction),
        "reaction_swears": SWEARING.search(reaction),
        "reaction_changes_subject": CHANGE.search(reaction),
        "reaction_correction": is_correction(reaction, asks_back),
        "reaction_confusion": CONFUSION.search(reaction),
        "reaction_gratitude": GRATITUDE.search(reaction),
        "reaction_again": reaction in requests,
        "reaction_short_to_question": asks_back and len(words_of(reaction)) <= 2,
    }
    numbers = {name: float(bool(value)) for name, value in values.items()}
    return numbers | {"earlier_turns": log1p(len(earlier)), "no_request": float(not said["request"])}


def _overlaps(exchange: Exchange, said: dict[str, str]) -> dict[str, float]:
    request, reply, reaction = (words_of(said[side]) for side in ("request", "reply", "reaction"))
    replies = [words_of(plain(text)) for text in exchange.earlier_replies]
    requests = [*(words_of(plain(text)) for text in exchange.earlier_requests), request]
    usual = sum(log1p(len(words)) for words in requests) / len(requests)
    return {
        "reply_like_earlier_reply": max((jaccard(reply, other) for other in replies), default=0.0),
        "request_reply_words": jaccard(request, reply),
        "request_covered_by_reply": covered(request, reply),
        "reaction_like_request": max(jaccard(reaction, other) for other in requests),
        "reply_reaction_words": jaccard(reply, reaction),
        "request_reaction_words": jaccard(request, reaction),
        "reaction_covered_by_reply": covered(reaction, reply),
        "reaction_longer_than_usual": log1p(len(reaction)) - usual,
    }


def words_of(text: str) -> list[str]:
    return WORD.findall(text)


def jaccard(some: Iterable[str], others: Iterable[str]) -> float:
    a, b = set(some), set(others)
    return len(a & b) / max(1, len(a | b))


def covered(some: Iterable[str], others: Iterable[str]) -> float:
    """The share of the distinct content words of `some` that `others` has too."""
    a = set(some) - FUNCTION_WORDS
    return len(a & set(others)) / max(1, len(a))


# -- cues ---


def vocabulary() -> dict[str, list[str]]:
    """Every pattern and word list of this module by name: they are part of the Censor's version."""
    found = {name: value for name, value in globals().items() if isinstance(value, re.Pattern | frozenset)}
    return {name: [v.pattern] if isinstance(v, re.Pattern) else sorted(v) for name, v in found.items()}


def is_correction(said: str, answers: bool) -> bool:
    """Whether a plain text contradicts.

    "No." to "Did you mean the rear wheel?" answers and corrects nothing, and no more does "No, that's perfect".
    """
    if CORRECTION.search(said):
        return True
    return bool(DENIAL.match(said)) and not answers and not _content(NO.sub("", said))


def _content(said: str) -> bool:
    """Whether somebody thanks, praises or has all they want, and says nothing else."""
    if AGAINST.search(said):
        return False
    return bool(GRATITUDE.search(said) or ENOUGH.match(said) or sentiment(said) > 0)


def sentiment(text: str) -> float:
    """Praise minus blame by word, in [-1, 1].

    A negation within two words before turns a word's sign, but no "No, " that opens the text; what is wished for is no
    praise of what was said.
    """
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", NO.sub("", text))
    total = 0
    for i, word in enumerate(words):
        sign = (word in PRAISE) - (word in BLAME)
        if sign and NEGATIONS.intersection(words[max(0, i - 2) : i]):
            sign = -sign
        total += 0 if sign > 0 and WISHES.intersection(words[max(0, i - WISHED) : i]) else sign
    return max(-1.0, min(1.0, total / 2))


def plain(text: str) -> str:
    """Lower case, single spaces, straight apostrophes."""
    return " ".join(text.lower().replace("’", "'").split())


WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+")
CORRECTION = re.compile(
    r"\b(?:"
    r"(?<!sorry )(?<!sorry, )(?<!sorry\. )i meant\b"
    r"|(?:that'?s|that is|this is|it'?s|you'?re|you are) (?:just |simply |still |also )?"
    r"(?:wrong|incorrect|not (?:right|correct|true|what i)|the wrong one)\b"
    r"|not what i (?:asked|meant|said|wanted)\b|didn'?t (?:answer|ask)\b|did not (?:answer|ask)\b"
    r"|answer (?:my|the) question\b|you (?:misunderstood|misread|got (?:that|it) wrong)\b"
    r"|(?:i|we) already (?:told|said|asked)\b|(?:i|we) just (?:told|said|asked) (?:you|that|this|it|so|for)\b"
    r"|(?:like|as) i (?:already )?said\b"
    r"|(?<!let me )(?<!'ll )(?<!will )(?<!to )try again\b(?! (?:later|tomorrow))"
    r"|wrong answer\b|^wrong one\b|you (?:gave|picked|chose|sent) (?:me )?the wrong one\b"
    r"|you (?:already|just) (?:said|asked|told)\b|(?:are|do) you even (?:listen|read)"
    r")"
)
DENIAL = re.compile(r"(?:no|nope|nah|wrong|incorrect)(?:$|[,.!;:-]+(?:$|\s)|\s+(?:i|not|that|it|you)\b)")
NO = re.compile(r"^(?:no|nope|nah)(?:[,.!;:-]+\s*|\s+(?=(?:i|it|that|you)\b))")
ENOUGH = re.compile(
    r"(?:that'?s|that is|that was|that will be|that'?ll be)"
    r" (?:all(?: i need(?:ed)?)?(?: today| for now)?|it|everything|fine|enough|ok|okay)\b\W*$"
)
AGAINST = re.compile(r"\b(?:but|asked|meant|wanted|needed a|wrong|instead|rather|other)\b")
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
GREETING = re.compile(r"\b(?:hi|hello|hey|good (?:morning|evening|day|afternoon)|how are you)\b")
FAREWELL = re.compile(r"\b(?:bye|goodbye|see you|good night|gotta go|nice (?:talking|chatting))\b")
MACHINE = re.compile(r"\b(?:bot|robot|machine|computer|ai|human|chatbot|program)\b")
LAUGHTER = re.compile(r"\b(?:haha\w*|lol|lmao|hehe)\b|[:;]-?[)d]")
SWEARING = re.compile(r"\b(?:fuck\w*|shit\w*|damn|hell|crap|ass|asshole|bitch|stupid|idiot|dumb|moron|suck\w*)\b")
CHANGE = re.compile(
    r"\b(?:anyway|let'?s talk|something else|change the (?:subject|topic)|never ?mind|forget it|whatever)\b"
)
YOU, ME = frozenset("you your you're u".split()), frozenset("i my me i'm".split())
INTERROGATIVES = frozenset(
    "what when where who why how which whose do does did are is can could would will have".split()
)
_FUNCTION = """
a an the i you he she it we they me my your is are am was were be been do does did to of in on at for and or but not no
that this what how so have has had with as if about can will would just
"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())
NEGATIONS = frozenset("not no never isn't wasn't don't doesn't didn't can't couldn't ain't hardly".split(" "))
WISHES = frozenset("would should could wish please want need prefer rather if".split())
WISHED = 6  # so many words after one of them
_PRAISE = """
amazing awesome brilliant cool delighted excellent exactly fantastic good great glad happy helped helpful
interesting impressive love lovely nice perfect perfectly pleased smart solved super sweet useful
wonderful works worked wow
"""
_BLAME = """
annoying awful bad boring broken confused confusing crap creepy disappointed disappointing dumb frustrating garbage hate
horrible idiot incorrect irrelevant lame lie lying mistake nonsense pathetic pointless ridiculous rude sad silly stupid
terrible ugh unhelpful useless weird worse worst wrong wtf
"""
PRAISE, BLAME = frozenset(_PRAISE.split()), frozenset(_BLAME.split())
