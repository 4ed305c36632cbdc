"""Facts over invented values, each as a person says it, as a note has it, as it is asked for and as it is answered.

In the phrases `{n}` is a noun that is drawn with the fact, `{p}` somebody else and `{v}` the value. What is said in the
first person also stands in notes as it is. The fact and its answer always have the value in common, letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from . import words as w

Value = Callable[[Random], str]


def phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


@dataclass(frozen=True)
class Shape:
    """The ways to word one kind of fact."""

    said: tuple[str, ...]
    noted: tuple[str, ...]
    asked: tuple[str, ...]
    answered: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """`key` is equal for facts that one question cannot tell apart, `form` for those that are worded alike."""

    key: str
    form: str
    value: str
    said: str
    note: str
    question: str
    answer: str


NAMED = Shape(
    phrases("My {n} is called {v}.|I have a {n} named {v}.|My {n}'s name is {v}.|{v} is my {n}."),
    phrases("The user's {n} is called {v}.|The user has a {n} named {v}.|The name of the user's {n} is {v}."),
    phrases(
        "What is my {n} called?|What's my {n}'s name?|Do you remember the name of my {n}?|What is the name of my {n}?"
        "|Who is my {n}?|Can you tell me what my {n} is called?"
    ),
    phrases("Your {n} is called {v}.|Your {n}'s name is {v}.|The name of your {n} is {v}."),
)
PLAIN = Shape(
    phrases("My {n} is {v}.|The {n} I use is {v}.|Please note that my {n} is {v}.|{v} is my {n}."),
    phrases("The user's {n} is {v}.|The {n} of the user is {v}.|User's {n}: {v}."),
    phrases(
        "What is my {n}?|What's my {n}?|Can you tell me my {n}?|Do you know my {n}?|I forgot my {n}. What is it?"
        "|Remind me of my {n}, please."
    ),
    phrases("Your {n} is {v}.|It is {v}.|Your {n} is {v}, as you told me."),
)
HOME = Shape(
    phrases("I live in {v}.|My home is in {v}.|I moved to {v}.|I'm living in {v} now."),
    phrases("The user lives in {v}.|The user moved to {v}.|Home: {v}."),
    phrases("Where do I live?|Which city do I live in?|Do you know where I live?|Where is my home?"),
    phrases("You live in {v}.|Your home is in {v}."),
)
JOB = Shape(
    phrases("I work as a {v}.|I am a {v}.|My job is {v}.|I'm a {v} by trade."),
    phrases("The user works as a {v}.|The user is a {v}.|Job: {v}."),
    phrases("What do I do for a living?|What is my job?|What's my profession?|Do you remember what I work as?"),
    phrases("You work as a {v}.|You are a {v}."),
)
NAME = Shape(
    phrases("My name is {v}.|I am {v}.|I'm {v}.|You can call me {v}.|Call me {v}."),
    phrases("The user's name is {v}.|The user is called {v}.|Name: {v}."),
    phrases("What is my name?|What's my name?|Do you know who I am?|Do you remember my name?|Who am I?"),
    phrases("Your name is {v}.|You are {v}.|You told me that your name is {v}."),
)
EMPLOYER = Shape(
    phrases("I work at {v}.|I have a job at {v}.|My employer is {v}."),
    phrases("The user works at {v}.|Employer: {v}."),
    phrases("Where do I work?|Who is my employer?|Which company do I work for?"),
    phrases("You work at {v}.|Your employer is {v}."),
)
NUMBERS = (
    "phone number|locker code|flat number|seat|membership number|room number|door code|bus line|licence plate"
    "|ticket number|shoe size|account number|house number"
)
KINDS: tuple[tuple[Shape, Sequence[str], Value], ...] = (
    (NAMED, w.PETS, w.name),
    (NAMED, w.KIN, w.name),
    (NAMED, phrases("school|street|company|team|boat|band|hotel|village|project"), w.capital),
    (PLAIN, phrases(NUMBERS), w.ident),
    (PLAIN, phrases("phone number|work number|emergency contact"), w.phone),
    (PLAIN, phrases("birthday|wedding day|next appointment|moving date|exam date"), w.date),
    (PLAIN, phrases("alarm time|meeting time|train time|bedtime|lunch break"), w.clock),
    (PLAIN, phrases("favourite colour|car colour|lucky colour"), w.one_of(w.COLOURS)),
    (PLAIN, phrases("favourite animal"), w.one_of(w.ANIMALS)),
    (PLAIN, phrases("favourite film|favourite book|favourite song|favourite game|favourite show"), w.title),
    (PLAIN, phrases("favourite city|home town|birthplace|next holiday destination"), w.city),
    (PLAIN, phrases("last name|nickname|user name|middle name|password hint"), w.name),
    (PLAIN, phrases("favourite day|day off"), w.one_of(w.DAYS)),
    (PLAIN, phrases("hobby|favourite sport|new hobby"), w.one_of(w.HOBBIES)),
    (HOME, ("home",), w.city),
    (JOB, ("job",), lambda r: r.choice(w.JOBS) if r.random() < 0.7 else w.word(r)),
    (NAME, ("name",), w.name),
    (EMPLOYER, ("employer",), w.capital),
)
FAVOURITES = {
    "colour": w.COLOURS,
    "animal": w.ANIMALS,
    "sport": w.HOBBIES,
    "month": w.MONTHS,
    "day": w.DAYS,
}
# of others: what is noted, what is asked, what is answered
OTHERS: tuple[tuple[str, str, str, Value], ...] = (
    ("{p} lives in {v}.", "Where does {p} live?", "{p} lives in {v}.", w.city),
    ("{p} works as a {v}.", "What does {p} do for a living?", "{p} works as a {v}.", w.one_of(w.JOBS)),
    ("{p}'s dog is called {v}.", "What is {p}'s dog called?", "{p}'s dog is called {v}.", w.name),
    ("{p} was born on {v}.", "When was {p} born?", "{p} was born on {v}.", w.date),
    ("{p} likes {v}.", "What does {p} like?", "{p} likes {v}.", w.one_of(w.HOBBIES)),
    ("{p}'s phone number is {v}.", "What is {p}'s phone number?", "{p}'s phone number is {v}.", w.phone),
    ("{p} arrives at {v}.", "When does {p} arrive?", "{p} arrives at {v}.", w.clock),
    ("{p} sits next to {v}.", "Who does {p} sit next to?", "{p} sits next to {v}.", w.name),
    (
        "{p} owns a {v}.",
        "What does {p} own?",
        "{p} owns a {v}.",
        lambda r: f"{r.choice(w.COLOURS)} {r.choice(w.THINGS)}",
    ),
    ("{p} is in room {v}.", "Which room is {p} in?", "{p} is in room {v}.", lambda r: w.number(r, 3)),
    ("{p} paid {v} for it.", "How much did {p} pay?", "{p} paid {v}.", w.price),
    ("the {p} is {v}.", "What colour is the {p}?", "The {p} is {v}.", w.one_of(w.COLOURS)),
    ("the code of {p} is {v}.", "What is the code of {p}?", "The code of {p} is {v}.", w.ident),
    ("{p} moved from {v} last year.", "Where did {p} move from?", "{p} moved from {v}.", w.city),
)


def fact(rng: Random) -> Fact:
    return _of_another(rng) if rng.random() < 0.3 else _of_the_user(rng)


def facts(rng: Random, count: int) -> list[Fact]:
    """Facts that no question confuses."""
    found: dict[str, Fact] = {}
    while len(found) < count:
        new = fact(rng)
        found.setdefault(new.key, new)
    return list(found.values())


def _of_another(rng: Random) -> Fact:
    note, question, answer, make = rng.choice(OTHERS)
    person = rng.choice(w.THINGS) if note.startswith("the {p}") else w.name(rng)
    value = make(rng)
    text = note.format(p=person, v=value)
    text = text[0].upper() + text[1:]
    asked, answered = question.format(p=person, v=value), answer.format(p=person, v=value)
    return Fact(asked, note, value, text, text, asked, answered)


def _of_the_user(rng: Random) -> Fact:
    shape, nouns, make = rng.choice(KINDS)
    noun = rng.choice(nouns)
    value = _favourite(rng, noun.split()[-1]) if noun.startswith("favourite ") else make(rng)
    said = rng.choice(shape.said).format(n=noun, v=value)
    note = rng.choice(shape.noted).format(n=noun, v=value) if rng.random() < 0.5 else said
    asked = rng.choice(shape.asked).format(n=noun, v=value)
    return Fact(noun, shape.said[0], value, said, note, asked, rng.choice(shape.answered).format(n=noun, v=value))


def _favourite(rng: Random, noun: str) -> str:
    return rng.choice(FAVOURITES[noun]) if noun in FAVOURITES else w.title(rng)
