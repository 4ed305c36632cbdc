"""Invented words, names and values for the templated conversations of `corpus`.

Names are built from syllables, so that no list of entities can be learnt by heart: what the model must do is copy.
Everything takes the caller's `random.Random` and nothing else, so that a seed says which text is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

_ONSETS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh sk st t th tr v w y z".split()
_NUCLEI: list[str] = [*"aeiou" * 3, *"ai au ea ee ia io oa ou y".split()]
_JOINTS = "l m n r s t nd rn ll".split()  # what may close the first syllable
_CODAS = ["", "", "", "l", "n", "r", "s", "t", "m", "x", "ck", "nd", "rt", "sh"]
FIRST = """Anna Ben Carla David Elena Farid Grace Hugo Ines Jonas Kira Liam Maya Nils Olga Pedro Quinn Rosa Sami Tara
Uma Victor Wendy Xenia Yusuf Zoe Alice Bruno Chloe Dario Emma Felix Gina Hana Ivan Julia Karim Laura Marco Nina Oscar
Paula Ravi Sofia Tom Vera Will Amir Bella Colin Dora Erik Fiona Leo Mila Noah Ruth Sven Tina""".split()
CITIES = """Paris London Berlin Madrid Rome Vienna Oslo Lisbon Dublin Prague Athens Cairo Boston Chicago Denver Seattle
Toronto Tokyo Delhi Sydney Lima Quito Nairobi Seoul Hanoi Kyoto Porto Bergen Geneva Lyon Milan Turin""".split()
COLOURS = """red blue green yellow orange purple pink brown black white grey silver gold teal violet crimson indigo
turquoise beige maroon""".split()
JOBS = """nurse teacher plumber pilot lawyer dentist baker gardener painter farmer librarian carpenter mechanic engineer
journalist photographer translator architect electrician tailor vet postman musician programmer accountant surgeon
firefighter biologist sculptor welder""".split()
PETS = "dog cat parrot horse rabbit hamster turtle goldfish pony canary lizard ferret donkey goat".split()
KIN = """sister brother mother father daughter son wife husband boss neighbour cousin uncle aunt friend teacher doctor
dentist landlord grandmother grandfather nephew niece roommate coach""".split()
HOBBIES = """chess swimming hiking painting sailing knitting climbing dancing gardening fishing cycling running skiing
pottery photography archery singing juggling origami rowing surfing birdwatching""".split()
ANIMALS = "owl fox wolf bear tiger otter whale eagle panda zebra koala raven badger heron lynx camel".split()
MONTHS = """January February March April May June July August September October November December""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SIZES = "small medium large tiny huge narrow wide long short".split()
STATES = "new used broken open closed ready late lost clean full empty".split()
THINGS = """book key room ticket part pet plant bike lamp toy coin stamp map parcel course car boat tent ring watch
camera guitar chair desk rug mirror ladder drill jacket helmet scarf painting statue train flight seat locker garage
badge file printer screen battery cable pump valve bolt engine wheel mower kite puzzle record poster""".split()
ADJECTIVES = """old new small big heavy light round square bright dark quiet strange rare cheap soft hard tall short
lucky wooden plastic metal glass broken shiny dusty""".split()


def word(rng: Random, least: int = 2, most: int = 3) -> str:
    first, *rest = [rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(rng.randint(least, most))]
    joint = rng.choice(_JOINTS) if rng.random() < 0.4 else ""
    return "".join((first, joint, *rest, rng.choice(_CODAS)))


def capital(rng: Random) -> str:
    return word(rng).capitalize()


def one_of(values: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


def name(rng: Random) -> str:
    return rng.choice(FIRST) if rng.random() < 0.25 else word(rng).capitalize()


def full_name(rng: Random) -> str:
    return f"{name(rng)} {word(rng).capitalize()}"


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.35 else word(rng).capitalize()


def title(rng: Random) -> str:
    shapes = (
        lambda: f"The {rng.choice(ADJECTIVES).capitalize()} {rng.choice(ANIMALS + THINGS).capitalize()}",
        lambda: f"{word(rng).capitalize()} and {word(rng).capitalize()}",
        lambda: f"The {word(rng).capitalize()} of {word(rng).capitalize()}",
        lambda: word(rng).capitalize(),
    )
    return rng.choice(shapes)()


def number(rng: Random, digits: int = 0) -> str:
    digits = digits or rng.randint(1, 4)
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(digits - 1))


def phone(rng: Random) -> str:
    return rng.choice(
        (
            f"{number(rng, 3)} {number(rng, 4)}",
            f"0{number(rng, 2)}-{number(rng, 3)}-{number(rng, 3)}",
            f"{number(rng, 3)}-{number(rng, 4)}",
            number(rng, 6),
        )
    )


def ident(rng: Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    low = word(rng, 1, 1)
    return rng.choice(
        (
            f"{letters}{number(rng)}",
            f"{letters}-{number(rng)}",
            f"{low}_{number(rng)}",
            number(rng, 5),
            f"{low}-{number(rng, 2)}{letters.lower()}",
            f"#{number(rng, 4)}",
        )
    )


def clock(rng: Random) -> str:
    hour, minute = rng.randint(1, 12), rng.choice((0, 0, 15, 30, 45, rng.randint(1, 59)))
    if rng.random() < 0.3:
        return f"{rng.randint(0, 23)}:{minute:02d}"
    return f"{hour} {rng.choice(('am', 'pm'))}" if minute == 0 else f"{hour}:{minute:02d} {rng.choice(('am', 'pm'))}"


def date(rng: Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    return rng.choice(
        (f"{day} {month}", f"{month} {day}", f"the {day}th of {month}" if 3 < day < 21 else f"{month} {day}")
    )


def price(rng: Random) -> str:
    return rng.choice((f"{number(rng)} dollars", f"${number(rng, 2)}", f"{number(rng, 2)}.{number(rng, 2)}"))
