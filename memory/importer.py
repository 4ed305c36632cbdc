"""Files of conversations into the store, a few hundred in one transaction.

The invariant: a conversation goes in whole or is reported with its file and line, and bringing the same file in again
changes nothing.
"""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from .conversations import Conversation
from .formats import conversation_of
from .store import MemoryStore
from .types import DEFAULT_USER

CONVERSATIONS_A_BATCH = 500
PIECE = 1 << 20  # bytes of an array that are read at a time, at least
LONGEST_TOKEN = 16  # characters of what an element may be cut in, but for text: an escape, a number, a constant
LATER = 1e-6  # seconds from one conversation without a time to the next, so that the last of them has the last word
CUT = "; the line ends in the middle, and a conversation is one line, or an element of an array"


@dataclass(frozen=True)
class LineError:
    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class ImportReport:
    conversations: int
    interactions_new: int
    interactions_known: int
    feedback_new: int
    errors: tuple[LineError, ...]
    forgotten: int = 0  # turns left out, since they were forgotten before


@dataclass(frozen=True)
class _Record:
    """One JSON value of a file and where it begins, or why there is none."""

    file: str
    line: int
    value: object = None
    error: str | None = None
    number: int = 0  # in its array, which may be one line; 0 in no array


def import_files(
    store: MemoryStore,
    paths: Path | str | Iterable[Path | str],
    *,
    now: float,
    user_id: str = DEFAULT_USER,
    agent_id: str = "",
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Bring in every file, or the one. `now` is the time of what has none, `user_id` and `agent_id` whose it is where
    it names nobody; `progress` is told how many conversations are in."""
    files = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    if missing := [str(path) for path in files if not path.exists() or path.is_dir()]:
        raise InputError(f"no such file: {', '.join(missing)}; nothing was brought in")
    report = ImportReport(0, 0, 0, 0, ())
    records = enumerate(record for path in files for record in _records(path))
    while batch := list(islice(records, CONVERSATIONS_A_BATCH)):
        report = _with_batch(report, store, batch, (now, user_id, agent_id))
        if progress is not None:
            progress(report.conversations)
    return report


def _with_batch(
    report: ImportReport, store: MemoryStore, numbered: Sequence[tuple[int, _Record]], given: tuple[float, str, str]
) -> ImportReport:
    batch = [record for _, record in numbered]
    conversations: dict[int, Conversation] = {}
    errors: dict[int, InputError] = {}
    now, user_id, agent_id = given
    for i, (number, record) in enumerate(numbered):
        try:
            conversation = _read(record, (now + LATER * number, user_id, agent_id))
        except InputError as error:
            errors[i] = error
            continue
        if conversation is not None:
            conversations[i] = conversation
    recorded = store.record_many(list(conversations.values()))
    places = list(conversations)
    errors |= {places[j]: error for j, error in recorded.errors.items()}
    reported = [_told(batch[i], error) for i, error in sorted(errors.items())]
    return ImportReport(
        report.conversations + len(conversations) - len(recorded.errors),
        report.interactions_new + recorded.new,
        report.interactions_known + recorded.known,
        report.feedback_new + recorded.feedback_new,
        (*report.errors, *reported),
        report.forgotten + recorded.forgotten,
    )


def _told(record: _Record, error: InputError) -> LineError:
    return LineError(
        record.file, record.line, f"conversation {record.number}: {error}" if record.number else str(error)
    )


def _read(record: _Record, given: tuple[float, str, str]) -> Conversation | None:
    if record.error is not None:
        raise InputError(record.error)
    return conversation_of(record.value, *given)


def _records(path: Path) -> Iterator[_Record]:
    """The values of a file: of its one array, or one a line."""
    try:
        with path.open("rb") as file:  # once, for a pipe is read but once
            start = file.peek().removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            yield from _array(str(path), file) if start == b"[" else _lines(str(path), file)
    except OSError as error:  # what was read before it is brought in
        yield _Record(str(path), 0, error=f"it cannot be read: {error.strerror or error}; what follows in it is not in")


def _lines(name: str, file: BinaryIO) -> Iterator[_Record]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield _parsed(name, number, line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n"))


def _parsed(file: str, number: int, line: bytes) -> _Record:
    try:
        return _Record(file, number, json.loads(line.decode(), parse_constant=_refused))
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and error.doc and not error.doc[error.pos :].strip()
        return _Record(file, number, error=_why(error) + (CUT if cut else ""))


def _array(name: str, file: BinaryIO) -> Iterator[_Record]:
    """The elements one after the other, so that those before a broken one go in and no file is held whole."""
    text = _Sliding(file)
    number = 0
    try:
        for record in _elements(name, text):
            number = record.number
            yield record
    except InputError as error:
        after = 0 if str(error).startswith("not UTF-8") else number + 1  # a byte is read ahead of its conversation
        yield _Record(name, text.line, error=f"{error}; what follows it was not read", number=after)


def _elements(file: str, text: _Sliding) -> Iterator[_Record]:
    text.skip(" \t\r\n")
    text.advance(len("["))
    numbers = count(1)
    while True:
        text.skip(" \t\r\n,")
        line = text.line
        if text.next() == "]":
            text.advance(len("]"))
            text.skip(" \t\r\n")
            if text.next():
                yield _Record(
                    file, text.line, error="not JSON: something follows the end of the array; it was not read"
                )
            return
        yield _Record(file, line, text.value(), number=next(numbers))


class _Sliding:
    """The text of a file, of which only what is being looked at is held."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._read = file, 0
        self._utf8 = getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(parse_constant=_refused)
        self._text, self._at = "", 0
        self.line = 1  # in which `next` stands

    def next(self) -> str:
        """The character that comes next; empty at the end of the file."""
        while self._at == len(self._text) and self._more():
            pass
        return self._text[self._at : self._at + 1]

    def skip(self, characters: str) -> None:
        while (found := self.next()) and found in characters:
            self.advance(1)

    def advance(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def value(self) -> object:
        """The JSON value that begins here; InputError says why there is none."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on
                    self.advance(end - self._at)
                    return value
            except json.JSONDecodeError as error:
                if not error.doc:
                    raise InputError(_why(error)) from None
                cut = error.msg.startswith("Unterminated") or len(self._text) - error.pos <= LONGEST_TOKEN
                if not (cut and self._more()):
                    where = f" {error.pos - self._at} characters after the beginning of the element"
                    raise InputError(f"not JSON: {error.msg}{where}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(_why(error)) from None

    def _more(self) -> bool:
        """Read on, about as much as is held; False at the end of the file."""
        waiting = len(self._utf8.getstate()[0])
        data = self._file.read(max(PIECE, len(self._text) - self._at))
        try:
            more = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8: byte {self._read - waiting + error.start}") from None
        if not data:
            return False
        self._read += len(data)
        self._text, self._at = self._text[self._at :] + more, 0
        return True


def _refused(constant: str) -> None:
    """NaN and the infinities are no JSON, though Python reads them."""
    raise json.JSONDecodeError(f"{constant} is no value", "", 0)


def _why(error: Exception) -> str:
    """Why this is no JSON, without showing it."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}" + (f" at column {error.colno}" if error.doc else "")
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.start}"
    return "nested too deeply" if isinstance(error, RecursionError) else "not JSON: a number that cannot be read"
