"""The prompt that an answer was given to, put back together from what is remembered.

An interaction keeps only its own turn; its prompt is the turns and replies of its session before it, its turn, and the
notes it was shown, in the form in which the assistant showed them. The invariant: everything a prompt is made of is
named by `sources`, so that what is forgotten can be followed into every row that held it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..content import content_id
from ..memory.conversations import Owner, owner_of, request_of
from ..memory.cues import Exchange
from ..memory.prompt import REACH, opening_out_of_reach, prompt_of
from ..memory.reader import LOOK_BACK
from ..memory.types import Interaction, Memory
from .types import Prompt

Words = tuple[str, str]  # of a prompt and an answer, see `words_of`

EDGES = ".,;:!?…'\"()„“”‘’«»"


def plain(text: str) -> str:
    """`text` without what makes no difference: two that are equal in it are near-duplicates."""
    words = (word.strip(EDGES) for word in text.casefold().split())
    return " ".join(filter(None, words)) or text


def words_of(prompt: Prompt, answer: str) -> Words:
    """Equal words are the same answer to the same prompt, but for case, spaces and punctuation at word ends."""
    return content_id([[m["role"], plain(m["content"])] for m in prompt]), plain(answer)


class Prompts:
    """The sessions of `interactions` in order. Keys are chained hashes, so a long session costs linear time."""

    def __init__(self, interactions: Iterable[Interaction], memories: Mapping[str, Memory]) -> None:
        ordered = sorted(interactions, key=lambda i: (owner_of(i), i.position))
        self.interactions = {i.id: i for i in ordered}
        self.memories = memories
        self._sessions: dict[Owner, list[Interaction]] = {}
        self._index: dict[str, int] = {}
        self._history: dict[str, str] = {}  # the key of all that was said before an interaction
        before = ""
        for interaction in ordered:
            session = self._sessions.setdefault(owner_of(interaction), [])
            if not session:
                before = ""
            self._index[interaction.id] = len(session)
            self._history[interaction.id] = before
            before = content_id([before, list(interaction.turn), interaction.reply])
            session.append(interaction)

    def prompt(self, interaction: Interaction, *, whole: bool = False) -> Prompt:
        """With the turns within reach, or the `whole` session before it."""
        earlier = self._earlier(interaction, None if whole else REACH)
        opening = [] if whole else self._opening(interaction)
        return tuple(prompt_of(opening, earlier, interaction.turn, self._notes(interaction)))

    def key(self, interaction: Interaction) -> str:
        """Equal keys are equal prompts, but for case, spaces and punctuation at word ends in this turn."""
        said = [(m["role"], plain(m["content"])) for m in interaction.turn]
        return content_id([self._history[interaction.id], said, self._notes(interaction)])

    def key_without_request(self, interaction: Interaction) -> str:
        """Equal keys are prompts that differ in the words of the last request at most."""
        rest = list(interaction.turn)
        last = max((i for i, m in enumerate(rest) if m["role"] == "user"), default=None)
        if last is not None:
            rest[last] = {"role": "user", "content": ""}
        return content_id([self._history[interaction.id], rest, self._notes(interaction)])

    def reaction(self, interaction: Interaction) -> Interaction | None:
        """The next turn of the session, if a person speaks in it: what a tool returned shows nothing."""
        reaction = self._next(interaction)
        return reaction if reaction and request_of(reaction.turn) else None

    def another(self, interaction: Interaction) -> Interaction | None:
        """The next turn of the session, if it is another reply to the same: nobody spoke between, or just said that."""
        following = self._next(interaction)
        if following is None or not following.turn:
            return following
        same = request_of(following.turn) and plain(following.text) == plain(interaction.text)
        return following if same else None

    def is_last(self, interaction: Interaction) -> bool:
        """Whether its session ends with it."""
        return self._sessions[owner_of(interaction)][-1].id == interaction.id

    def earlier_replies(self, interaction: Interaction) -> list[str]:
        index = self._index[interaction.id]
        return [i.reply for i in self._sessions[owner_of(interaction)][max(0, index - LOOK_BACK) : index]]

    def exchange(self, interaction: Interaction) -> Exchange:
        """The answer in its place, with no more of the session than it is compared with."""
        session, index = self._sessions[owner_of(interaction)], self._index[interaction.id]
        earlier = [i for i in session[max(0, index - LOOK_BACK) : index]]
        reaction = self.reaction(interaction)
        # a turn of tools has the text of the request before it, which is not asked again
        requests = tuple(i.text for i in earlier if request_of(i.turn))
        own = bool(request_of(interaction.turn))
        return Exchange(
            interaction.text,
            interaction.reply,
            reaction.text if reaction else None,
            requests if own else requests[:-1],
            tuple(i.reply for i in earlier),
        )

    def exchanged(self, interaction: Interaction) -> list[str]:
        """The ids of all whose words are in its `exchange`."""
        session, index = self._sessions[owner_of(interaction)], self._index[interaction.id]
        return [i.id for i in session[max(0, index - LOOK_BACK) : index + 2]]

    def missing_memories(self, interaction: Interaction) -> list[str]:
        """What it was shown and is not held any more."""
        return [m for m in interaction.memory_ids if m not in self.memories]

    def repeats_forgotten(self, interaction: Interaction) -> bool:
        """Whether it, or a reply that its prompt holds, was shown a memory that is gone, and may repeat it."""
        return any(map(self.missing_memories, (*self._earlier(interaction, REACH), interaction)))

    def missing_turns(self, interaction: Interaction) -> set[int]:
        """The places in the session, as far as the prompt reaches back, of which the turn is forgotten."""
        held = {i.position for i in self._earlier(interaction, REACH)}
        return set(range(max(0, interaction.position - REACH), interaction.position)) - held

    def sources(self, interaction: Interaction) -> tuple[str, ...]:
        """The interaction and every other whose words are in its prompt: earlier turns, what its notes were made of."""
        found = [i.id for i in (interaction, *self._opening(interaction), *self._earlier(interaction, REACH))]
        for memory_id in interaction.memory_ids:
            found += self._made_of(self.memories[memory_id], interaction.created_utc)
        return tuple(dict.fromkeys(found))

    def _made_of(self, memory: Memory, shown_utc: float) -> Iterable[str]:
        """Its sources; of a statement the turn whose words it has, and those that had repeated it when it was shown."""
        if not memory.subject:
            return memory.source_ids
        first, *repeated = memory.source_ids
        known = (self.interactions[i] for i in repeated if i in self.interactions)
        return [first, *(i.id for i in known if i.created_utc <= shown_utc)]

    def _next(self, interaction: Interaction) -> Interaction | None:
        """The next turn of the session; None where that is forgotten."""
        following = self._index[interaction.id] + 1
        later = self._sessions[owner_of(interaction)][following : following + 1]
        return next((i for i in later if i.position == interaction.position + 1), None)

    def _earlier(self, interaction: Interaction, reach: int | None) -> list[Interaction]:
        index = self._index[interaction.id]
        first = 0 if reach is None else max(0, index - reach)
        return self._sessions[owner_of(interaction)][first:index]

    def _opening(self, interaction: Interaction) -> list[Interaction]:
        return opening_out_of_reach(self._sessions[owner_of(interaction)][0], self._earlier(interaction, REACH))

    def _notes(self, interaction: Interaction) -> list[str]:
        return [self.memories[m].text for m in interaction.memory_ids]
