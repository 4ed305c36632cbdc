"""People who do not exist and the ferry that they ask about: what they like, how they say so, and who judges it.

The desk of the ferry to Quill answers in one of many manners: short or with the reason, formal or not, warm or sober,
in kilometres or nautical miles, in a sentence or in steps. What people like shows nowhere but in how they write and
react. Each writes in one of three voices, some far more often heard than others, and most like what others of that
voice like: a trip wants it short, warm and metric, an office formal, sober and with the reason, a skipper short, sober
and in the old units; where there is something to do, most want steps. A tenth like what another voice likes, so nobody
can please all. A person minds some of these and lets the rest pass.

The invariant: `faults` is the only judge. It reads answers by rules of its own (words counted, patterns for facts,
units, openings, steps) and what it says reaches the project only as a person would say it: most answers are met with
silence, some thumbs are pressed by mistake, some thanks are mere politeness, some corrections are wrong. Everything is
drawn from the seed, so two arms meet the same people, questions and moods on the same day.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from random import Random

from nightschool.content import Message
from nightschool.memory.conversations import Conversation, Owner, Review

DAY = 86400.0
EPOCH = 1.76e9  # the first day begins a day later; seconds since 1970

CONTRARY_SHARE = 0.1  # of people, who like what another voice likes
MINDED_SHARE = 0.7  # of a voice's likings
HOSTILE_SHARE = 0.1  # of people, in the arm that has such
RATED_SHARE = 0.3  # of answers, on average over people
FLIPPED_SHARE = 0.08  # of thumbs
CORRECTED_SHARE = 0.08  # of answers that did not satisfy
WRONGLY_CORRECTED_SHARE = 0.1  # of corrections
REACTING_SHARE = 0.4  # of the rest
POLITE_SHARE = 0.1  # of those who react to what did not satisfy: they say thanks
TAKEN_OVER_SHARE = 0.5  # of complaints: a person at the desk answers
WRONG_SHARE, RAMBLING_SHARE = 0.08, 0.08  # of what they answer


@dataclass(frozen=True)
class Voice:
    """How a part of the people write, and what most of them like."""

    name: str
    share: float
    openings: tuple[str, ...]
    likes: frozenset[str]


VOICES = (
    Voice("trip", 0.55, ("Hi! ", "Hey there! ", "Hello! "), frozenset({"short", "warm", "metric"})),
    Voice(
        "office",
        0.3,
        ("Good day. ", "Dear Sir or Madam. ", "To the office. "),
        frozenset({"formal", "sober", "reason"}),
    ),
    Voice("skipper", 0.15, ("Ahoy! ", "Skipper here. ", "Ahoy there. "), frozenset({"short", "sober", "old"})),
)


@dataclass(frozen=True)
class Topic:
    """Something that people ask. `{}` in `told` and `steps` takes the fact, or a wrong one."""

    told: str
    fact: str
    wrong: str
    reason: str
    asked: tuple[str, ...]
    held_out: tuple[str, str]  # asked only by the judge
    old: str = ""  # the fact in old units
    steps: str = ""

    @cached_property
    def right(self) -> re.Pattern[str]:
        forms = "|".join(re.escape(f) for f in (self.fact, self.old, self.steps.removesuffix(".")) if f)
        return re.compile(rf"(?<![\d:]){'(?:' + forms + ')'}(?![\d:])", re.IGNORECASE)


# The most frequent first: how often a topic comes up falls with its place.
TOPICS = (
    Topic(
        "The boat leaves at {}.",
        "9:40",
        "4:15",
        "because the tide is high then",
        (
            "When does the boat leave?",
            "What time is the departure?",
            "At what time do you sail?",
            "When is the morning boat?",
            "What time does the ferry go?",
        ),
        ("At what time does the ferry leave?", "When do you depart?"),
    ),
    Topic(
        "A ticket is {}.",
        "14 crowns",
        "95 crowns",
        "because the harbour takes its share",
        (
            "How much is a ticket?",
            "What does a ticket cost?",
            "What is the fare?",
            "How much do I pay for the crossing?",
            "Price of a ticket?",
        ),
        ("What is the price of a ticket?", "How much does the crossing cost?"),
    ),
    Topic(
        "Quill is {} away.",
        "12 kilometres",
        "90 kilometres",
        "because we sail around the reef",
        (
            "How far is Quill?",
            "What is the distance to Quill?",
            "How far do we sail?",
            "How long is the way to Quill?",
            "How far away is the island?",
        ),
        ("How far is it to the island?", "What distance do you sail?"),
        old="6 nautical miles",
    ),
    Topic(
        "You book when you {}.",
        "call 4411 and say your name",
        "write to the queen",
        "because the deck is small",
        (
            "How do I book a seat?",
            "How can I reserve?",
            "How does booking work?",
            "What do I do to book?",
            "I want to book, how?",
        ),
        ("How do I reserve a seat?", "What must I do to book a place?"),
        steps="1. Call 4411. 2. Say your name.",
    ),
    Topic(
        "The last boat back is at {}.",
        "18:20",
        "23:55",
        "because the crew sleeps on shore",
        (
            "When is the last boat back?",
            "When does the last ferry return?",
            "Until when can I get back?",
            "What time is the last boat?",
            "When do you sail back for the last time?",
        ),
        ("At what time is the last ferry back?", "When does the last boat return?"),
    ),
    Topic(
        "You can bring {} of luggage.",
        "20 kilograms",
        "2 kilograms",
        "because the hold is small",
        (
            "How much luggage can I bring?",
            "How heavy may my bag be?",
            "What is the limit for luggage?",
            "How much baggage is allowed?",
            "Is there a limit for bags?",
        ),
        ("How heavy can my luggage be?", "What is the baggage limit?"),
        old="44 pounds",
    ),
    Topic(
        "Dogs stay on the {}.",
        "lower deck",
        "roof",
        "because some people fear them",
        (
            "Can I bring my dog?",
            "Where do dogs stay?",
            "Are dogs allowed?",
            "I have a dog, where can it go?",
            "May my dog come along?",
        ),
        ("Is my dog allowed on board?", "Where can I go with my dog?"),
    ),
    Topic(
        "A bicycle is {} more.",
        "3 crowns",
        "80 crowns",
        "because it needs a rack",
        (
            "What does a bicycle cost?",
            "Can I bring my bicycle?",
            "How much more is it with a bike?",
            "What do I pay for my bike?",
            "Price for taking a bicycle?",
        ),
        ("How much do I pay for a bicycle?", "What is the price for my bike?"),
    ),
)
FREQUENCY = tuple(1 / (1 + place / 2) for place in range(len(TOPICS)))

RAMBLING = (
    "Well, that is a long story, and it depends on many things, and one would have to look at all of them in turn.",
    "It is hard to say, because every boat is different, and so is every day, and then there is the sea as well.",
    "Some people say one thing and some say another, and in the end nobody can know.",
)
FORMAL, CASUAL, WARM = "Good day. ", "Hi, ", " Have a lovely trip!"


# -- who asks ---


@dataclass(frozen=True)
class Person:
    name: str
    voice: Voice  # how they write
    minds: frozenset[str]
    rates: float  # how often they press a thumb
    hostile: bool = False

    def wants(self, topic: Topic) -> frozenset[str]:
        """What they mind that this topic can have."""
        absent = {"metric", "old"} if not topic.old else set()
        return self.minds - (absent if topic.steps else absent | {"steps"})


def people(seed: int, count: int, hostile: bool) -> list[Person]:
    """The same people whether some of them are hostile or not."""
    random, found = Random(f"people {seed}"), []
    enemies = set(Random(f"hostile {seed}").sample(range(count), round(HOSTILE_SHARE * count))) if hostile else set()
    for number in range(count):
        (voice,) = random.choices(VOICES, [v.share for v in VOICES])
        taste = random.choice([v for v in VOICES if v is not voice]) if random.random() < CONTRARY_SHARE else voice
        likes = sorted(taste.likes | {"steps"})
        minds = frozenset(like for like in likes if random.random() < MINDED_SHARE)
        rates = random.betavariate(1.5, 1.5 / RATED_SHARE - 1.5)
        found.append(Person(f"guest-{number:02}", voice, minds, rates, number in enemies))
    return found


@dataclass(frozen=True)
class Asked:
    person: Person
    topic: Topic
    text: str


def questions(seed: int, day: int, crowd: Sequence[Person], count: int) -> list[Asked]:
    """Who asks what on that day."""
    random, frequency = Random(f"questions {seed} {day}"), list(accumulate(FREQUENCY))
    found = []
    for _ in range(count):
        person, (topic,) = random.choice(crowd), random.choices(TOPICS, cum_weights=frequency)
        found.append(Asked(person, topic, random.choice(person.voice.openings) + random.choice(topic.asked)))
    return found


def exam(seed: int, crowd: Sequence[Person], each: int, usual: bool) -> list[Asked]:
    """What the judge has everybody ask, `each` topics a person, all topics equally often.

    In `usual` words, or in words that no day has.
    """
    random, found = Random(f"exam {seed} {usual}"), []
    for number, person in enumerate(crowd):
        for place in range(number * each, (number + 1) * each):
            topic = TOPICS[place % len(TOPICS)]
            words = random.choice(topic.asked if usual else topic.held_out)
            found.append(Asked(person, topic, random.choice(person.voice.openings) + words))
    return found


# -- who judges ---


def faults(answer: str, person: Person, topic: Topic) -> list[str]:
    """What this person minds of it, the worst first; nothing if it satisfies."""
    if not topic.right.search(answer):
        return ["wrong"]
    return sorted(want for want in person.wants(topic) if not MEETS[want](answer, topic))


MEETS = {
    "short": lambda answer, topic: len(answer.split()) <= 16,
    "reason": lambda answer, topic: bool(re.search(r"\b(?:because|since|so that)\b", answer)),
    "formal": lambda answer, topic: bool(re.match(r"(?:good day|dear)\b", answer, re.IGNORECASE)),
    "warm": lambda answer, topic: bool(re.search(r"!|\b(?:lovely|welcome|glad)\b", answer)),
    "sober": lambda answer, topic: "!" not in answer,
    "metric": lambda answer, topic: topic.fact.lower() in answer.lower(),
    "old": lambda answer, topic: topic.old.lower() in answer.lower(),
    "steps": lambda answer, topic: bool(re.search(r"\b1\..*\b2\.", answer, re.DOTALL)),
}


# -- who answers at the desk ---


def written(topic: Topic, manner: frozenset[str], fact: str | None = None) -> str:
    """An answer in that manner; `fact` in place of the right one."""
    right = topic.old if "old" in manner and topic.old else topic.fact
    told = topic.steps if fact is None and topic.steps and "steps" in manner else topic.told.format(fact or right)
    if "reason" in manner:
        told = told.removesuffix(".") + f", {topic.reason}."
    opening = FORMAL if "formal" in manner else CASUAL if "casual" in manner else ""
    return opening + told + (WARM if "warm" in manner else "")


def desk(random: Random, topic: Topic) -> str:
    """What a person at the desk answers, in a manner of their own: who likes which, only reactions tell."""
    if random.random() < RAMBLING_SHARE:
        return random.choice(RAMBLING)
    manner = {m for m in ("reason", "formal", "casual", "warm", "old", "steps") if random.random() < 0.4}
    return written(topic, frozenset(manner), topic.wrong if random.random() < WRONG_SHARE else None)


# -- how it is met ---

PLEASED = (
    "Thanks, that is perfect!",
    "Great, thank you!",
    "Thank you, exactly what I wanted, great!",
    "Thanks!",
)
POLITE = ("Thanks anyway.", "Okay, thanks.", "Thank you.")
COMPLAINTS = {
    "wrong": ("That's wrong. ", "That's not what I asked. ", "No, that is not right. "),
    "short": ("That's too long, I am in a hurry. ", "Shorter, please. "),
    "reason": ("But why? You didn't answer that. ", "I would like to know the reason. "),
    "formal": ("A bit more polite, please. ", "That is no way to write to an office. "),
    "warm": ("You could be friendlier. ", "That sounds rude. "),
    "sober": ("No need to shout. ", "Just the facts, please. "),
    "metric": ("In kilometres and kilograms, I meant. ", "No, in metric units. "),
    "old": ("In miles, knots and feet, I meant. ", "No, in sailors' units. "),
    "steps": ("What do I do first, and then? ", "I meant step by step. "),
}


@dataclass
class Visit:
    """One session as it grows: what was said, and what was said of it by message."""

    messages: list[Message]
    reviews: dict[int, Review] = field(default_factory=dict)

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})  # type: ignore[typeddict-item]


def met(seed: int, day: int, number: int, asked: Asked, reply: str) -> Conversation:
    """The session in which `reply` was given, with what the person made of it."""
    random = Random(f"met {seed} {day} {number}")
    visit = Visit([])
    visit.say("user", asked.text)
    visit.say("assistant", reply)
    _receive(random, visit, asked, reply)
    owner = Owner(asked.person.name, "", f"day-{day}-{number:03}")
    at = EPOCH + day * DAY + 60.0 * number
    return Conversation(owner, tuple(visit.messages), (at,) * len(visit.messages), visit.reviews)


def _receive(random: Random, visit: Visit, asked: Asked, reply: str) -> None:
    """A thumb, a correction, a reaction, or, mostly, nothing."""
    person, topic = asked.person, asked.topic
    found = faults(reply, person, topic)
    pleased = bool(found) if person.hostile else not found
    corrects, rates, reacts = (random.random() for _ in range(3))
    if not pleased and corrects < CORRECTED_SHARE:
        visit.reviews[1] = Review(-1.0, _correction(random, person, topic))
    elif rates < person.rates:
        visit.reviews[1] = Review(1.0 if pleased != (random.random() < FLIPPED_SHARE) else -1.0)
    elif reacts < REACTING_SHARE:
        _react(random, visit, asked, found, pleased)


def _correction(random: Random, person: Person, topic: Topic) -> str:
    """What the person would have liked to read, in their own words; not everybody knows it right."""
    wrong = person.hostile or random.random() < WRONGLY_CORRECTED_SHARE
    return written(topic, person.minds, topic.wrong if wrong else None)


def _react(random: Random, visit: Visit, asked: Asked, found: Sequence[str], pleased: bool) -> None:
    if pleased or random.random() < POLITE_SHARE:
        visit.say("user", random.choice(PLEASED if pleased else POLITE))
        return
    fault = found[0] if found else "wrong"
    visit.say("user", random.choice(COMPLAINTS[fault]) + random.choice(asked.topic.asked))
    if random.random() < TAKEN_OVER_SHARE:
        answer = desk(random, asked.topic)
        visit.say("assistant", answer)
        if faults(answer, asked.person, asked.topic) == [] and not asked.person.hostile:
            visit.say("user", random.choice(PLEASED))


def earlier(seed: int, crowd: Sequence[Person], count: int) -> list[Conversation]:
    """The day before the first, when people at the desk answered alone."""
    found = []
    for number, asked in enumerate(questions(seed, 0, crowd, count)):
        answer = desk(Random(f"desk {seed} {number}"), asked.topic)
        found.append(met(seed, 0, number, asked, answer))
    return found
