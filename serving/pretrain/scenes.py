"""The kinds of conversation that are written for pretraining. In each, what the assistant must say stands before it.

Every scene is a function of the random generator that it is given; entities are made from syllables, so only reading
and copying pays. Nothing here is about the domains that a night is to teach.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random

from . import talks
from . import words as w
from .everyday import chat
from .facts import Fact, Value, fact, facts, phrases

Turn = dict[str, str]
Conversation = list[Turn]

UNKNOWN = phrases(
    "I don't know that yet.|You have not told me that yet.|I do not know that yet. Could you tell me?"
    "|Sorry, I don't know that.|I'm afraid I don't know that yet.|You haven't told me yet."
)
NOTED = phrases(
    "Got it.|Thank you, I will remember that.|Noted.|Okay, I will keep that in mind.|Nice to know!"
    "|Thanks for telling me.|I have noted it.|Alright.|Good to know."
)
HEADINGS = phrases(
    "Notes from earlier conversations:|Notes from earlier conversations:|Notes from earlier conversations:"
    "|What you know about the user:|Memory:|Known facts:|Facts:|From earlier:|Remember:"
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning.", "Good morning! How are you?"),
    ("How are you?", "I am well, thank you. And you?"),
    ("Thanks!", "You're welcome!"),
    ("Thank you very much.", "You are welcome. Have a nice day!"),
    ("Goodbye.", "Goodbye! See you soon."),
    ("Good night.", "Good night! Sleep well."),
    ("That was wrong.", "I am sorry about that. Could you tell me what is right?"),
    ("You are very helpful.", "Thank you, I am glad to help."),
    ("I am bored.", "We could talk about films, music or sport."),
    ("I feel sad today.", "I am sorry to hear that. Do you want to talk about it?"),
    ("Who are you?", "I am an assistant. I can chat and remember what you tell me."),
    ("What can you do?", "I can chat with you, remember facts and answer questions about them."),
    ("Can you help me?", "Of course. What do you need?"),
    ("Never mind.", "No problem. Tell me if you need anything."),
    ("I had a great day.", "That is wonderful! What made it so great?"),
    ("Tell me the weather.", "Sorry, I cannot see the weather."),
    ("I am tired.", "You should take a rest."),
    ("Are you a robot?", "Yes, I am a computer program."),
    ("Sorry, I was rude.", "That is all right."),
    ("Wait a moment.", "Sure, take your time."),
    ("Okay.", "Is there anything else?"),
    ("No, that is all.", "All right. Have a nice day!"),
    ("Yes please.", "All right, let us start."),
    ("Can you call the police for me?", "I am sorry, but I cannot make phone calls."),
)


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


# -- facts ---


def from_notes(rng: Random, settled: bool = False, unknown: float = 0.25) -> Conversation:
    """Notes in a system message; questions about them, and, a share `unknown`, about what they do not say.

    Where it is `settled` that is said in one way alone: of many ways each is less likely than a guess, and a model that
    says what is likeliest would guess.
    """
    known = facts(rng, rng.choice((1, 1, 2, 3, 4, 5, 6, 8, 10)))
    talk = [notes(rng, known)]
    if rng.random() < 0.2:
        talk += _small_talk(rng)
    for one in rng.sample(known, min(len(known), rng.randint(1, 3))):
        talk += _ask_unknown(rng, known, settled) if rng.random() < unknown else _ask(rng, one)
    return talk


def from_earlier_turns(rng: Random, settled: bool = False) -> Conversation:
    """The person says something, talks of other things, and then asks for it; `settled` as in `from_notes`."""
    known = facts(rng, rng.randint(1, 4))
    talk: Conversation = []
    for said in _tellings(rng, known):
        opening = rng.choice(("", "", "Please remember this: ", "Hello. ", "Hi! ", "Just so you know, "))
        talk += [turn("user", opening + said), turn("assistant", rng.choice(NOTED))]
        if rng.random() < 0.3:
            talk += _small_talk(rng) if rng.random() < 0.5 else everyday(rng)
    for one in rng.sample(known, rng.randint(1, len(known))):
        talk += _ask(rng, one)
    if rng.random() < 0.3:
        talk += _ask_unknown(rng, known, settled)
    return talk


def _tellings(rng: Random, known: Sequence[Fact]) -> list[str]:
    """The facts as they are told: one at a time, or two in one sentence."""
    told = [one.said for one in known]
    if len(told) < 2 or rng.random() > 0.4:
        return told
    first, second, *rest = told
    if second.startswith(("My ", "The ", "You ", "Please ", "Call ")):
        second = second[0].lower() + second[1:]
    return [f"{first.rstrip('.')} and {second}", *rest]


def notes(rng: Random, known: Sequence[Fact]) -> Turn:
    head = rng.choice(HEADINGS)
    text = "\n".join([head, *(_note_line(rng, one) for one in known)])
    if rng.random() < 0.4:
        leads = "You are a helpful assistant.|You are a friendly assistant.|Answer in one short sentence."
        leads += f"|You are an assistant with a memory.|You are {w.name(rng)}, an assistant."
        lead = rng.choice(phrases(leads))
        text = f"{lead}\n\n{text}" if rng.random() < 0.7 else f"{lead}\n{text}"
    return turn("system", text)


def _note_line(rng: Random, one: Fact) -> str:
    return f"- ({w.date(rng)}) {one.note}" if rng.random() < 0.15 else f"- {one.note}"


def _casual(rng: Random, text: str) -> str:
    """A question as people type it: as `_typed` has it, or with an opening."""
    if rng.random() < 0.06:
        opening = rng.choice(("Hey, ", "Please tell me: ", "Quick question: ", "By the way, "))
        return opening + text[0].lower() + text[1:]
    return _typed(rng, text)


def _typed(rng: Random, text: str) -> str:
    """The same words as people type them: now and then without capitals or the closing mark."""
    roll = rng.random()
    if roll < 0.08:
        return text.lower()
    return text.rstrip("?.!") if roll < 0.14 else text


def _ask(rng: Random, one: Fact) -> Conversation:
    return [turn("user", _casual(rng, one.question)), turn("assistant", one.answer)]


def _ask_unknown(rng: Random, known: Sequence[Fact], settled: bool = False) -> Conversation:
    """Asks for what was not told; every other time for what sounds like something that was."""
    keys = {one.key for one in known}
    wanted = {rng.choice(known).form} if rng.random() < 0.5 else None
    other = fact(rng)
    for _ in range(200):
        if other.key not in keys and (wanted is None or other.form in wanted):
            break
        other = fact(rng)
    if other.key in keys:
        return _small_talk(rng)
    return [
        turn("user", _casual(rng, other.question)),
        turn("assistant", UNKNOWN[0] if settled else rng.choice(UNKNOWN)),
    ]


def everyday(rng: Random) -> Conversation:
    """Small talk in which each answer takes up what was said."""
    talk: Conversation = []
    for said, reply in chat(rng):
        talk += [turn("user", _typed(rng, said)), turn("assistant", reply)]
    return talk


def written_out(rng: Random) -> Conversation:
    """What people wrote for it, of which no two are alike."""
    told = talks.told(rng.choice(talks.everything()), rng)
    return [turn(role, _typed(rng, text) if role == "user" else text) for role, text in told]


def _small_talk(rng: Random) -> Conversation:
    said, reply = rng.choice(SMALL_TALK)
    return [turn("user", _casual(rng, said)), turn("assistant", reply)]


# -- records ---

FIELDS: tuple[tuple[str, Value], ...] = (
    ("name", w.name),
    ("code", w.ident),
    ("colour", w.one_of(w.COLOURS)),
    ("city", w.city),
    ("price", w.price),
    ("date", w.date),
    ("time", w.clock),
    ("size", w.one_of(w.SIZES)),
    ("owner", w.full_name),
    ("state", w.one_of(w.STATES)),
    ("shelf", lambda r: w.number(r, 2)),
    ("phone", w.phone),
    ("title", w.title),
    ("day", w.one_of(w.DAYS)),
    ("weight", lambda r: f"{w.number(r, 2)} kg"),
    ("row", lambda r: w.number(r, 1)),
    ("kind", w.one_of(w.THINGS)),
    ("floor", lambda r: w.number(r, 1)),
    ("id", w.ident),
    ("maker", w.capital),
)
CELL_ASKED = phrases(
    "What is the {a} of the one with {k} {x}?|Which {a} goes with {k} {x}?|{k} {x}: what is the {a}?"
    "|Give me the {a} for {k} {x}."
)
CELL_ANSWERED = phrases("The {a} is {y}.|It is {y}.|The {a} of {x} is {y}.")


def from_records(rng: Random) -> Conversation:
    """A table, list or record in the context, and questions for single cells."""
    fields = rng.sample(FIELDS, rng.randint(2, 4))
    rows = [{key: make(rng) for key, make in fields} for _ in range(rng.choice((1, 2, 3, 4)))]
    text = _render(rng, rows)
    role = rng.choice(("system", "user"))
    talk: Conversation = [turn("system", text)] if role == "system" else []
    for i in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        known, asked = rng.sample(list(row), 2)
        question = rng.choice(CELL_ASKED).format(a=asked, k=known, x=row[known])
        answer = rng.choice(CELL_ANSWERED).format(a=asked, x=row[known], y=row[asked])
        talk.append(turn("user", f"{text}\n\n{question}" if role == "user" and i == 0 else question))
        talk.append(turn("assistant", answer))
    return talk


def _render(rng: Random, rows: Sequence[dict[str, str]]) -> str:
    keys = list(rows[0])
    style = rng.randrange(5)
    if style == 0:
        lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
        return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])
    if style == 1:
        return json.dumps(rows if len(rows) > 1 else rows[0])
    if style == 2:
        return "\n".join([",".join(keys), *(",".join(row.values()) for row in rows)])
    if style == 3:
        return "\n\n".join("\n".join(f"{key}: {value}" for key, value in row.items()) for row in rows)
    return "\n".join(f"{i}. " + ", ".join(f"{k} {v}" for k, v in row.items()) for i, row in enumerate(rows, 1))


# -- a help desk, style, small talk ---

DESK: tuple[tuple[str, str, str, Value], ...] = (
    ("We are open until {v}.", "When do you close?", "We are open until {v}.", w.clock),
    (
        "Returns are accepted within {v} days.",
        "Can I send something back?",
        "Yes, you can return it within {v} days.",
        lambda r: w.number(r, 2),
    ),
    ("Delivery takes {v} days.", "How long does delivery take?", "Delivery takes {v} days.", lambda r: w.number(r, 1)),
    ("The office is in {v}.", "Where is your office?", "Our office is in {v}.", w.city),
    ("Passwords are reset on the page {v}.", "I forgot my password.", "You can reset it on the page {v}.", w.word),
    ("The manager is {v}.", "Who is the manager?", "The manager is {v}.", w.full_name),
    ("Delivery costs {v}.", "How much is the delivery?", "Delivery costs {v}.", w.price),
    ("For complaints call {v}.", "I want to complain.", "I am sorry about that. Please call {v}.", w.phone),
    ("We are closed on {v}.", "On which day are you closed?", "We are closed on {v}.", w.one_of(w.DAYS)),
    (
        "The guarantee lasts {v} years.",
        "Is there a guarantee?",
        "Yes, the guarantee lasts {v} years.",
        lambda r: w.number(r, 1),
    ),
)


def at_the_desk(rng: Random) -> Conversation:
    """A small help desk whose rules stand in the system message."""
    rules = [(rule, rule[3](rng)) for rule in rng.sample(DESK, rng.randint(1, 5))]
    shop = w.capital(rng)
    talk = [turn("system", f"You answer for {shop}. " + " ".join(rule[0].format(v=v) for rule, v in rules))]
    if rng.random() < 0.3:
        talk.append(turn("user", rng.choice(("Hello!", "Hi.", "Good morning."))))
        talk.append(turn("assistant", f"Welcome to {shop}! How can I help you?"))
    for rule, v in rng.sample(rules, rng.randint(1, min(2, len(rules)))):
        talk += [turn("user", _casual(rng, rule[1])), turn("assistant", rule[2].format(v=v))]
    if rng.random() < 0.4:
        talk.append(turn("user", rng.choice(("Thanks!", "Thank you.", "Great, thanks."))))
        talk.append(turn("assistant", "You're welcome!"))
    return talk


def on_style(rng: Random) -> Conversation:
    """Echo, capitals, lists, spelling and order: short instructions with one right answer."""
    things = [w.word(rng) if rng.random() < 0.7 else rng.choice(w.THINGS) for _ in range(rng.randint(2, 4))]
    talk: Conversation = []
    if rng.random() < 0.2:
        leads = ("Be brief.", "You are a helpful assistant.", "Answer in one sentence.", "Do what you are asked.")
        talk.append(turn("system", rng.choice(leads)))
    if rng.random() < 0.3:
        talk += _small_talk(rng)
    for said, reply in rng.sample(_tasks(things), rng.randint(1, 3)):
        talk += [turn("user", said), turn("assistant", reply)]
    return talk


def _tasks(things: Sequence[str]) -> tuple[tuple[str, str], ...]:
    phrase, joined, first = " ".join(things), ", ".join(things), things[0]
    return (
        (f"Say {phrase}.", phrase),
        (f'Repeat after me: "{phrase}"', phrase),
        (f"Repeat: {phrase}", phrase),
        (f"Write {phrase} in capitals.", phrase.upper()),
        (f"Make a list of {joined}.", "\n".join(f"- {t}" for t in things)),
        (f"What is the first word of: {phrase}?", first),
        (f"What is the last word of: {phrase}?", things[-1]),
        (f"How many words are in: {phrase}?", str(len(things))),
        (f"Number these: {joined}.", "\n".join(f"{i}. {t}" for i, t in enumerate(things, 1))),
        (f"Greet {first.capitalize()}.", f"Hello, {first.capitalize()}!"),
        (f"Say goodbye to {first.capitalize()}.", f"Goodbye, {first.capitalize()}!"),
        (f"Put {phrase} in quotes.", f'"{phrase}"'),
        (f"Say {phrase} twice.", f"{phrase} {phrase}"),
        (f"Write {first} with a capital letter.", first.capitalize()),
        (f"Make it JSON: key {first}, value {things[1]}.", json.dumps({first: things[1]})),
    )


def greeting(rng: Random) -> Conversation:
    talk: Conversation = []
    if rng.random() < 0.4:
        leads = ("You are a helpful assistant.", "Be friendly.", "Be brief.", "Answer politely.")
        talk.append(turn("system", rng.choice(leads)))
    for _ in range(rng.randint(1, 4)):
        talk += _small_talk(rng)
    return talk
