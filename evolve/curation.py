"""Which answers may teach, and in which words: what is quarantined, what is no answer, and what is masked.

The invariant: nothing is left out in silence, every rule names the interactions it took. Held-out answers go through
the same rules, so that what is judged is like what was taught.

Not covered: whether an answer is in the language it was asked in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..content import Message
from ..memory.conversations import owner_of
from ..memory.types import Interaction
from . import privacy
from .answers import Answer, Exclusions, Gathered, topic_of
from .identifiers import LATEST
from .injections import any_injection
from .prompts import Prompts, Words, plain, words_of
from .types import Prompt

CURATION = LATEST  # the version; a snapshot is read back with its own
# From which on text is masked, and a prompt reaches back so many turns (`REACH`); later ones, `identifiers`.
MASKED, BOUNDED = 1, 2

MAX_CHARACTERS = 16_000
LOOP_WORDS, LOOP_DISTINCT = 40, 0.15  # so many words, and so few of them different: it goes round in circles
LOOP_LETTERS, LOOP_PIECES, PIECE = 200, 0.05, 8  # the same of scripts without spaces, by pieces of so many letters
FEW_WORDS = 4  # of an answer that may be nothing but a number or a secret
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


Fits = Callable[[str], bool]  # whether an answer is short enough to be learnt


def any_length(completion: str) -> bool:
    return True


def curate(gathered: Gathered, reason: Reasons, excluded: Exclusions) -> Gathered:
    """`gathered` without what must not teach, each interaction left out under its reason."""

    def fit(*answers: Answer) -> bool:
        faults = [(why, a.interaction.id) for a in answers if (why := reason(a))]
        for why, interaction_id in faults:
            excluded.add(why, [interaction_id])
        return not faults

    pairs = ([pair for pair in part if fit(*pair)] for part in (gathered.corrected, gathered.regenerated))
    return Gathered([a for a in gathered.answers if fit(a)], *pairs)


class Reasons:
    """Why an answer must not teach, or None; what is known of a turn or an answer is found out once."""

    def __init__(self, prompts: Prompts, min_topic_users: int, fits: Fits = any_length) -> None:
        self._prompts, self._fits = prompts, fits
        self._suspected: dict[str, bool] = {}  # turns
        self._repeating: dict[str, bool] = {}  # replies
        self._known: dict[tuple[str, str, tuple[str, ...]], str | None] = {}
        self._strange = _strange_topics(prompts, min_topic_users) if min_topic_users > 1 else frozenset()
        self._few = f"fewer than {min_topic_users} users ask about this topic"

    def __call__(self, answer: Answer) -> str | None:
        key = answer.interaction.id, answer.completion, answer.sources
        if key not in self._known:
            self._known[key] = self._find(answer)
        return self._known[key]

    def _find(self, answer: Answer) -> str | None:
        before = self._before(answer)
        repeats = any(self._repeats(i) for i in before if i.id != answer.interaction.id)
        said = [answer.completion, *self._notes(answer)]
        if repeats or any(map(self._is_suspected, answer.sources)) or any_injection(said):
            return "quarantined: it may hold an injected instruction"
        if self._strange and any(topic_of(i) in self._strange for i in before):
            return self._few
        if why := fault(answer.completion):
            return why
        if len(answer.completion.split()) <= FEW_WORDS and privacy.nothing_left(*self._as_taught(answer)):
            return "nothing is left of the answer where personal data and secrets are masked"
        return None if self._fits(answer.completion) else "the answer is longer than night.max_tokens has room for"

    def _is_suspected(self, interaction_id: str) -> bool:
        if interaction_id not in self._suspected:
            known = self._prompts.interactions.get(interaction_id)  # none where the source of a note is dated later
            turn = known.turn if known else ()
            self._suspected[interaction_id] = any_injection([m["content"] for m in turn if m["role"] != "system"])
        return self._suspected[interaction_id]

    def _repeats(self, interaction: Interaction) -> bool:
        """Whether a reply says again what commanded it."""
        if interaction.id not in self._repeating:
            self._repeating[interaction.id] = any_injection([interaction.reply])
        return self._repeating[interaction.id]

    def _before(self, answer: Answer) -> list[Interaction]:
        """The interactions whose words its prompt holds, and its own; not the one that judged it."""
        own = answer.interaction
        known = filter(None, map(self._prompts.interactions.get, answer.sources))
        return [own, *(i for i in known if owner_of(i) != owner_of(own) or i.position < own.position)]

    def _as_taught(self, answer: Answer) -> tuple[str, str]:
        """What was answered, and the same as its row has it."""
        row = as_taught(CURATION, self._prompts.prompt(answer.interaction), {"completion": answer.completion})
        return answer.completion, row["completion"]

    def _notes(self, answer: Answer) -> list[str]:
        return [self._prompts.memories[m].text for m in answer.interaction.memory_ids]


def _strange_topics(prompts: Prompts, least: int) -> frozenset[str]:
    users: dict[str, set[str]] = defaultdict(set)
    for interaction in prompts.interactions.values():
        users[topic_of(interaction)].add(interaction.user_id)
    return frozenset(topic for topic, who in users.items() if len(who) < least)


def fault(completion: str) -> str | None:
    """What makes a text unfit to be learnt, if anything does."""
    if len(completion) > MAX_CHARACTERS:
        return f"the answer is longer than {MAX_CHARACTERS} characters"
    if _BROKEN.search(completion):
        return "the answer holds broken characters"
    words = completion.split()
    if len(words) >= LOOP_WORDS and len(set(words)) < LOOP_DISTINCT * len(words):
        return "the answer repeats itself"
    if len(words) < LOOP_WORDS and len(completion) >= LOOP_LETTERS:
        pieces = {completion[i : i + PIECE] for i in range(len(completion) - PIECE + 1)}
        if len(pieces) < LOOP_PIECES * len(completion):
            return "the answer repeats itself"
    return None


def as_taught(version: int, prompt: Prompt, words: Mapping[str, str]) -> dict[str, Any]:
    """The prompt and the answers of one row in the words of that version of the curation."""
    if version < MASKED:
        return {"prompt": prompt, **words}
    masked = privacy.mask([*(m["content"] for m in prompt), *words.values()], version, answers=len(words))
    messages = tuple(Message(role=m["role"], content=masked[i]) for i, m in enumerate(prompt))
    return {"prompt": messages, **dict(zip(words, masked[len(prompt) :], strict=True))}


class Said:
    """Answers in the words in which they are taught and judged: those that are equal in them are the same."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._found: dict[tuple[str, str], tuple[str, str]] = {}  # key of the prompt, words of the answer

    def __call__(self, answer: Answer, asked: Answer | None = None) -> Words:
        """Of that answer, to the prompt of another if one is `asked`."""
        prompt, completion = self._words(answer, asked or answer)
        return prompt, plain(completion)

    def contrast(self, asked: Answer, chosen: Answer, rejected: Answer) -> tuple[str, str, str]:
        """Of two answers to one prompt, each as it would stand there alone."""
        prompt, better = self._words(chosen, asked)
        return prompt, better, self._words(rejected, asked)[1]

    def prompt(self, interaction: Interaction) -> str:
        """Equal ones are the same prompt."""
        return words_of(as_taught(CURATION, self._prompts.prompt(interaction), {})["prompt"], "")[0]

    def row(self, answer: Answer) -> dict[str, Any]:
        """`prompt` and `completion`."""
        return as_taught(CURATION, self._prompts.prompt(answer.interaction), {"completion": answer.completion})

    def _words(self, answer: Answer, asked: Answer) -> tuple[str, str]:
        key = asked.interaction.id, answer.completion
        if key not in self._found:
            row = self.row(replace(answer, interaction=asked.interaction))
            self._found[key] = words_of(row["prompt"], "")[0], row["completion"]
        return self._found[key]
