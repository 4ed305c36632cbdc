"""The words that a search goes by: stems, without those that say nothing. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from .topics import STOP_WORDS

MONTHS = "january february march april may june july august september october november december".split()

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def terms(text: str) -> list[str]:
    """The stems of the words that say something."""
    return [stem(word) for word in words(text) if word not in STOP_WORDS]


def stem(word: str) -> str:
    """A light English stem: `likes`, `liked`, `liking` and `like` are one; so are `city` and `cities`."""
    word = word.removesuffix("'s").removesuffix("’s")
    if len(word) <= 3 or not word.isalpha():
        return word
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]
    for ending in ("ing", "ed"):
        root = word.removesuffix(ending)
        if root != word and len(root) >= 3:
            word = root[:-1] if root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def time_terms(created_utc: float) -> list[str]:
    """The words in which people name that day: `8 may 2023`. A time that no calendar has is not named."""
    try:
        day = datetime.fromtimestamp(created_utc, UTC)
    except (OverflowError, OSError, ValueError):
        return []
    return [str(day.day), stem(MONTHS[day.month - 1]), str(day.year)]
