"""Memory stores with questions and the turns that answer them, out of public data. None of it is in this repository.

LoCoMo (CC BY-NC 4.0, to measure with only): github.com/snap-research/LoCoMo, data/locomo10.json.
MADial-Bench (MIT): github.com/hejunqing/MADial-Bench, data/en.
CLINC150 (CC BY 3.0): github.com/clinc/oos-eval, data/data_full.json.
Self-dialogue corpus (BSD-3): github.com/jfainberg/self_dialogue_corpus.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DAY = 86400.0
START = datetime(2023, 11, 1, tzinfo=UTC).timestamp()
FAVOURITE = re.compile(
    r"\bmy (?:all time |absolute )?favou?rite ((?:\w+ ){0,2}\w+)"
    r" (?:is|was|has to be|would be|would have to be) (?!that|the one|when|not|to\b|it)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Said:
    text: str
    session: str
    created_utc: float
    reply: str = ""


@dataclass(frozen=True)
class Question:
    text: str
    gold: frozenset[int]  # indices of what was said


@dataclass(frozen=True)
class Case:
    """One user's store, in order of time. `dev` = settings may be chosen on it."""

    said: tuple[Said, ...]
    questions: tuple[Question, ...]
    dev: bool


def locomo(data: Path) -> Iterator[Case]:
    """Ten long conversations of two people; questions of categories 1 to 4. The first five are for choosing."""
    for n, sample in enumerate(json.loads((data / "locomo" / "locomo10.json").read_text())):
        said = list(_locomo_turns(sample["conversation"]))
        place = {name: i for i, (name, _) in enumerate(said)}
        asked = [(q["question"], _evidence(q, place)) for q in sample["qa"] if q["category"] <= 4]
        yield Case(tuple(s for _, s in said), tuple(Question(q, gold) for q, gold in asked if gold), n < 5)


def _locomo_turns(conversation: dict[str, Any]) -> Iterator[tuple[str, Said]]:
    numbers = sorted(int(m[1]) for key in conversation if (m := re.fullmatch(r"session_(\d+)", key)))
    for n in numbers:
        day = datetime.strptime(conversation[f"session_{n}_date_time"], "%I:%M %p on %d %B, %Y").replace(tzinfo=UTC)
        for turn in conversation[f"session_{n}"]:
            photo = f" [shared a photo: {caption}]" if (caption := turn.get("blip_caption")) else ""
            yield turn["dia_id"], Said(f"{turn['speaker']}: {turn['text']}{photo}", f"s{n}", day.timestamp())


def _evidence(question: dict[str, Any], place: dict[str, int]) -> frozenset[int]:
    named = re.findall(r"D:?(\d+):(\d+)", " ".join(map(str, question["evidence"])))
    return frozenset(place[name] for a, b in named if (name := f"D{int(a)}:{int(b)}") in place)


def madial(data: Path) -> Iterator[Case]:
    """160 events of two children, sought with a dialogue's last three turns. Every other dialogue is for choosing."""
    folder = data / "madial"
    lines = (folder / "MADial-Bench-en-memory.json").read_text(encoding="utf-8").splitlines()
    events = [(i, event) for line in lines for i, event in json.loads(line).items()]
    place = {str(i): n for n, (i, _) in enumerate(events)}
    said = tuple(
        Said(e["event"], f"event {i}", datetime.fromisoformat(e["time"]).replace(tzinfo=UTC).timestamp())
        for i, e in events
    )
    lines = (folder / "MADial-Bench-en-dialogue.json").read_text(encoding="utf-8").splitlines()
    asked = [_madial_question(json.loads(line), place) for line in lines]
    yield Case(said, tuple(asked[::2]), True)
    yield Case(said, tuple(asked[1::2]), False)


def _madial_question(dialogue: dict[str, Any], place: dict[str, int]) -> Question:
    before = [t.strip() for t in dialogue["dialogue"][: dialogue["test-turn"][0]] if not t.startswith("<BOD>")]
    return Question("\n".join(before[-3:]), frozenset(place[str(i)] for i in dialogue["relevant-id"]))


def favourites(data: Path, *, replies: bool, stores: int = 40, dialogues: int = 26, asked: int = 6) -> Iterator[Case]:
    """What people said is their favourite band, book or food, among small talk; with `replies`, as turns with answers.

    The first half of the stores is for choosing.
    """
    with gzip.open(data / "self_dialogue" / "dialogues.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["turns"] for line in file]
    rng = random.Random(0)
    rng.shuffle(rows)
    stating = ((turns, found) for turns in rows if (found := _favourite(turns)))
    filler = (turns for turns in rows if not _favourite(turns))
    for n in range(stores):
        yield _favourites_case(stating, filler, rng, replies, dialogues, asked, n < stores // 2)


def _favourite(turns: list[str]) -> tuple[int, str] | None:
    """The first turn of the first speaker that states a favourite, and of what."""
    return next(((i, m[1].lower()) for i, t in enumerate(turns) if i % 2 == 0 and (m := FAVOURITE.search(t))), None)


def _favourites_case(
    stating: Iterator[tuple[list[str], tuple[int, str]]],
    filler: Iterator[list[str]],
    rng: random.Random,
    replies: bool,
    dialogues: int,
    asked: int,
    dev: bool,
) -> Case:
    held: dict[str, tuple[list[str], tuple[int, str] | None]] = {}
    while len(held) < asked:  # one of a kind, so that the question has one answer
        turns, found = next(stating)
        if not any(set(found[1].split()) & set(other.split()) for other in held):
            held[found[1]] = (turns, found)
    mixed = [*held.values(), *((next(filler), None) for _ in range(dialogues - asked))]
    rng.shuffle(mixed)
    said: list[Said] = []
    questions: list[Question] = []
    for n, (turns, found) in enumerate(mixed):
        step = 2 if replies else 1
        if found:
            questions.append(Question(f"What is my favorite {found[1]}?", frozenset({len(said) + found[0] // step})))
        for i in range(0, len(turns), step):
            said.append(Said(turns[i], f"s{n}", START + 3 * n * DAY, "".join(turns[i + 1 : i + step])))
    return Case(tuple(said), tuple(questions), dev)


def clinc(data: Path, *, stores: int = 4, each: int = 3) -> Iterator[Case]:
    """The same request in other words: 150 intents, each asked three times before. Nothing was chosen on it."""
    rows = json.loads((data / "clinc150" / "data_full.json").read_text())["train"]
    intents: dict[str, list[str]] = {}
    for text, intent in rows:
        intents.setdefault(intent, []).append(text)
    rng = random.Random(0)
    for _ in range(stores):
        drawn = [rng.sample(intents[intent], each + 1) for intent in sorted(intents)]
        said = [Said(text, f"s{n}-{k}", START) for n, texts in enumerate(drawn) for k, text in enumerate(texts[:each])]
        asked = [Question(texts[each], frozenset(range(n * each, (n + 1) * each))) for n, texts in enumerate(drawn)]
        yield Case(tuple(said), tuple(asked), False)
