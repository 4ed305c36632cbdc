"""Which characters of a text are personal data or a secret: patterns propose, and check digits decide.

Luhn, IBAN's mod 97, the address parser of the standard library; no library, whose next version would find otherwise.
What a version of the curation found it finds for good: later ones add to it, or take ordinary numbers back out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address
from itertools import chain

from .passwords import may_be_password, passwords

Span = tuple[int, int, str]  # start, end, kind
Check = Callable[[re.Match[str]], bool]

# Versions of the curation. From `PLAIN` on a password is masked whatever it is made of; from `SHORTENED` on a card
# number or IBAN whatever stands behind it, and a key without digits where it is given as one; from `TYPESET` on numbers
# that are set with the spaces and hyphens of `_SET`, a phone number right after a colon, the password of a connection.
# From `ECHOED` on a value that something beside it tells is masked in the whole row, finds that overlap are joined,
# what `_MORE` finds is masked and what is `_is_ordinary` is not.
PLAIN, SHORTENED, TYPESET, ECHOED = 3, 4, 5, 6
LATEST = ECHOED

# Spaces and hyphens that no keyboard has; dashes and minus only between digits, since elsewhere they are punctuation.
_SET = re.compile(r"[\u00a0\u2007\u2009\u202f]|[\u2010\u2011]|(?<=\d)[\u2012\u2013\u2212](?=\d)")
# The same, and all spaces; characters that are not seen; what calls of tools write for a quotation mark and a new line.
_SPACES = re.compile(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_UNSEEN = re.compile(r"[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_QUOTE, _BREAK = re.compile(r'\\"(?=([^\s,:}\]\\])?)'), re.compile(r"\\[nrt]")
_EMPHASIS = re.compile(r"(?<!\w)_{1,3}(?=[^\W_])|(?<=[^\W_])_{1,3}(?!\w)")

_DIGITS, _GAP = re.compile(r"\d"), re.compile("[ -]")
_YEARS = re.compile(r"(?:(?:19|20)\d\d[ -]){3}")
# A card number as it is laid out, whatever stands beside it: a check digit alone fits one list of numbers in ten.
_LAID_OUT = re.compile(
    r"(?<![\w.-])(?:[2-6]\d{3}([ -])\d{4}(?:\1\d{4}){2}|3\d{3}[ -]\d{6}[ -]\d{4,5}|[2-6]\d{12,18})(?!\w|\.\d|-\d{3})"
)
_PHONE_NEAR = re.compile(
    r"(?i)\b(phones?|tel|telephone|mobile|cell|fax|call(ing|ed)?|text|ring|reach|whatsapp|sms|number|messages?|answering)\b"
)
_PHONE_AFTER = re.compile(r"(?i)[\s,\\\-(]{0,4}(office|fax|mobile|cell|home|work|phone|tel)\b")
_CARD_NEAR = re.compile(r"(?i)\b(credit|debit|cards?|cc|visa|mastercard|amex|maestro)\b")
_DATE = re.compile(r"(19|20)\d\d[-. ]\d{1,2}[-. ]\d{1,2}|\d{1,2}[-. ]\d{1,2}[-. ](19|20)\d\d")
_NEAR = 60  # characters before a number in which a word says what it is


def _anything(_: re.Match[str]) -> bool:
    return True


def _is_ip(match: re.Match[str]) -> bool:
    try:
        ip_address(match.group())
    except ValueError:
        return False
    return True


def _is_card(match: re.Match[str]) -> bool:
    digits = "".join(_DIGITS.findall(match.group()))
    said = bool(_CARD_NEAR.search(_before(match)))
    return 12 <= len(digits) <= 19 and _luhn(digits) and (said or len(digits) > 13)


def _is_card_and_no_years(match: re.Match[str]) -> bool:
    return _is_card(match) and not _YEARS.match(match.group())


def _is_one_card(match: re.Match[str]) -> bool:
    """Of one that is laid out: no piece of a longer list of such groups, unless a word says what it is."""
    before, after = match.string[max(0, match.start() - 5) : match.start()], match.string[match.end() : match.end() + 5]
    more = re.fullmatch(r"\d{4}[ -]", before) or re.fullmatch(r"[ -]\d{4}", after)
    alone = not more or bool(_CARD_NEAR.search(_before(match))) or match.group().isdigit()
    return alone and _is_card_and_no_years(match)


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812: every second digit from the right doubled, its own digits summed, all of it divisible by ten."""
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(doubled)) % 10 == 0


