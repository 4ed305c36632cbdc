"""Conversations in which the assistant calls functions: ask, call, read the result, copy the right id from it.

The functions, their arguments and the ids are invented anew each time, so what is learnt is to read and to copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from . import words as w
from .facts import Value
from .scenes import FIELDS, Conversation, turn

FINDS = ("find", "search", "list", "look_up", "show")
DOES = tuple("reserve get buy rent open repair send return move book lock select add check".split())
EXTRAS = [field for field in FIELDS if field[0] in ("colour", "size", "price", "state", "city", "day")]

Item = dict[str, object]


@dataclass(frozen=True)
class Errand:
    """What is wanted, and the two functions that get it: `find` by label, then `do` by id."""

    noun: str
    find: str
    do: str
    id_key: str
    label_key: str
    extra_key: str
    found: tuple[Item, ...]
    wanted: Item

    @property
    def label(self) -> str:
        return str(self.wanted[self.label_key])

    @property
    def extra(self) -> str:
        return str(self.wanted[self.extra_key])


def with_tools(rng: Random) -> Conversation:
    errand = _errand(rng)
    noun, do, label = errand.noun, errand.do, errand.label
    talk: Conversation = []
    if rng.random() < 0.6:
        talk.append(turn("system", _manual(errand)))
    asked = rng.choice(
        (
            f"Do you have a {noun} called {label}?",
            f"I am looking for the {noun} {label}.",
            f"Can you find the {noun} {label}?",
            f"I want to {do} the {noun} {label}.",
            f"Please {do} {label} for me.",
            f"Is there a {noun} named {label}?",
            f"I need the {errand.extra} {noun}, {label}.",
        )
    )
    talk += [turn("user", asked), turn("assistant", json.dumps({errand.find: {errand.label_key: label}}))]
    if rng.random() < 0.1:
        nothing = rng.choice(("[]", '{"results": []}', '{"error": "not found"}'))
        said = rng.choice((f"Sorry, I could not find the {noun} {label}.", f"There is no {noun} called {label}."))
        return [*talk, turn("tool", nothing), turn("assistant", said)]
    talk.append(turn("tool", _wrapped(rng, noun, errand.found)))
    return talk + _finish(rng, errand)


def _errand(rng: Random) -> Errand:
    noun = rng.choice(w.THINGS) if rng.random() < 0.7 else w.word(rng)
    find, do = f"{rng.choice(FINDS)}_{noun}", rng.choice(DOES)
    id_key, label_key = rng.choice(("id", "id", f"{noun}_id")), rng.choice(("name", "title", "label", "kind"))
    ((extra_key, extra),) = rng.sample(EXTRAS, 1)
    labels: tuple[Value, ...] = (w.title, w.name, lambda r: f"{r.choice(w.ADJECTIVES)} {noun}", w.word)
    make = rng.choice(labels)
    found: list[Item] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        item: Item = {"id": w.ident(rng), label_key: make(rng), extra_key: extra(rng)}
        if rng.random() < 0.3:
            item["options"] = [w.word(rng) for _ in range(rng.randint(2, 3))]
        found.append(item)
    return Errand(noun, find, do, id_key, label_key, extra_key, tuple(found), rng.choice(found))


def _manual(errand: Errand) -> str:
    option = ', "option": ...' if "options" in errand.wanted else ""
    return (
        f'You can call these functions:\n{{"{errand.find}": {{"{errand.label_key}": ...}}}}\n'
        f'{{"{errand.do}_{errand.noun}": {{"{errand.id_key}": ...{option}}}}}'
    )


def _wrapped(rng: Random, noun: str, found: Sequence[Item]) -> str:
    shape = rng.randrange(4)
    if shape == 0:
        return json.dumps(list(found))
    if shape == 1:
        return json.dumps({"results": list(found)})
    if shape == 2:
        return json.dumps({f"{noun}s": list(found), "count": len(found)})
    return json.dumps({str(item["id"]): {k: v for k, v in item.items() if k != "id"} for item in found})


def _finish(rng: Random, errand: Errand) -> Conversation:
    """From the first result on: tell of it or not, settle an option, do it, and say how it went."""
    do, noun, label, key, extra = errand.do, errand.noun, errand.label, errand.extra_key, errand.extra
    talk: Conversation = []
    if rng.random() < 0.5:
        told = (
            f"Yes, I found {label}. The {key} is {extra}.",
            f"I found the {noun} {label}, {key} {extra}.",
            f"There is one: {label}. Its {key} is {extra}. Shall I {do} it?",
        )
        talk.append(turn("assistant", rng.choice(told)))
        if rng.random() < 0.3:
            return talk
        agreed = (f"Yes, {do} it please.", f"Great, {do} it.", "Yes please.", f"Please {do} that one.")
        talk.append(turn("user", rng.choice(agreed)))
    arguments: Item = {errand.id_key: errand.wanted["id"]}
    options = errand.wanted.get("options")
    if isinstance(options, list):
        arguments["option"] = _settle_option(rng, talk, options)
    talk.append(turn("assistant", json.dumps({f"{do}_{noun}": arguments})))
    code = w.ident(rng)
    outcomes = (
        ('{"status": "ok"}', f"Done. I did {do} {label} for you."),
        ('{"ok": true}', f"All right, {label} is done."),
        (json.dumps({"status": "ok", "code": code}), f"Done. Your code is {code}."),
        ('{"error": "not possible"}', f"Sorry, I could not {do} {label}."),
        (json.dumps({"confirmed": label, "number": code}), f"{label} is confirmed, number {code}."),
    )
    result, said = rng.choice(outcomes)
    return [*talk, turn("tool", result), turn("assistant", said)]


def _settle_option(rng: Random, talk: Conversation, options: list[str]) -> str:
    """The option that is taken; `talk` grows by the words that settle it."""
    option: str = rng.choice(options)
    if talk:
        talk[-1]["content"] += f" With {option}."
        return option
    asked = (f"I have {', '.join(options)}. Which one do you want?", f"Which option: {' or '.join(options)}?")
    talk.append(turn("assistant", rng.choice(asked)))
    talk.append(turn("user", rng.choice((f"{option} please.", f"I take {option}.", option))))
    return option
