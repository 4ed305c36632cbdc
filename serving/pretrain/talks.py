"""Conversations that were written one by one for the seedling, with words to choose from; `talks/*.txt` hold them.

One block of lines is one conversation, `S:`, `U:` and `A:` saying who speaks. `{a|b}` is one of its parts, `{x=a|b}` as
well, after which `{x:c|d}` takes the part in the same place, and `<name>` is a value that is invented anew, the same
wherever the conversation has it; `<name2>` is another. What stands after `#` at the start of a line is for people.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from . import words as w

FOLDER = Path(__file__).parent / "talks"
ROLES = {"S": "system", "U": "user", "A": "assistant"}
Lines = tuple[tuple[str, str], ...]  # role and text with its choices
VALUES: dict[str, Callable[[Random], str]] = {
    "name": w.name,
    "fullname": w.full_name,
    "city": w.city,
    "colour": w.one_of(w.COLOURS),
    "job": w.one_of(w.JOBS),
    "pet": w.one_of(w.PETS),
    "kin": w.one_of(w.KIN),
    "hobby": w.one_of(w.HOBBIES),
    "animal": w.one_of(w.ANIMALS),
    "month": w.one_of(w.MONTHS),
    "day": w.one_of(w.DAYS),
    "thing": w.one_of(w.THINGS),
    "digit": lambda rng: str(rng.randint(2, 9)),
    "number": lambda rng: w.number(rng, 2),
    "date": w.date,
    "time": w.clock,
    "price": w.price,
    "phone": w.phone,
    "id": w.ident,
    "title": w.title,
    "word": w.word,
    "shop": w.capital,
}
_CHOICE = re.compile(r"\{(?:([a-z]\w*)([=:]))?([^{}]*)\}")
_VALUE = re.compile(r"(\b[Aa] )?<([a-z]+)(\d?)>")


@cache
def everything() -> tuple[Lines, ...]:
    return tuple(lines for file in sorted(FOLDER.glob("*.txt")) for lines in templates(file.stem))


@cache
def templates(stem: str) -> tuple[Lines, ...]:
    """The conversations of one file. A line that says nothing, or that nobody says, is a ValueError."""
    text = (FOLDER / f"{stem}.txt").read_text(encoding="utf-8")
    blocks = re.split(r"\n\s*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return tuple(_parsed(block, stem) for block in blocks if block.strip())


def _parsed(block: str, stem: str) -> Lines:
    lines = []
    for line in block.strip().splitlines():
        who, _, said = line.partition(":")
        if who not in ROLES or not said.strip():
            raise ValueError(f"talks/{stem}.txt: {line!r} is no line of S:, U: or A:")
        lines.append((ROLES[who], said.strip()))
    return tuple(lines)


def told(lines: Lines, rng: Random) -> list[tuple[str, str]]:
    """The conversation with its choices made and its values invented: role and text of each turn."""
    chosen: dict[str, int] = {}
    values: dict[str, str] = {}

    def choose(found: re.Match[str]) -> str:
        name, sign, parts = found[1], found[2], found[3].split("|")
        if sign == ":":
            return parts[chosen[name]]
        at = rng.randrange(len(parts))
        if sign:
            chosen[name] = at
        return parts[at]

    def fill(found: re.Match[str]) -> str:
        article, kind, key = found[1] or "", found[2], found[2] + found[3]
        if key not in values:
            values[key] = _another(VALUES[kind], values, rng)
        value = values[key]
        if article and value[0].lower() in "aeiou":
            article = article[0] + "n "
        return article + value

    turns = [(role, _VALUE.sub(fill, _CHOICE.sub(choose, text))) for role, text in lines]
    return [(role, " ".join(text.replace("\\n", " \\n ").split()).replace(" \\n ", "\n")) for role, text in turns]


def _another(make: Callable[[Random], str], values: dict[str, str], rng: Random) -> str:
    value = make(rng)
    while value in values.values():
        value = make(rng)
    return value
