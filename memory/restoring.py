"""An export back into a store, in batches, each one transaction.

The invariant: a line goes in as it was written or is reported with its number, and nothing goes in after a first line
that is not the head of an export that this version reads. What is held is known again, what was
forgotten here stays out, and what contradicts its own id or the rows that are held is refused; so bringing the same
export in twice, or again after a crash, gives what bringing it in once gives.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert
from sqlalchemy.orm import Session

from ..errors import InputError, StoreError
from .conversations import (
    Owner,
    Review,
    answers,
    checked_id,
    checked_messages,
    checked_owner,
    checked_review,
    checked_text,
    checked_time,
    feedback_id,
    interaction_id,
    leaves_memory,
    note_id,
    owner_of,
    request_of,
)
from .corrections import remember_corrections
from .exporting import FEEDBACK, VERSION
from .forgetting import inherit_again
from .passages import of_turn
from .reading import of_session
from .rows import ROWS_A_PAGE, from_interaction, from_memory, to_interaction, turn_memory
from .stated_rows import add_statements
from .tables import FeedbackRow, InteractionRow, MemoryRow, TopicRow
from .tombstones import Tombstones
from .topic_rows import join, relabel, release
from .types import Interaction, Memory
from .writing import add_sources, rated, remove_replaced

Vector = NDArray[np.float32]
NO_HEAD = 'the first line, and no other, is the head of an export ("type": "nightschool")'
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "nightschool": {"version": int, "salt": str},
    "topic": {"id": str, "label": str, "created_utc": (int, float)},
    "interaction": {
        **dict.fromkeys(("id", "user_id", "agent_id", "session_id", "reply"), str),
        **{"position": int, "turn": list, "adapter_id": (str, type(None)), "topic_id": (str, type(None))},
        **{"memory_ids": list, "created_utc": (int, float)},
    },
    "feedback": {"id": str, "interaction_id": str, "created_utc": (int, float)},
    "note": {
        **dict.fromkeys(("id", "user_id", "agent_id", "session_id", "text"), str),
        **{"source_ids": list, "shared": bool, "created_utc": (int, float)},
    },
    "tombstone": {"key": str},
    "end": {"lines": int},
}


@dataclass
class Restored:
    """What bringing an export in did, by type of line; `errors` by number of line."""

    new: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    forgotten: int = 0  # lines left out, since they were forgotten here
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One line as it was read: its values, or why there are none."""

    kind: str
    values: dict[str, Any]
    error: str = ""


