"""What of a memory a search looks at: the whole of it, and windows of a few sentences with their words. Pure.

A short question is nearer to the sentence that answers it than to the page around it. The invariant: windows hold
whole sentences and together all of the text, at most about eight a part, so that a long text costs about twice a
short one's embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .conversations import request_of, user_words
from .types import Interaction, Memory
from .words import terms, time_terms

Vector = NDArray[np.float32]

WINDOW_WORDS = 16
MOST_WINDOWS = 8
ASSISTANTS = frozenset({"assistant", "bot", "ai", "system"})

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+")
_SPEAKER = re.compile(r"\s*[<\[]?([^\W\d_][\w.'’-]*(?: [^\W\d_][\w.'’-]*){0,2})[>\]]?: +(?=\S)")


@dataclass(frozen=True)
class IndexRow:
    """One memory as the index holds it: enough to rank it without asking SQL."""

    id: str
    user_id: str
    agent_id: str
    session_id: str
    kind: str
    shared: bool
    created_utc: float
    position: int  # in its session; of a note that of the turn before it
    lines: tuple[str, ...]  # the terms of each window, joined by spaces
    own: int  # so many windows are the user's words, those after them the reply's
    vectors: NDArray[np.floating]  # (1 + windows, dimension): the whole first; one row if the whole is the window

    @property
    def session(self) -> tuple[str, str, str]:
        return self.user_id, self.agent_id, self.session_id


@dataclass(frozen=True)
class Passages:
    whole: str
    own: tuple[str, ...]
    reply: tuple[str, ...] = ()

    @property
    def windows(self) -> tuple[str, ...]:
        return self.own + self.reply

    @property
    def texts(self) -> tuple[str, ...]:
        """What has to be embedded: the whole, and the windows unless there is one and it is the whole."""
        return (self.whole,) if self.windows == (self.whole,) else (self.whole, *self.windows)


def of_turn(interaction: Interaction) -> Passages:
    """The request as the whole, or the reply to tools; all that the user said and the reply in windows."""
    said = windows(user_words(interaction.turn))
    # what a turn of tools inherits as its text is another turn's, and may be forgotten
    whole = request_of(interaction.turn) or interaction.reply
    return Passages(whole, tuple(said), tuple(windows(interaction.reply)))


def of_note(memory: Memory) -> Passages:
    cut = tuple(windows(memory.text))
    heard = speaker(memory.text).casefold() in ASSISTANTS
    return Passages(memory.text, () if heard else cut, cut if heard else ())


def index_row(memory: Memory, position: int, passages: Passages, vectors: Mapping[str, Vector]) -> IndexRow:
    """`vectors` by text, with all of `passages.texts`."""
    day = time_terms(memory.created_utc)
    lines = tuple(" ".join(dict.fromkeys([*terms(window), *day])) for window in passages.windows)
    owner = memory.user_id, memory.agent_id, memory.session_id
    held = np.stack([vectors[text] for text in passages.texts])
    return IndexRow(
        memory.id,
        *owner,
        memory.kind,
        memory.shared,
        memory.created_utc,
        position,
        lines,
        len(passages.own),
        held,
    )


def windows(text: str) -> list[str]:
    """Whole sentences joined up to max(16, words / 8) words, each under the name of who speaks, if one is given.

    A line of another speaker begins a window, unless the one before it would be left too short.
    """
    count = len(text.split())
    most, least = max(WINDOW_WORDS, count / MOST_WINDOWS), count / (2 * MOST_WINDOWS)
    packed: list[list[str]] = []
    length, name = 0, ""
    for who, sentence in _sentences(text):
        words = len(sentence.split())
        turned, name = who not in ("", name), who or name
        if not packed or length + words > most or (turned and length >= least):
            packed.append([])
            length = 0
        packed[-1].append(f"{name}: {sentence}" if name and (turned or not length) else sentence)
        length += words
    return [text] if len(packed) == 1 else [" ".join(part) for part in packed]


def speaker(text: str) -> str:
    """`Ann` of "Ann: hello" or "<Ann>: hello", else empty."""
    found = _SPEAKER.match(text)
    return found[1] if found else ""


def _sentences(text: str) -> Iterator[tuple[str, str]]:
    """Each with the speaker that its line names."""
    for line in text.splitlines():
        found = _SPEAKER.match(line)
        name, said = (found[1], line[found.end() :]) if found else ("", line)
        yield from ((name, sentence) for sentence in _SENTENCE_END.split(said) if sentence.strip())
