"""Passwords and PINs by what is said of them, whatever they are made of: `my password is …`, `passphrase: …`, `PIN: …`.

What stands there is a secret unless it is a word by which people say something else of a password (`is wrong`,
`is not …`), a placeholder, or code that reads one from elsewhere. A PIN and what one is changed `to`
have digits. What a turn asks for is told by a short one after it.

Not covered: a password that is itself such a word, one of several words without quotation marks after its first, and
sentences that say it otherwise (`log in with …`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

# Every gap and repetition has a bound, so that no text takes quadratic time.
_GAP = r"\s{1,3}"
_APART = r"[ \t]{0,3}"
_NOUN = (
    r"(?<![a-z$])(?<!:param )(?<!:type )"  # not in another word, a variable, or what documents an argument
    r"(?:passw(?:or)?d|pass[ -]?(?:phrase|code)|pwd|(?P<pin>pin))(?:[ _-](?:code|number))?\b"
)
_ELSEWHERE = r"(?:and|but|or|so|because|that|which|who|when|if|then|while|i|he|she|it|they|we|you|is|are|was|to|be)\b"
_OF_WHAT = rf"(?:{_GAP}(?:for|to|of|on|at|in|from)(?:{_GAP}(?!{_ELSEWHERE})[\w'’&.-]{{1,30}}){{1,6}}?)?"
_NOW = rf"(?:{_GAP}(?:now|currently|just|simply|still|actually|also|called|(?:set|changed){_GAP}to)){{0,2}}"
_SAYS = (
    rf"[\"'`*_)\]]{{0,3}}{_APART}[:=]{{1,3}}{_APART}"  # password: , "password": , **Password:** , PASSWORD=
    rf"|{_OF_WHAT}{_NOW}{_GAP}is{_NOW}{_APART}:?{_GAP}"
    rf"|(?P<to>{_OF_WHAT}{_GAP}(?:to(?:{_GAP}be)?|be){_GAP})"
    rf"|(?(pin){_GAP}(?=\d{{4,8}}\b)|(?!))"  # pin 4821
)
_VALUE = (
    r"[bruf]{0,2}(?:\"(?P<double>[^\"\n<>]{0,64})\"|'(?P<single>[^'\n<>]{0,64})'|`(?P<back>[^`\n<>]{0,64})`)"
    rf"|[\"'`*_(\[]{{0,3}}{_APART}(?P<bare>\d(?:[ -]?\d){{2,15}}(?!\w)"  # digits in groups, or a word
    r"|(?:[^\s\"'`<>]|(?<=\w)'(?=\w))*[^\s\"'`<>.,;:?)\]*_])"
)
_SAID = re.compile(rf"(?i){_NOUN}(?:{_SAYS})(?:{_VALUE})")
_VALUES = ("double", "single", "back", "bare")

# What people say of a password without telling it.
_NO_SECRET = frozenset(
    # how it is
    "absent accepted alright bad blank broken case-sensitive chosen compromised correct different down due easy "
    "empty essential fine forgotten gone good great hard hidden important incorrect insecure invalid kept known "
    "long longer lost made mandatory missing necessary new obsolete off ok okay old optional out over present "
    "private protected public random ready required reset right safe same secret secure sent set short shorter "
    "simple stolen strong stronger sufficient taken temporary there tough unique unknown unsafe up used useful "
    "useless valid visible vital weak weaker written wrong "
    # words that only lead to something else
    "a about after again are all already also always an and another any anything as at because before being better "
    "between both but by currently either enough every everything exactly fewer first for from given going he her "
    "here his how i if in indeed inside is it its just less like likely maximum maybe minimum more most much my "
    "near neither never next no none nor not nothing now of often on once one only or our perhaps probably quite "
    "rather really she shown so some something sometimes somewhere soon still supposed than that the their them "
    "then these they this those to too two under unless until usually very we well what when where which who "
    "whose why with within without yes yet you your "
    # what to do with one
    "ask avoid ca can change check choose click contact could create do does ensure enter forget forgot give "
    "has have help input keep leave let make may might must need needs pass passcode passphrase passwd password "
    "pick pin please pwd repeat save see select send share should show store tell try type update use verify was "
    "will wo would write "
    # code
    "bool boolean bytes char false n/a nil null self str string tbd text true undefined varchar xxx".split()
)
_SAYS_HOW = re.compile(r"[a-z]{3,8}(?:ed|ing|ly|able|ible)|\d{1,2}[-–]\d{1,2}")
_CONTRACTED = re.compile(r"n['’]t$|['’](?:s|re|ll|ve|d|m)$")
_CODE = re.compile(
    r"[a-z_][\w.]*[(\[{].*|\$[a-z_{(].*|\{+\w.*|%[sd(].*|(?:self|this|os|process|req|request|user|config|settings|args"
    r"|form|data|env|ctx|event)[.\[].*|(?:[a-z]+[._])+(?:password|passwd|passphrase|pwd|pin)",
    re.IGNORECASE,
)


# The same, and words that end like these, where `is` and not `:` or `=` stands before them.
_SAYS_HOW_LONGER = re.compile(r"[a-z]{3,14}(?:ed|ing|ly|able|ible)|\d{1,2}[-–]\d{1,2}")
_SAYS_STATE = re.compile(r"[a-z]{3,14}ed|\d{1,2}[-–]\d{1,2}")  # password: required
_NO_SECRET_EITHER = frozenset("below crucial free mine ours theirs tricky yours".split())
_ASSIGNED = re.compile(r"[:=][\s\"'`*_(\[]{0,9}$")
_OTHER_PIN = re.compile(r"(?i)\b(?:safety|bobby|rolling|push|drawing|hair|hat|tie|lapel|bowling|clothes)[ -]$")

_ASKED = (
    r"(?:(?P<phone>(?:tele|mobile |cell )?phone|mobile|cell)(?: number)?|passw(?:or)?d|pass[ -]?(?:phrase|code)"
    r"|(?P<pin>pin)(?: code| number)?)"
)
_ASKED_OF_YOU = _ASKED.replace("?P<", "?P<your_")
_ASKS = re.compile(
    r"(?i)\b(?:(?:what(?:['’]s| is| was)|tell|give|enter|type|provide|share|send|confirm|need)\s+"
    rf"(?:(?!how\b|to\b|if\b|where\b|about\b)[\w'’-]+\s+){{0,4}}{_ASKED}\b[^.?!\n]{{0,40}}"
    rf"|your {_ASKED_OF_YOU}[ ,]+please)"
    r"[?.:!]?\s*$"
)
_ONE_WORD = re.compile(
    r"(?i)\W*(?:(?:it['’]?s|it is|that['’]?s|sure|yes|ok|okay|here|my \w+ is)[,:]?\s+){0,2}"
    r"(?P<value>[+(]?\d(?:[ ().-]{0,2}\d){2,14}|[^\s\"'`<>]{4,64}?)"
    r"(?:[\s,]+(?:please|thanks|thank you))?[.!?\"'`)]{0,3}\s*"
)
_REPLIES = frozenset(
    "absolutely certainly cheers cool done dunno forgot goodbye great hello hmmm impossible later maybe never nope "
    "nothing okay perfect really settings sorry sure thanks understood unfortunately wait what whatever yeah".split()
)


def passwords(text: str, *, assigned: bool = False) -> Iterator[tuple[int, int]]:
    """Where in `text` they stand. `assigned`: told apart are `password: lovely` and `the password is lovely`."""
    for match in _SAID.finditer(text):
        name = next(name for name in _VALUES if match[name] is not None)
        if _is_secret(match, match[name]) if not assigned else _is_told_or_assigned(match, name):
            yield match.span(name)


@lru_cache(maxsize=65_536)  # the turns of a session stand in every prompt after them
def told_when_asked(asked: str, text: str) -> tuple[int, int, str] | None:
    """Where `text` is no more than what the turn before it asked for: start, end and kind of it."""
    asks, told = _ASKS.search(asked[-200:]), _ONE_WORD.fullmatch(text[:200])
    if not asks or not told or len(text) > 200:
        return None
    value, digits = told["value"], sum(map(str.isdigit, told["value"]))
    if asks["phone"] or asks["your_phone"]:
        return (*told.span("value"), "PHONE") if 7 <= digits <= 15 and not re.search("[^\\W\\d]", value) else None
    if asks["pin"] or asks["your_pin"]:
        return (*told.span("value"), "SECRET") if 3 <= digits <= 8 else None
    return (*told.span("value"), "SECRET") if may_be_password(value) and value.casefold() not in _REPLIES else None


def _is_told_or_assigned(match: re.Match[str], name: str) -> bool:
    value, before = match[name], match.string[: match.start(name)]
    if match["pin"] and _OTHER_PIN.search(match.string[: match.start()][-12:]):
        return False
    if match["pin"] or match["to"]:
        return _is_secret(match, value)
    if _ASSIGNED.search(before[-12:]):
        return may_be_password(value)
    how = value.rstrip(".,;:!?").casefold()
    return _is_secret(match, value) and not _SAYS_HOW_LONGER.fullmatch(how) and how not in _NO_SECRET_EITHER


def may_be_password(value: str) -> bool:
    """Whether it can be a password that stands where one is wanted."""
    letters, digits = (sum(map(kind, value)) for kind in (str.isalpha, str.isdigit))
    word = _CONTRACTED.sub("", value.strip(".,;:!?()[]*_-").casefold())
    if word in _NO_SECRET or _CODE.fullmatch(value) or _SAYS_STATE.fullmatch(word):
        return False
    return letters > 0 or digits >= 3


def _is_secret(match: re.Match[str], value: str) -> bool:
    digits, letters = (sum(map(kind, value)) for kind in (str.isdigit, str.isalpha))
    if match["pin"]:
        return digits >= 3
    if match["to"]:
        return digits > 0 and len(value) > 3
    word = _CONTRACTED.sub("", value.strip(".,;:!?()[]*_-").casefold())
    if word in _NO_SECRET or _SAYS_HOW.fullmatch(value.rstrip(".,;:!?")) or _CODE.fullmatch(value):
        return False
    return letters > 0 or digits >= 3