def _is_iban(match: re.Match[str]) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, the whole 1 modulo 97."""
    code = re.sub("[ -]", "", match.group())
    try:
        digits = "".join(str(int(c, 36)) for c in code[4:] + code[:4])
    except ValueError:  # of ı, İ, ſ and the sign of kelvins, which are letters from a to z where case is ignored
        return False
    return int(digits) % 97 == 1


def _is_phone(match: re.Match[str]) -> bool:
    """Seven to fifteen digits that are written like a phone number, or stand after a word that says so."""
    text = match.group()
    digits = len(_DIGITS.findall(text))
    if not 7 <= digits <= 15 or _DATE.match(text):
        return False
    if _PHONE_NEAR.search(_before(match)) or _PHONE_AFTER.match(match.string, match.end()):
        return True
    groups = [g for g in re.split(r"\D+", text) if g]
    if text[0] in "+(" or text.startswith("00"):
        return digits >= 8
    if not 9 <= digits <= 12 or max(map(len, groups)) == digits:
        return False
    return text[0] == "0" or "-" in text or "." in text


def _before(match: re.Match[str]) -> str:
    return match.string[max(0, match.start() - _NEAR) : match.start()]


_TOKENS = "|".join(
    (
        r"[spr]k[-_](?=[\w-]{0,200}\d)[\w-]{16,}",
        r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}",
        r"(?:AKIA|ASIA)[A-Z0-9]{16}",
        r"AIza[\w-]{30,}|ya29\.[\w-]{20,}",
        r"xox[abeoprs]-[\w-]{10,}|hf_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{20,}|pypi-[\w-]{20,}|dop_v1_[0-9a-f]{32,}",
        r"eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?",
        r"SG\.[\w-]{16,}\.[\w-]{16,}|AC[0-9a-f]{32}",
    )
)
_NAMED = (
    r"api[ _-]?key|access[ _-]?key|secret(?:[ _-]?(?:access)?[ _-]?key)?|client[ _-]?secret"
    r"|(?:auth|access)[ _-]?token|bearer|passw(?:or)?d|pwd|passphrase"
)
_PRIVATE_KEY = r"-----{} [A-Z ]{{0,30}}PRIVATE KEY(?: BLOCK)?-----"
_REST = r"[^\s<>\"']*[^\s<>\"'.,;:!?)\]]"

# Of keys without a digit, which look like words: only where nothing else can be meant.
_KEYS = re.compile(
    r"(?i:authorization[\"']?\s?[:=]\s?[\"']?(?:bearer|basic|token)\s)(?P<value>[\w~+/.=-]{18,}+|(?=\S{0,99}[A-Z])[\w+/=]{12,}+)"
    r"|(?i:(?<![a-z])(?:api|access|auth|client|secret)[ _-]?(?:key|secret|token)[\"']?\s?[:=]\s?)"
    r"(?P<quote>[\"'])(?P<quoted>[\w~+/.=-]{8,}+)(?P=quote)"
    r"|(?<![A-Z])(?:API|ACCESS|AUTH|CLIENT|SECRET)_(?:KEY|SECRET|TOKEN)=(?P<bare>[\w~+/-]{8,}+={0,2})(?=[\s;&,)`\"']|\.(?!\w)|$)"
)
_PLACEHOLDER = re.compile(
    r"(?i)(?:^|[_.-])(?:key|token|secret|your|example|placeholder|changeme|x{3,}|undefined)(?:[_.-]|$)"
)

_CONNECTION = re.compile(
    r"(?<![\w+.-])[\w+.-]{1,20}://[^\s:/@]{0,64}:(?P<value>(?!\$?\{|<|\d{1,5}[/,?])[^\s@]{1,200})@"
)
_PHONE = r"(?:\+ ?|\()?\d(?:[ .()/-]{0,3}\d){6,14}(?:\s?(?:x|ext\.?)\s?\d{1,5})?(?![\w]|[.:/-]\d)"
_CALLED = re.compile(rf"(?<![\w./-])(?:(?<!:)|(?<=[^\W\d_]:)|(?<=[.)\]\"']:)){_PHONE}")
# What stood in place of a pattern before `TYPESET`.
_OLDER = {_CONNECTION: re.compile(r"(?!)"), _CALLED: re.compile(rf"(?<![\w.:/-]){_PHONE}")}

# In the order in which they claim their characters.
_PATTERNS: tuple[tuple[str, re.Pattern[str], Check], ...] = (
    (
        "SECRET",
        re.compile(rf"{_PRIVATE_KEY.format('BEGIN')}.*?(?:{_PRIVATE_KEY.format('END')}|\Z)", re.DOTALL),
        _anything,
    ),
    ("SECRET", re.compile(rf"(?<![\w-])(?:{_TOKENS})"), _anything),
    (
        "SECRET",
        re.compile(
            rf"(?i)(?<![a-z])(?:{_NAMED})\b(?:\s{{1,9}}is)?[\"']?\s{{0,9}}[:=]?\s{{0,9}}[\"']?"  # else quadratic
            r"(?P<value>(?=\S{0,200}\d)[^\s\"',;<>]{6,})"
        ),
        _anything,
    ),
    (
        "URL",
        re.compile(rf"(?i)\b(?:https?|ftp)://{_REST}|\bwww\.[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,8}}(?:/{_REST})?"),
        _anything,
    ),
    ("SECRET", _CONNECTION, _anything),
    ("EMAIL", re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}"), _anything),
    ("IBAN", re.compile(r"(?i)\b[a-z]{2}\d{2}(?: ?[a-z0-9]{4}){2,7}(?: ?[a-z0-9]{1,3})?\b"), _is_iban),
    ("IP", re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)"), _is_ip),
    ("IP", re.compile(r"(?i)(?<![\w:.])(?=[0-9a-f:]{0,39}:[0-9a-f]*:)[0-9a-f:]{3,39}(?![\w:])"), _is_ip),
    ("SSN", re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"), _anything),
    ("CARD", re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w]|[.-]\d)"), _is_card),
    ("PHONE", _CALLED, _is_phone),
)

# Found as well from `ECHOED` on, by what stands before it.
_INNER = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"  # where a word begins in snake_case, camelCase and between spaces
_NO_WORD = r"(?:(?![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
_PHONE_NAMED = re.compile(
    rf"{_INNER}(?i:phones?|tel|telephone|mobile|cell|fax|whatsapp|telefon|handy|tel[eé]fono|t[eé]l[eé]phone|m[oó]vil"
    rf"|cellulare){_NO_WORD}"
)


def _is_called(match: re.Match[str]) -> bool:
    told = 7 <= len(_DIGITS.findall(match.group())) <= 15 and not _DATE.match(match.group())
    return told and bool(_PHONE_NAMED.search(_before(match)))


def _tells_one(match: re.Match[str]) -> bool:
    return may_be_password(match["value"])


_MORE: tuple[tuple[str, re.Pattern[str], Check], ...] = (
    ("IBAN", re.compile(r"(?P<value>(?i:\b[a-z]{2}\d{2}(?:-[a-z0-9]{4}){2,7}(?:-[a-z0-9]{1,3})?)\b)"), _is_iban),
    (
        "SSN",
        re.compile(
            r"(?i)(?<![a-z])(?:ssn|social[ _]security(?:[ _](?:number|no\.?))?)[\"']?\s{0,3}(?:is|[:=#])?\s{0,3}[\"']?"
            r"(?P<value>\d{3}[ -]?\d{2}[ -]?\d{4})(?![\w-])"
        ),
        _anything,
    ),
    ("PHONE", re.compile(rf"(?P<value>{_CALLED.pattern})"), _is_called),
    (
        "EMAIL",  # whatever stands right behind it
        re.compile(r"(?<![\w.+%-])(?P<value>[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,7}\.[^\W\d_][\w-]{1,62})"),
        _anything,
    ),
    ("SECRET", re.compile(r"(?<![\w-])(?P<value>whsec_\w{16,}|xapp-[\w-]{10,})"), _anything),
    (
        "SECRET",
        re.compile(
            rf"{_INNER}(?i:(?:(?:refresh|session|id|api|access)[ _-]?)?token|account[ _-]?key)[\"']?\s?[:=]\s?[\"']?"
            r"(?P<value>(?=\S{0,200}\d)[\w~+/-]{12,}={0,2})"
        ),
        _anything,
    ),
    (
        "SECRET",  # dbPassword: …, PGPASSWORD=…, DB_PASS=…
        re.compile(
            r"(?:[a-z]P|(?<=[A-Z])P|_P|_p)(?:assword|ASSWORD|ASSWD|asswd|ASS|ass)[\"']?\s?[:=]\s?[\"']?"
            r"(?P<value>[^\s\"'`<>,;]{3,}(?<![.)\]]))"
        ),
        _tells_one,
    ),
    (
        "SECRET",
        re.compile(r"(?i)<(?P<tag>passw(?:or)?d|pin)>\s{0,3}(?P<value>[^<\s]{3,64})\s{0,3}</(?P=tag)>"),
        _tells_one,
    ),
    (
        "SECRET",
        re.compile(r"(?i)\|\s{0,9}(?:password|pin)\s{0,9}\|\s{0,9}(?P<value>[^|\s]{3,64})\s{0,9}\|"),
        _tells_one,
    ),
)

# What is written like a phone number and is none: amounts, versions and papers, years, scores, dates, times.
_NO_PHONE = re.compile(
    r"10\.\d{4,9}/\d+|\d{1,3}(?:\.\d{3})*(?:\.000)+|(?:(?:19|20)\d\d[-/ .]+)+(?:19|20)\d\d"
    r"|\d{1,2}-\d{1,2}(?: \d{1,2}-\d{1,2})+|\d{1,2}\.\d{1,2}\.?(?:\d{2,4})?[ -]{1,3}\d{1,2}\.\d{1,2}\.?(?:\d{2,4})?"
    r"|\d{1,2}\.\d{2}(?: \d{1,2}\.\d{2})+"
)
_DECIMAL = re.compile(r"(?:0|[1-9]\d*)\.\d+")
_COUNTED = re.compile(
    r"(?i)\b(?:order|invoice|ticket|tracking|serial|part|model|version|isbn|article|arxiv|doi)"
    r"(?:\s(?:number|no\.?|nr\.?|id))?(?:\sis)?[\s:#]{0,3}$"
)


def _is_ordinary(kind: str, match: re.Match[str]) -> bool:
    """Whether people write the like of it every day for something else."""
    text = match.group()
    if kind == "PHONE":
        number = _DECIMAL.fullmatch(text) and not _PHONE_NEAR.search(_before(match))
        return bool(number or _NO_PHONE.fullmatch(text) or (text[0] not in "+(" and _COUNTED.search(_before(match))))
    if kind == "EMAIL":
        return not re.search(r"\.[^\W\d_][\w-]+$", text)
    if kind == "IP" and ":" not in text:  # version 1.2.3.4
        return bool(_COUNTED.search(_before(match)))
    if kind == "IP":  # x[::2], C::d
        groups = [group for group in text.split(":") if group]
        mixed = re.search(r"\d", text) and re.search(r"[a-fA-F]", text) and sum(map(len, groups)) > 4
        return len(groups) < (2 if mixed else 3)
    return False


KINDS = tuple(sorted({kind for kind, *_ in _PATTERNS}))


def typed(text: str, version: int = LATEST) -> str:
    """The same text, a character for a character, with the spaces and hyphens of a keyboard."""
    return _SET.sub(lambda found: " " if found[0].isspace() else "-", text) if version >= TYPESET else text


def visible(text: str) -> tuple[str, Sequence[int]]:
    """The text as it is searched, and the place of each of its characters: without those that are not seen."""
    if not _UNSEEN.search(text):
        return _plainly(text), range(len(text))
    places = [i for i, character in enumerate(text) if not _UNSEEN.match(character)]
    return _plainly("".join(text[i] for i in places)), places


def _plainly(text: str) -> str:
    """A character for a character: as typed, and without the escapes of JSON within JSON."""
    text = typed(_SPACES.sub(" ", text))
    if '\\"' not in text:
        return text
    return _BREAK.sub("  ", _QUOTE.sub(lambda found: ' "' if found[1] else '" ', text))


def found_in(seen: str) -> Iterator[Span]:
    """In a `visible` text, as it stands and then without its emphasis, which may hide where a value begins."""
    yield from proposed(seen, ECHOED)
    plain = _EMPHASIS.sub(lambda found: "*" * len(found[0]), seen)
    if plain != seen:
        yield from proposed(plain, ECHOED)


def proposed(text: str, version: int) -> Iterator[Span]:
    for kind, newest, check in _PATTERNS:
        pattern = newest if version >= TYPESET else _OLDER.get(newest, newest)
        if version >= SHORTENED and kind == "IBAN":
            found: Iterable[re.Match[str]] = _shortened(pattern, check, text)
        elif version >= SHORTENED and kind == "CARD":
            whole = filter(_is_card_and_no_years, pattern.finditer(text))
            found = chain(whole, filter(_is_one_card, _LAID_OUT.finditer(text)))
        else:
            found = filter(check, pattern.finditer(text))
        for match in found:
            if version < ECHOED or not _is_ordinary(kind, match):
                yield *match.span("value" if "value" in pattern.groupindex else 0), kind
    if version >= SHORTENED:
        yield from _keys(text)
    if version >= PLAIN:
        yield from ((start, end, "SECRET") for start, end in passwords(text, assigned=version >= ECHOED))
    if version >= ECHOED:
        yield from ((*m.span("value"), kind) for kind, more, check in _MORE for m in more.finditer(text) if check(m))


def _keys(text: str) -> Iterator[Span]:
    for match in _KEYS.finditer(text):
        name = next(name for name in ("value", "quoted", "bare") if match[name] is not None)
        if not _PLACEHOLDER.search(match[name]):
            yield *match.span(name), "SECRET"


def _shortened(pattern: re.Pattern[str], check: Check, text: str) -> Iterator[re.Match[str]]:
    """Matches that pass; what does not is tried without its last groups, and then from its second group on.

    What stands beside a number may look like more of it: `BE68 5390 0754 7034 by Friday`.
    """
    at = 0
    while match := pattern.search(text, at):
        gaps = [match.start() + gap.start() for gap in _GAP.finditer(match.group())]
        tried = (pattern.match(text, match.start(), end) for end in (match.end(), *reversed(gaps)))
        if found := next((m for m in tried if m and check(m)), None):
            yield found
        at = found.end() if found else (*gaps, match.end())[0]