class Restoring:
    """One run over one file; `batch` takes some lines in the caller's transaction."""

    def __init__(self, file: str, dimension: int) -> None:
        self._file = file
        self.report = Restored()
        self.fresh: list[Interaction] = []  # of the last batch, to be indexed
        self.stale: list[str] = []  # memories that its transaction took away, and may be in the index
        self.replaced: list[Interaction] = []  # unanswered turns that it took away
        self._vectors: Mapping[str, Vector] = {}  # of the batch, by text
        self._topics: dict[str, dict[str, Any]] = {}  # of the file; a row is written with the first turn of its own
        self._joined: defaultdict[str, list[str]] = defaultdict(list)  # the requests of the batch by topic
        self._corrected: set[str] = set()  # turns of the batch's feedback
        self._centroid = np.zeros(dimension, dtype=np.float32).tobytes()
        self._left_out: set[str] = set()  # interactions that were forgotten here
        self._robbed: set[str] = set()  # their topics, which may be named after them
        self._foreign = False  # the tombstones of the file have another salt
        self._answered: dict[str, str] = {}  # turns of the file that are answered here, and as what
        self._told: set[str] = set()  # interactions of the file, which names what they were shown as it is in the end
        self._ended = False
        self._lines = 0

    def batch(self, session: Session, lines: Sequence[Line], vectors: Mapping[str, Vector]) -> None:
        """`vectors` by text, of all `new_texts(session, lines)`."""
        tombstones = Tombstones(session)
        wordless: set[Owner] = set()
        self.fresh, self.replaced, self._vectors = [], [], vectors
        self._joined.clear()
        self._corrected.clear()
        for line in lines:
            self._lines += 1
            try:
                self._take(session, tombstones, line, wordless)
            except InputError as error:
                if self._lines == 1:
                    raise InputError(f"{self._file}:1: {error}; nothing was imported") from None
                self.report.errors[self._lines] = str(error)
        join(session, {topic_id: [vectors[text] for text in said] for topic_id, said in self._joined.items()})
        # only now: a topic that nobody else is in has its answered turn, and stays
        release(session, self.replaced, {i.id: vectors[i.text] for i in self.replaced if request_of(i.turn)})
        for owner in sorted(wordless):
            inherit_again(session, owner)
        remember_corrections(session, self._corrected)
        self._told.update(interaction.id for interaction in self.fresh)
        self.stale = add_statements(session, self.fresh, self.replaced, named=self._told)

    def finish(self, session: Session) -> None:
        """Name topics anew of which a turn stayed out, and say so if the file was cut off."""
        relabel(session, sorted(self._robbed))
        if not self._ended:
            self.report.errors[self._lines + 1] = "the last line is missing, so the export is not whole"

    def _take(self, session: Session, tombstones: Tombstones, line: Line, wordless: set[Owner]) -> None:
        kind, values = line.kind, line.values
        if line.error:
            raise InputError(line.error)
        if (self._lines == 1) != (kind == "nightschool"):
            raise InputError(NO_HEAD)
        if kind == "nightschool":
            self._head(tombstones, values)
        elif kind == "topic":
            self._topic(session, values)
        elif kind == "interaction":
            self._interaction(session, tombstones, values, wordless)
        elif kind == "feedback":
            self._feedback(session, values)
        elif kind == "note":
            self._note(session, tombstones, values)
        elif kind == "tombstone":
            self._tombstone(tombstones, values)
        else:
            self._ended = values["lines"] == self._lines

    def _head(self, tombstones: Tombstones, values: dict[str, Any]) -> None:
        self._foreign = not tombstones.adopt(_checked_salt(values))

    def _topic(self, session: Session, values: dict[str, Any]) -> None:
        named = checked_id("topic", values["id"])
        label, created = checked_text("label", values["label"]), checked_time("created_utc", values["created_utc"])
        if session.get(TopicRow, named) is not None:  # else it is new with the first turn of it
            self.report.known["topic"] += 1
        row = {"id": named, "label": label[:80], "centroid": self._centroid, "size": 0, "created_utc": created}
        self._topics[named] = row

    def _interaction(
        self, session: Session, tombstones: Tombstones, values: dict[str, Any], wordless: set[Owner]
    ) -> None:
        made = _interaction(values)
        if session.get(InteractionRow, made.id) is None and tombstones.forgotten([made]):
            self._left_out.add(made.id)
            self._robbed.add(made.topic_id or "")
            self.report.forgotten += 1
            return
        held = _in_its_place(session, made)
        if held is not None and held.text and held.text not in self._vectors:
            raise InputError(f"interaction {made.id}: its session was written meanwhile; bring the export in once more")
        if held is not None and answers(made, held):
            self.report.known["interaction"] += 1  # an older copy, from before the answer
            self._answered[made.id] = held.id
            return
        if held is not None and (not answers(held, made) or rated(session, [held.id])):
            raise InputError(f"interaction {made.id}: its session has something else at position {made.position}")
        request = request_of(made.turn)
        topic_id = made.topic_id or ""
        if request and topic_id not in self._topics and session.get(TopicRow, topic_id) is None:
            raise InputError(f"interaction {made.id}: its topic {made.topic_id} is not in the store")
        if not self._is_new(session, InteractionRow, "interaction", made.id):
            return
        if request and session.get(TopicRow, topic_id) is None:
            session.execute(insert(TopicRow), [self._topics[topic_id]])
            self.report.new["topic"] += 1
        if held is not None:
            self._replace(session, held, made)
        session.execute(insert(InteractionRow), [from_interaction(made)])
        if leaves_memory(made):
            session.execute(insert(MemoryRow), [from_memory(turn_memory(made))])
            self.fresh.append(made)
        if request:
            self._joined[topic_id].append(made.text)
        else:
            wordless.add(owner_of(made))

    def _replace(self, session: Session, held: Interaction, made: Interaction) -> None:
        """The held turn had no answer yet. It leaves its topic with the end of the batch."""
        remove_replaced(session, [held], {held.id: made.id}, {})
        self.replaced.append(held)

    def _feedback(self, session: Session, values: dict[str, Any]) -> None:
        said = (values.get(name) for name in ("rating", "correction", "comment", "event"))
        review = checked_review(Review(*said))
        about = checked_id("interaction_id", values["interaction_id"])
        _same_id("feedback", values["id"], feedback_id(about, review))
        row = {name: values.get(name) for name in FEEDBACK}
        row["created_utc"] = checked_time("created_utc", values["created_utc"])
        if about in self._left_out:
            self.report.forgotten += 1
        elif session.get(InteractionRow, about) is None:
            raise InputError(f"feedback {values['id']}: its interaction {about} is not in the store")
        elif self._is_new(session, FeedbackRow, "feedback", values["id"]):
            session.execute(insert(FeedbackRow), [row])
            self._corrected.add(about)
        else:  # said once more since, which moves its time
            known = session.get_one(FeedbackRow, values["id"])
            said_utc = checked_time("created_utc", values["created_utc"])
            if said_utc > known.created_utc:
                known.created_utc = said_utc
                self._corrected.add(about)

    def _note(self, session: Session, tombstones: Tombstones, values: dict[str, Any]) -> None:
        note = _note(values)
        note = replace(note, source_ids=tuple(self._answered.get(i, i) for i in note.source_ids))
        known = session.get(MemoryRow, note.id) is not None
        if not known and (tombstones.forgotten_notes([note.id]) or not self._left_out.isdisjoint(note.source_ids)):
            self.report.forgotten += 1
            return
        sources = {i: session.get(InteractionRow, i) for i in note.source_ids}
        if wrong := [i for i, row in sources.items() if row is None or row.user_id != note.user_id]:
            raise InputError(f"note {note.id}: its source {wrong[0]} is not in the store, or another user's turn")
        if self._is_new(session, MemoryRow, "note", note.id):
            session.execute(insert(MemoryRow), [from_memory(note)])
        else:
            add_sources(session, note)

    def _tombstone(self, tombstones: Tombstones, values: dict[str, Any]) -> None:
        if self._foreign:
            raise InputError("this store has tombstones of its own, and those of another store mean nothing to it")
        tombstones.add_keys({checked_id("key", values["key"])})
        self.report.new["tombstone"] += 1

    def _is_new(self, session: Session, kind: type[Any], name: str, row_id: str) -> bool:
        is_new = session.get(kind, row_id) is None
        (self.report.new if is_new else self.report.known)[name] += 1
        return is_new


