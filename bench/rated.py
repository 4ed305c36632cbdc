"""Rated turns of two public sets as exchanges, with their own split into training and test.

ConvAI2 (Apache-2.0 by its site): github.com/DeepPavlov/convai, data/data_volunteers.json and data_intermediate.json.
People pressed thumbs on the messages of bots; a random half of the dialogues is held out, so that some of the people
who rated it (a quarter of the ratings) rated others that are fitted on.
DBDC3 (MIT): github.com/dbd-challenge/dbdc3, DBDC3.zip. Thirty people judged each turn of a bot: breakdown or not; its
own evaluation set is the test.
Self-dialogue corpus (BSD-3): github.com/jfainberg/self_dialogue_corpus, as lines of JSON with a list of turns.
A turn counts if a person spoke right after it. None of them is part of this repository.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nightschool.memory.cues import Exchange
from numpy.typing import NDArray

Turn = tuple[bool, str]  # whether the bot speaks, and what it says


@dataclass(frozen=True)
class Rated:
    exchanges: list[Exchange]
    satisfied: NDArray[np.float64]  # in [0, 1]: the thumb, or the mean of the thirty
    disliked: NDArray[np.bool_]  # the thumb is down, or most of the thirty say breakdown
    dialogues: NDArray[np.str_]
    bots: NDArray[np.str_]  # "" where not told
    test: NDArray[np.bool_]

    def at(self, rows: NDArray[Any]) -> Rated:
        exchanges = [self.exchanges[i] for i in np.arange(len(self.exchanges))[rows]]
        arrays = (self.satisfied, self.disliked, self.dialogues, self.bots, self.test)
        return Rated(exchanges, *(a[rows] for a in arrays))

    @property
    def texts(self) -> list[str]:
        return sorted({text for e in self.exchanges for text in e.texts if text.strip()})


def convai2(data: Path) -> Rated:
    rows, names = [], []
    for part in ("data_volunteers", "data_intermediate"):
        for n, dialogue in enumerate(json.loads((data / "convai2" / f"{part}.json").read_text(encoding="utf-8"))):
            said = [(u["sender_class"] == "Bot", u["text"]) for u in dialogue["dialog"]]
            thumbs = [str(u["evaluation_score"]) for u in dialogue["dialog"]]
            found = [(e, float(thumbs[i])) for i, e in exchanges(said) if thumbs[i] in ("0", "1")]
            rows += [(e, thumb, thumb < 0.5, f"{part}-{n}", "") for e, thumb in found]
            names += [f"{part}-{n}"] * bool(found)
    order = np.random.default_rng(0).permutation(len(names))
    test = {sorted(names)[i] for i in order[: len(names) // 2]}
    return _rated(rows, [row[3] in test for row in rows])


def dbdc3(data: Path) -> Rated:
    rows, test = [], []
    with zipfile.ZipFile(data / "dbdc3" / "DBDC3.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.startswith("DBDC3/dbdc3_revised/en/")):
            if not name.endswith(".json"):
                continue
            part, bot, file = name.split("/")[3:]
            turns = json.loads(archive.read(name))["turns"]
            said = [(t["speaker"] == "S", t["utterance"]) for t in turns]
            for i, exchange in exchanges(said):
                votes = [a["breakdown"] for a in turns[i]["annotations"]]
                if votes:
                    rows.append((exchange, *_verdict(votes), file, bot.split("_")[0]))
                    test.append(part == "eval")
    return _rated(rows, test)


def _verdict(votes: Sequence[str]) -> tuple[float, bool]:
    """O is 1, T (maybe) a half and X 0 on average; disliked where most say X."""
    mean = (votes.count("O") + votes.count("T") / 2) / len(votes)
    return mean, votes.count("X") * 2 > len(votes)


def exchanges(said: Sequence[Turn]) -> Iterator[tuple[int, Exchange]]:
    """Every turn of the bot that a person answers, by its index."""
    for i, (bot, text) in enumerate(said[:-1]):
        if bot and not said[i + 1][0]:
            requests = [t for spoke, t in said[:i] if not spoke]
            replies = tuple(t for spoke, t in said[:i] if spoke)
            request = requests[-1] if requests else ""
            yield i, Exchange(request, text, said[i + 1][1], tuple(requests[:-1]), replies)


def _rated(rows: Sequence[tuple[Exchange, float, bool, str, str]], test: Sequence[bool]) -> Rated:
    found, satisfied, disliked, dialogues, bots = zip(*rows, strict=True)
    arrays = (np.array(satisfied, dtype=float), np.array(disliked), np.array(dialogues), np.array(bots))
    return Rated(list(found), *arrays, np.array(test))


def self_dialogue(data: Path, turns: int) -> list[list[str]]:
    """Dialogues in a random order until they hold so many turns."""
    with gzip.open(data / "self_dialogue" / "dialogues.jsonl.gz", "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line)["turns"] for line in file]
    chosen: list[list[str]] = []
    for i in np.random.default_rng(0).permutation(len(dialogues)):
        if sum(map(len, chosen)) + len(dialogues[i]) > turns:
            break
        chosen.append(dialogues[i])
    return chosen


def embedded(texts: Iterable[str], cache: Path | None) -> dict[str, NDArray[np.float32]]:
    """MiniLM vectors by text, kept in the folder `cache` if one is given."""
    from nightschool.memory.embed import MiniLM

    wanted, path = sorted(set(texts)), cache / "vectors.npz" if cache else None
    held: dict[str, NDArray[np.float32]] = {}
    if path is not None and path.exists():
        with np.load(path) as file:
            held = dict(zip(json.loads(str(file["texts"])), file["vectors"], strict=True))
    missing = [text for text in wanted if text not in held]
    held |= dict(zip(missing, MiniLM().embed(missing), strict=True))
    if path is not None and missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, texts=json.dumps(list(held)), vectors=np.stack(list(held.values())))
    return {text: held[text] for text in wanted}


def standardised(rated: Rated) -> NDArray[np.float64]:
    """`satisfied` as standard deviations from the mean of its bot: else the ridge learns which bot it hears."""
    target = np.zeros(len(rated.satisfied))
    for bot in np.unique(rated.bots):
        rows = rated.bots == bot
        target[rows] = (rated.satisfied[rows] - rated.satisfied[rows].mean()) / rated.satisfied[rows].std()
    return target
