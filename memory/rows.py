"""Between SQL rows and the frozen types: one function each way, and reading and deleting by many ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from sqlalchemy import Select, delete
from sqlalchemy.orm import Session

from .conversations import Review, feedback_id, turn_memory_id, turn_memory_text
from .tables import DraftRow, FeedbackRow, InteractionRow, MemoryRow
from .types import Draft, Feedback, FeedbackEvent, Interaction, Memory, MemoryKind

IDS_A_QUERY = ROWS_A_PAGE = 500


def chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), IDS_A_QUERY):
        yield ids[start : start + IDS_A_QUERY]


def rows_in(session: Session, query: Select[*tuple[Any, ...]], column: Any, ids: Iterable[str]) -> Iterator[Any]:
    """Rows of `query` whose `column` is one of `ids`, however many those are."""
    for some in chunks(list(ids)):
        yield from session.execute(query.where(column.in_(some)))


def scalars_in(session: Session, query: Select[*tuple[Any, ...]], column: Any, ids: Iterable[str]) -> Iterator[Any]:
    """As `rows_in`, of each row its first column."""
    return (row[0] for row in rows_in(session, query, column, ids))


def delete_in(session: Session, column: Any, ids: Iterable[str]) -> None:
    """Delete the rows of the table of `column` in which it is one of `ids`."""
    for some in chunks(list(ids)):
        session.execute(delete(column.class_).where(column.in_(some)))


def to_interaction(row: InteractionRow) -> Interaction:
    return Interaction(
        row.id,
        row.user_id,
        row.agent_id,
        row.session_id,
        row.position,
        tuple({"role": m["role"], "content": m["content"]} for m in row.turn),
        row.text,
        row.reply,
        row.created_utc,
        row.adapter_id,
        tuple(row.memory_ids),
        row.topic_id,
    )


def from_interaction(interaction: Interaction) -> dict[str, Any]:
    values = dict(vars(interaction))
    return values | {"turn": list(interaction.turn), "memory_ids": list(interaction.memory_ids)}


def to_feedback(row: FeedbackRow) -> Feedback:
    event = cast(FeedbackEvent | None, row.event)
    return Feedback(row.id, row.interaction_id, row.rating, row.correction, row.comment, row.created_utc, event)


def review_of(feedback: Feedback) -> Review:
    return Review(feedback.rating, feedback.correction, feedback.comment, feedback.event)


def from_review(interaction_id: str, review: Review, created_utc: float) -> dict[str, Any]:
    named = feedback_id(interaction_id, review)
    return {"id": named, "interaction_id": interaction_id, "created_utc": created_utc, **vars(review)}


def to_draft(row: DraftRow) -> Draft:
    return Draft(row.id, row.interaction_id, row.text, row.base_id, tuple(row.source_ids), row.created_utc)


def from_draft(draft: Draft) -> dict[str, Any]:
    return dict(vars(draft)) | {"source_ids": list(draft.source_ids)}


def to_memory(row: MemoryRow) -> Memory:
    return Memory(
        row.id,
        row.user_id,
        row.agent_id,
        row.session_id,
        cast(MemoryKind, row.kind),
        row.text,
        row.created_utc,
        tuple(row.source_ids),
        row.shared,
        row.subject,
        row.valid_to,
    )


def from_memory(memory: Memory) -> dict[str, Any]:
    return dict(vars(memory)) | {"source_ids": list(memory.source_ids), "indexed": False}


def turn_memory(interaction: Interaction) -> Memory:
    """The memory of an interaction that `leaves_memory`."""
    return Memory(
        turn_memory_id(interaction.id),
        interaction.user_id,
        interaction.agent_id,
        interaction.session_id,
        "turn",
        turn_memory_text(interaction),
        interaction.created_utc,
        (interaction.id,),
    )


def change_memory(row: MemoryRow, memory: Memory) -> None:
    """As `memory`, which the index has to hold anew if it is said in other words or at another time."""
    began = memory.session_id, memory.text, memory.created_utc
    if (row.session_id, row.text, row.created_utc) != began:
        row.session_id, row.text, row.created_utc = began
        row.indexed = False
    row.source_ids, row.valid_to = list(memory.source_ids), memory.valid_to