def check_head(path: Path) -> None:
    """InputError if the first line of a file is no head of an export; of a pipe nothing is taken."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        first = _line(file.readline())
    try:
        if first.kind != "nightschool":
            raise InputError(first.error or NO_HEAD)
        _checked_salt(first.values)
    except InputError as error:
        raise InputError(f"{path.name}:1: {error}; nothing was imported") from None


def _checked_salt(head: dict[str, Any]) -> str:
    """Of the head of an export that can be read here."""
    if head["version"] != VERSION:
        raise InputError(f"version is {head['version']}; this nightschool reads exports of version {VERSION}")
    if not re.fullmatch(r"([0-9a-f]{2}){16,64}", head["salt"]):
        raise InputError("salt is not 16 to 64 bytes in hexadecimal")
    return str(head["salt"])


def batches(path: Path) -> Iterator[list[Line]]:
    if not path.exists() or path.is_dir():
        raise InputError(f"no such file: {path}; nothing was imported")
    try:
        with path.open("rb") as file:
            while lines := list(islice(file, ROWS_A_PAGE)):
                yield [_line(line) for line in lines]
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; what follows is not in") from error


def new_texts(session: Session, lines: Sequence[Line]) -> list[str]:
    """What has to be embedded of the turns among them that are not held."""
    found: list[str] = []
    for values in (line.values for line in lines if line.kind == "interaction"):
        with suppress(InputError):  # told when the line's turn comes
            made = _interaction(values)
            if session.get(InteractionRow, made.id) is None:
                found += of_turn(made).texts if leaves_memory(made) else ()
                held = _in_its_place(session, made)
                found += [held.text] if held and held.text else ()
    return found


def _in_its_place(session: Session, made: Interaction) -> Interaction | None:
    """What its session has at its position, other than itself."""
    row = session.scalars(of_session(owner_of(made)).where(InteractionRow.position == made.position)).first()
    return to_interaction(row) if row and row.id != made.id else None


def _line(line: bytes) -> Line:
    try:
        return Line(*_parsed(line))
    except InputError as error:
        return Line("", {}, str(error))


def _parsed(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("not JSON") from None
    kind = values.get("type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InputError(f"type is not one of {', '.join(FIELDS)}")
    for name, wanted in FIELDS[kind].items():
        given = values.get(name)
        if not isinstance(given, wanted) or (isinstance(given, bool) and wanted is not bool):
            raise InputError(f"{kind}: {name} is missing or of another type than an export has")
    return kind, values


def _interaction(values: dict[str, Any]) -> Interaction:
    owner = checked_owner(values["user_id"], values["agent_id"], values["session_id"])
    if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in values["turn"]):
        raise InputError("turn: a message is not an object with role and content")
    turn, reply = checked_messages(values["turn"]), checked_text("reply", values["reply"])
    _same_id("interaction", values["id"], interaction_id(owner, values["position"], turn, reply))
    if not 0 <= values["position"] < 1 << 31:
        raise InputError(f"position is {values['position']}, not a number that a session can have")
    ids = tuple(checked_text("memory_ids", i) for i in values["memory_ids"])
    time = checked_time("created_utc", values["created_utc"])
    adapter_id, topic_id = (
        None if (value := values[name]) is None else checked_id(name, value) for name in ("adapter_id", "topic_id")
    )
    given = adapter_id, ids, topic_id if request_of(turn) else None
    return Interaction(values["id"], *owner, values["position"], turn, request_of(turn), reply, time, *given)


def _note(values: dict[str, Any]) -> Memory:
    owner = checked_owner(values["user_id"], values["agent_id"], values["session_id"])
    text, shared = checked_text("text", values["text"]), values["shared"]
    _same_id("note", values["id"], note_id(owner.user_id, owner.agent_id, shared, text))
    sources = tuple(checked_text("source_ids", i) for i in values["source_ids"])
    began, ended = checked_time("created_utc", values["created_utc"]), values.get("valid_to")  # missing in older files
    ended = None if ended is None else checked_time("valid_to", ended)
    return Memory(values["id"], *owner, "note", text, began, sources, shared, valid_to=ended)


def _same_id(kind: str, given: str, derived: str) -> None:
    if given != derived:
        raise InputError(f"{kind} {given}: its content has the id {derived}")
