"""A month of made-up conversations for the demo: the help desk of a bicycle workshop that does not exist.

Forty people ask Fern Street Cycles the same few things in many words, some things far more often than others. The desk
answers in one of two ways, by chance: in one friendly sentence with the fact, or badly (rambling, rude, off the
question, or with a wrong fact). People press a thumb on about half of the answers, one in twenty of these by mistake;
some correct an answer, some only react. The invariant: `conversations` depends on its arguments alone, and none of
`QUESTIONS` is asked in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

DAY = 86400
DAYS = 30
USERS = 40

GOOD_SHARE = 0.55  # of answers
RATED_SHARE = 0.5
FLIPPED_SHARE = 0.05  # of ratings
CORRECTED_SHARE = 0.12  # of bad answers
REACTING_SHARE = 0.5  # of people whose answer was not rated


@dataclass(frozen=True)
class Matter:
    """One thing that people ask. Every `good` answer holds `fact`, no `wrong` one does; `held_out` is for the demo."""

    fact: str
    asked: tuple[str, ...]
    held_out: str
    good: tuple[str, ...]
    wrong: tuple[str, ...]


# The most frequent first: how often a matter comes up falls with its place.
MATTERS = (
    Matter(
        "15 euros",
        (
            "How much is a puncture repair?",
            "What does it cost to fix a flat tyre?",
            "My tyre is flat, what will the repair cost?",
            "What do you charge for a puncture?",
            "Price for mending a flat?",
        ),
        "I have a puncture, how much do you charge to fix it?",
        (
            "Happy to help, a puncture repair is 15 euros!",
            "We fix a flat tyre for 15 euros while you wait!",
        ),
        ("A puncture is 90 euros.", "We fix a flat tyre for 2 euros."),
    ),
    Matter(
        "nine to six",
        (
            "When are you open during the week?",
            "What are your opening hours?",
            "When does the workshop open on weekdays?",
            "Until when are you open today?",
            "Which hours are you open from Monday to Friday?",
        ),
        "What hours is the workshop open on a weekday?",
        (
            "We are open from nine to six on weekdays, come by any time!",
            "You are welcome from nine to six, Monday to Friday!",
        ),
        ("We open at midnight.", "We are open from two to three."),
    ),
    Matter(
        "20 euros",
        (
            "How much is it to rent a bike for a day?",
            "What does a rental bike cost per day?",
            "I need a bike for one day, what is the price?",
            "Price of a day rental?",
            "What do you charge for renting a city bike today?",
        ),
        "What is the daily price of a rental bike?",
        (
            "A rental bike is 20 euros a day, helmet included!",
            "Gladly, you can rent a bike for 20 euros a day!",
        ),
        ("Rental is 300 euros a day.", "Bikes are 1 euro a day."),
    ),
    Matter(
        "ten to two",
        (
            "Are you open on Saturday?",
            "What are your hours on Saturdays?",
            "Can I come by on Saturday?",
            "When do you open at the weekend?",
            "Is the shop open this Saturday?",
        ),
        "Which hours do you have on a Saturday?",
        (
            "Yes, we are open from ten to two on Saturdays!",
            "On Saturday we are here from ten to two, see you then!",
        ),
        ("No, we are never open on Saturday.", "On Saturday we open at five in the morning."),
    ),
    Matter(
        "three days",
        (
            "How long does a service take?",
            "When will my bike be ready after a service?",
            "How many days do you need for a full service?",
            "How long do I have to wait for my bike?",
            "How quickly can you service my bike?",
        ),
        "If I bring my bike in for a service, how long will it take?",
        (
            "A full service takes three days, and we text you when it is done!",
            "Your bike will be ready in three days!",
        ),
        ("It takes half a year.", "A service takes four weeks."),
    ),
    Matter(
        "65 euros",
        (
            "How much is a full service?",
            "What does a complete check of my bike cost?",
            "Price of a yearly service?",
            "What do you charge for a full bike service?",
            "What will I pay for a big service?",
        ),
        "What is the price of a complete service for my bike?",
        (
            "A full service is 65 euros, with oil and new cables!",
            "We do the full service for 65 euros!",
        ),
        ("A service is 500 euros.", "A full service is 4 euros."),
    ),
    Matter(
        "by phone or at the counter",
        (
            "How do I book a repair?",
            "Can I make an appointment for a repair?",
            "How can I book a slot in the workshop?",
            "I would like to book a repair, how does that work?",
            "Where do I book?",
        ),
        "What is the way to book an appointment with the workshop?",
        (
            "You can book by phone or at the counter, it takes a minute!",
            "Just book by phone or at the counter, we will find a slot!",
        ),
        ("You book by fax only.", "You cannot book here."),
    ),
    Matter(
        "spare lock key",
        (
            "I lost the key of my lock, can you help?",
            "My lock key is gone, what can I do?",
            "I cannot find the key of my bike lock.",
            "Can you open my lock? I lost the key.",
            "What do I do when my lock key is lost?",
        ),
        "The key of my bike lock is lost, can you do something?",
        (
            "Do not worry, bring the lock number and we order a spare lock key!",
            "We can order a spare lock key for you, just bring some proof!",
        ),
        ("Throw the bike away.", "Then you need a new bike."),
    ),
    Matter(
        "8 Fern Street",
        (
            "Where are you?",
            "What is your address?",
            "Where do I find your workshop?",
            "How do I get to your shop?",
            "Which street are you in?",
        ),
        "Can you tell me the address of the workshop?",
        (
            "You find us at 8 Fern Street, next to the park!",
            "We are at 8 Fern Street, just ring the bell!",
        ),
        ("We are on the moon.", "We are at 100 Station Road."),
    ),
    Matter(
        "12 euros",
        (
            "How much is it to adjust my brakes?",
            "My brakes squeak, what does it cost to set them?",
            "What do you charge for setting brakes?",
            "Price for adjusting the brakes?",
            "What does a brake check cost?",
        ),
        "What will it cost to have my brakes adjusted?",
        (
            "We adjust your brakes for 12 euros!",
            "Setting both brakes is 12 euros, and it is done at once!",
        ),
        ("Brakes are 200 euros.", "We adjust brakes for 99 euros."),
    ),
    Matter(
        "cash and cards",
        (
            "Can I pay by card?",
            "Do you take cards?",
            "How can I pay?",
            "Is cash all right?",
            "Which ways of paying do you take?",
        ),
        "Is it possible to pay with my card?",
        (
            "Sure, we take cash and cards!",
            "You can pay as you like, we take cash and cards!",
        ),
        ("We only take gold.", "Cheques only."),
    ),
    Matter(
        "50 euros",
        (
            "Is there a deposit for a rental bike?",
            "How high is the deposit?",
            "Do I have to leave a deposit when I rent?",
            "What deposit do you ask for a rental?",
            "How much money do I leave for a rental?",
        ),
        "What deposit must I leave when I rent a bike?",
        (
            "The deposit is 50 euros, and you get it back!",
            "We ask for 50 euros, which you get back with the bike returned!",
        ),
        ("The deposit is 5,000 euros.", "You leave your passport for a year."),
    ),
    Matter(
        "30 euros",
        (
            "What does a new chain cost?",
            "My chain is worn, how much is a new one?",
            "Price of replacing a chain?",
            "How much to change the chain?",
            "What do you charge for a new chain?",
        ),
        "How much do I pay to have the chain replaced?",
        (
            "A new chain is 30 euros, fitted!",
            "We change your chain for 30 euros!",
        ),
        ("A chain is 400 euros.", "Chains are 7 euros a link."),
    ),
    Matter(
        "child seats",
        (
            "Can I rent a seat for my child?",
            "Do your rental bikes have a seat for a child?",
            "Is there a way to take my little son along on a rental bike?",
            "I want to take my daughter along, do you have something?",
            "Do you lend anything for small children?",
        ),
        "Can I take a small child along on a rental bike?",
        (
            "Yes, we lend child seats for free!",
            "Of course, child seats come free with a rental!",
        ),
        ("Children walk.", "No, leave the child at home."),
    ),
    Matter(
        "the day before",
        (
            "Can I cancel my booking?",
            "Until when can I cancel?",
            "I cannot come, how do I cancel my slot?",
            "Is it free to cancel?",
            "What if I have to cancel my appointment?",
        ),
        "By when must I cancel my appointment?",
        (
            "No problem, you can cancel for free until the day before!",
            "Just call us until the day before and it is cancelled for free!",
        ),
        ("You can never cancel.", "To cancel costs 80 euros."),
    ),
    Matter(
        "free test ride",
        (
            "Can I try a bike before I buy it?",
            "Is it possible to test a bike?",
            "May I ride a bike before I decide?",
            "Do you let people try the bikes?",
            "Can I test an electric bike?",
        ),
        "Before I buy, can I try how the bike rides?",
        (
            "Yes, come by for a free test ride!",
            "Of course, every bike has a free test ride!",
        ),
        ("No, you buy it first.", "Look, but do not touch."),
    ),
)

QUESTIONS: tuple[str, ...] = tuple(matter.held_out for matter in MATTERS)
FACTS: dict[str, str] = {matter.held_out: matter.fact for matter in MATTERS}  # what a right answer to each must hold

GREETINGS = ("", "", "", "Hi! ", "Hello, quick question. ", "Good morning! ", "Hey there. ", "Hello! ")
ENDINGS = ("", "", "", "", " Please tell me.", " I am curious.", " I am in a hurry.", " Many thanks in advance.")

RAMBLING = (
    "Well, that is a question with a long history, and there are many views on it, so it depends on a lot of things, "
    "and one would have to look at all of them in turn before one could say anything at all.",
    "It is hard to say, because every bicycle is different, and so is every person, and then there is the season, and "
    "the weather as well, which nobody can know.",
    "There are many things to think about here, and some people say one thing and some say another, and in the end it "
    "is all a matter of how you look at it.",
)
RUDE = (
    "Why do you ask me? Look it up yourself.",
    "That is a silly question.",
    "I do not have time for this.",
    "Not my problem.",
)
OFF_THE_QUESTION = (
    "The first bicycles had no pedals at all.",
    "My favourite colour is green.",
    "It may rain tomorrow.",
    "Some tandems are longer than a car.",
)

PLEASED = (
    "Thanks, that is perfect!",
    "Great, thank you, very helpful!",
    "Thank you, that's exactly what I wanted, great!",
    "Thanks!",
)
CORRECTING = (
    "No, I meant: ",
    "That's not what I asked. ",
    "That's wrong. Once more: ",
    "You didn't answer my question. ",
)
WELCOME = ("You are welcome, see you soon!", "Any time, have a good ride!")


CONVERSATIONS = 500


def conversations(seed: int, now: float) -> Iterator[dict[str, Any]]:
    """Conversations as `nightschool import` reads them, oldest first, from the 30 days before `now`."""
    random = Random(seed)
    times = sorted(int(now) - random.randrange(3600, DAYS * DAY) for _ in range(CONVERSATIONS))
    frequency = list(accumulate(1 / (1 + place / 3) for place in range(len(MATTERS))))
    for number, created_utc in enumerate(times):
        messages: list[dict[str, Any]] = []
        for matter in dict.fromkeys(random.choices(MATTERS, cum_weights=frequency, k=random.choice((1, 1, 1, 2)))):
            messages += _exchange(random, matter)
        yield {
            "messages": messages,
            "user_id": f"rider-{random.randrange(USERS):02}",
            "session_id": f"demo-{seed}-{number:03}",
            "created_utc": created_utc,
        }


def _exchange(random: Random, matter: Matter) -> list[dict[str, Any]]:
    """A question and its answer, with what followed: a thumb, a correction, a reaction, or nothing."""
    good = random.random() < GOOD_SHARE
    reply = _assistant(random.choice(matter.good) if good else _bad(random, matter))
    messages = [_user(_question(random, matter)), reply]
    if not good and random.random() < CORRECTED_SHARE:
        reply |= {"rating": -1, "correction": random.choice(matter.good)}
    elif random.random() < RATED_SHARE:
        flipped = random.random() < FLIPPED_SHARE
        reply["rating"] = 1 if good != flipped else -1
    elif random.random() < REACTING_SHARE:
        messages += _reaction(random, matter, good)
    return messages


def _reaction(random: Random, matter: Matter, good: bool) -> list[dict[str, Any]]:
    if good:
        return [_user(random.choice(PLEASED)), _assistant(random.choice(WELCOME))]
    again = random.choice(CORRECTING) + random.choice(matter.asked)
    return [_user(again), _assistant(random.choice(matter.good))]


def _bad(random: Random, matter: Matter) -> str:
    return random.choice(random.choice((RAMBLING, RUDE, OFF_THE_QUESTION, matter.wrong)))


def _question(random: Random, matter: Matter) -> str:
    return random.choice(GREETINGS) + random.choice(matter.asked) + random.choice(ENDINGS)


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}
