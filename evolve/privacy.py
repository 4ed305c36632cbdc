"""Personal data and secrets, masked in what is trained on and judged on; what is remembered stays as it was.

In one row a value has one mask wherever it stands, also where nothing beside it says what it is: `<EMAIL>`, the next
address `<EMAIL_2>`. The invariant: masking is a function of the row's words alone, so that a snapshot masks to the same
words, and the same id, whenever it is read back.

Covered: e-mail and IP addresses, URLs, phone and card numbers, IBANs, US social security numbers, passwords and keys
(of passwords, what `passwords` covers, and those in the address of a server).
Not covered, since no pattern tells them from other words: names of people, organisations and places, streets, ages,
dates, titles, nationalities, postal codes, driving licences.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain

from .identifiers import ECHOED, KINDS, LATEST, Span, found_in, proposed, typed, visible
from .passwords import told_when_asked

MASK = re.compile(rf"<(?:{'|'.join(KINDS)})(?:_\d+)?>")

# What is found by the words beside it, so that it is not found again where they are not.
_BY_CONTEXT = frozenset({"CARD", "PHONE", "SECRET", "SSN"})
_NUMBERS = frozenset({"CARD", "IBAN", "PHONE", "SSN"})
_ECHOES = range(3, 200)  # characters of a value that is looked for again
_RUN, _DIGITS = re.compile(r"[^\W_]+"), re.compile(r"\d+")
_NUMBER = re.compile(r"(?<![^\W_])\d+(?:[\s().-]{1,3}\d+)*(?![^\W_])")
_MOST_GROUPS = 8  # of digits in one number


def spans(text: str, version: int = LATEST) -> list[Span]:
    """The personal data and secrets in `text`, in order, without overlaps; by the rules of that version."""
    if version < ECHOED:
        found = proposed(typed(text, version), version)
        return _claimed(found, len(text))[0]
    seen, places = visible(text)
    joined = _joined(found_in(seen), len(seen))
    return [(places[start], places[end - 1] + 1, kind) for start, end, kind in joined]


def _claimed(found: Iterable[Span], length: int) -> tuple[list[Span], list[Span]]:
    """Of finds that overlap the first, in order of place; and the others."""
    taken: list[Span] = []
    late: list[Span] = []
    claimed = bytearray(length)
    for start, end, kind in found:
        if any(claimed[start:end]):
            late.append((start, end, kind))
        else:
            claimed[start:end] = b"\1" * (end - start)
            taken.append((start, end, kind))
    return sorted(taken), late


def _joined(found: Iterable[Span], length: int) -> list[Span]:
    """The same, but a secret that overlaps others covers them: what is left of it would be one, too."""
    taken, late = _claimed(found, length)
    joined: list[Span] = []
    for start, end, kind in sorted([*taken, *(s for s in late if s[2] == "SECRET")], key=lambda s: (s[0], -s[1])):
        if joined and start < joined[-1][1]:
            first, last, widest = joined.pop()
            start, end, kind = first, max(last, end), kind if end - start > last - first else widest
        joined.append((start, end, kind))
    return joined


def mask(texts: Iterable[str], version: int = LATEST, answers: int = 0) -> list[str]:
    """The texts of one row, masked by the rules of that version; a value that stands in several of them has the same
    mask in all. They follow one another, but the last `answers`, each of which follows the others."""
    texts = list(texts)
    found = [list(_spans(text, version)) for text in texts]
    if version >= ECHOED:
        found = _echoed(texts, found, _asked_for(texts, answers))
    masks: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}

    def masked(text: str, parts: Iterable[Span]) -> Iterable[str]:
        at = 0
        for start, end, kind in parts:
            value = kind, canonical(kind, text[start:end], version)
            if value not in masks:
                counts[kind] = counts.get(kind, 0) + 1
                masks[value] = f"<{kind}>" if counts[kind] == 1 else f"<{kind}_{counts[kind]}>"
            yield text[at:start]
            yield masks[value]
            at = end
        yield text[at:]

    return ["".join(masked(text, parts)) for text, parts in zip(texts, found, strict=True)]


def _asked_for(texts: Sequence[str], answers: int) -> list[list[Span]]:
    """In each text what the one before it asked for: `What is your password?` and `swordfish`."""
    turns = len(texts) - answers
    before = ["", *texts[:turns]][:turns] + [texts[turns - 1] if turns else ""] * answers
    told = (told_when_asked(asked, text) for asked, text in zip(before, texts, strict=True))
    return [[span] if span else [] for span in told]


def _echoed(texts: Sequence[str], found: Sequence[list[Span]], asked: Sequence[list[Span]]) -> list[list[Span]]:
    """With what was `asked` for, and every further place of what was found by the words beside it."""
    numbers: dict[str, str] = {}  # kind by digits
    secrets: dict[str, set[tuple[str, int]]] = defaultdict(set)  # by their longest run, and where in them that begins
    for text, parts, told in zip(texts, found, asked, strict=True):
        # a mere word may be an answer like `unfortunately`
        sure = [(start, end, kind) for start, end, kind in told if not text[start:end].isalpha()]
        for start, end, kind in (*parts, *sure):
            if kind in _BY_CONTEXT and end - start in _ECHOES:
                value = visible(text[start:end])[0]
                if kind in _NUMBERS:
                    numbers["".join(_DIGITS.findall(value))] = kind
                elif run := max(_RUN.finditer(value), key=lambda run: len(run[0]), default=None):
                    secrets[run[0].casefold()].add((value, run.start()))
    rows = zip(texts, found, asked, strict=True)
    return [_joined([*p, *a, *_places(t, numbers, secrets)], len(t)) for t, p, a in rows]


def _places(text: str, numbers: Mapping[str, str], secrets: Mapping[str, Iterable[tuple[str, int]]]) -> Iterable[Span]:
    """Where any of them stands; a pattern for each would take quadratic time where one text tells thousands."""
    if not (numbers or secrets):
        return
    seen, places = visible(text)
    for start, end, kind in chain(_numbers_in(seen, numbers), _secrets_in(seen, secrets)):
        yield places[start], places[end - 1] + 1, kind


def _numbers_in(seen: str, numbers: Mapping[str, str]) -> Iterable[Span]:
    """However they are spaced: groups of digits that are one of them together."""
    for run in _NUMBER.finditer(seen):
        groups = [(run.start() + g.start(), run.start() + g.end()) for g in _DIGITS.finditer(run[0])]
        for first, (start, _) in enumerate(groups):
            digits = ""
            for begin, end in groups[first : first + _MOST_GROUPS]:
                digits += seen[begin:end]
                if digits in numbers:
                    yield start, end, numbers[digits]


def _secrets_in(seen: str, secrets: Mapping[str, Iterable[tuple[str, int]]]) -> Iterable[Span]:
    for run in _RUN.finditer(seen):
        for value, offset in secrets.get(run[0].casefold(), ()):
            start = run.start() - offset
            end = start + len(value)
            ends = end == len(seen) or not _RUN.fullmatch(seen[end - 1 : end + 1])
            if start >= 0 and ends and seen[start:end].casefold() == value.casefold():
                yield start, end, "SECRET"


def unasked(prompt: Iterable[str], answer: str) -> list[str]:
    """The personal data and secrets in `answer` that do not stand in `prompt`, however they are spaced there."""
    texts = [*prompt, answer]
    *before, own = _echoed(texts, [list(_spans(text, LATEST)) for text in texts], [[]] * len(texts))
    known = {(k, canonical(k, text[s:e])) for text, parts in zip(texts, before, strict=False) for s, e, k in parts}
    return [answer[s:e] for s, e, k in own if (k, canonical(k, answer[s:e])) not in known]


def nothing_left(text: str, masked: str) -> bool:
    """Whether `masked` says nothing but what kind of personal data or secrets `text` was."""
    return masked != text and not re.search(r"[^\W_]", MASK.sub("", masked))


def canonical(kind: str, value: str, version: int = LATEST) -> str:
    """Equal ones are the same value: of numbers however they are spaced, of all in whatever case."""
    if version < ECHOED:
        return re.sub(r"[\s().-]", "", typed(value, version)).casefold()
    seen = visible(value)[0].casefold()
    return re.sub(r"[\s().-]", "", seen) if kind in _NUMBERS else seen


@lru_cache(maxsize=65_536)  # the turns of a session stand in every prompt after them
def _spans(text: str, version: int) -> tuple[Span, ...]:
    return tuple(spans(text, version))
