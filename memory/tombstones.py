"""What was forgotten, as salted hashes: enough to know it when a file brings it back, too little to read.

A turn is known by its place (user, agent, session and position) and its messages up to each that the user said; a turn
in which the user said nothing and a note are known by their id. So a copy of the file from before the reply, or with
another reply, is stopped too, and the same words in another session are not: those were not forgotten. What a person
says or notes anew is always kept, and lifts the tombstone. The invariant: only bringing in stops at a tombstone.

Not covered: the same conversation under another session_id. Whoever holds the database and guesses the exact words
and their place can test the guess, since the salt lies beside the hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from ..content import canonical_json
from .conversations import owner_of, request_of
from .rows import delete_in, scalars_in
from .tables import StateRow, TombstoneRow
from .types import Interaction

SALT = "salt"


def salt_of(session: Session) -> str:
    return session.scalars(select(StateRow.value).where(StateRow.name == SALT)).one()


class Tombstones:
    """The tombstones of one store, in the caller's transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._salt = bytes.fromhex(salt_of(session))

    def add(self, interactions: Iterable[Interaction], note_ids: Iterable[str]) -> None:
        self.add_keys({key for i in interactions for key in self._keys(i)} | set(map(self._key, note_ids)))

    def add_keys(self, keys: set[str]) -> None:
        if new := sorted(keys - self._held(keys)):
            self._session.execute(insert(TombstoneRow), [{"key": key} for key in new])

    def adopt(self, salt: str) -> bool:
        """Take over another store's salt, so that its tombstones mean something here; not if there are some already."""
        if salt != self._salt.hex() and self._none():
            self._session.execute(update(StateRow).where(StateRow.name == SALT).values(value=salt))
            self._salt = bytes.fromhex(salt)
        return salt == self._salt.hex()

    def lift(self, interactions: Iterable[Interaction], note_ids: Iterable[str]) -> None:
        if self._none():
            return
        keys = {key for i in interactions for key in self._keys(i)} | set(map(self._key, note_ids))
        delete_in(self._session, TombstoneRow.key, keys)

    def forgotten(self, interactions: Iterable[Interaction]) -> set[str]:
        """The ids of those that were forgotten."""
        if self._none():
            return set()
        keys = {i.id: set(self._keys(i)) for i in interactions}
        held = self._held(set().union(*keys.values()))
        return {i for i, mine in keys.items() if not held.isdisjoint(mine)}

    def forgotten_notes(self, note_ids: Iterable[str]) -> set[str]:
        keys = {i: self._key(i) for i in note_ids}
        held = self._held(keys.values())
        return {i for i, key in keys.items() if key in held}

    def _none(self) -> bool:
        return self._session.scalars(select(TombstoneRow.key).limit(1)).first() is None

    def _held(self, keys: Iterable[str]) -> set[str]:
        return set(scalars_in(self._session, select(TombstoneRow.key), TombstoneRow.key, keys))

    def _key(self, content_id: str) -> str:
        return blake2b(content_id.encode(), digest_size=16, key=self._salt).hexdigest()

    def _keys(self, interaction: Interaction) -> list[str]:
        place = [*owner_of(interaction), interaction.position]
        digest = blake2b(canonical_json(place).encode(), digest_size=16, key=self._salt)
        keys, said = [], False
        for message in interaction.turn:
            digest.update(canonical_json(message).encode())
            said = said or bool(request_of([message]))
            keys += [digest.hexdigest()] if said else []
        return keys or [self._key(interaction.id)]
