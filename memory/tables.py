"""Every SQL table of the project: one schema, brought up by the one Alembic chain in `migrations/`.

SQL holds the facts; the vector index and the adapters' files are derived from it. Snapshots hold references and
weights, never text: what is forgotten here is gone from every snapshot too, and the snapshot's id no longer re-derives.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ID = String(64)
NAME = String(255)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TopicRow(Base):
    __tablename__ = "topics"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    label: Mapped[str] = mapped_column(NAME)
    centroid: Mapped[bytes] = mapped_column(LargeBinary)  # float32, the sum of the unit vectors of its turns
    size: Mapped[int] = mapped_column(Integer)
    created_utc: Mapped[float] = mapped_column(Float)


class InteractionRow(Base):
    __tablename__ = "interactions"
    __table_args__ = (
        Index("ix_interactions_session", "user_id", "agent_id", "session_id", "position", unique=True),
        Index("ix_interactions_created_utc", "created_utc"),
        Index("ix_interactions_topic_id", "topic_id"),
    )
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    user_id: Mapped[str] = mapped_column(NAME)
    agent_id: Mapped[str] = mapped_column(NAME)
    session_id: Mapped[str] = mapped_column(NAME)
    position: Mapped[int] = mapped_column(Integer)
    turn: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    text: Mapped[str] = mapped_column(Text)
    reply: Mapped[str] = mapped_column(Text)
    adapter_id: Mapped[str | None] = mapped_column(ID)
    memory_ids: Mapped[list[str]] = mapped_column(JSON)
    topic_id: Mapped[str | None] = mapped_column(ForeignKey("topics.id"))
    created_utc: Mapped[float] = mapped_column(Float)


class FeedbackRow(Base):
    __tablename__ = "feedback"
    __table_args__ = (Index("ix_feedback_interaction_id", "interaction_id"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    interaction_id: Mapped[str] = mapped_column(ForeignKey("interactions.id", ondelete="CASCADE"))
    rating: Mapped[float | None] = mapped_column(Float)
    correction: Mapped[str | None] = mapped_column(Text)
    comment: Mapped[str | None] = mapped_column(Text)
    event: Mapped[str | None] = mapped_column(String(16))
    created_utc: Mapped[float] = mapped_column(Float)


class DraftRow(Base):
    """What the base wrote to a remembered prompt (`evolve/expansion.py`): no snapshot holds text, so it lies here."""

    __tablename__ = "drafts"
    __table_args__ = (Index("ix_drafts_interaction_id", "interaction_id"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    interaction_id: Mapped[str] = mapped_column(ForeignKey("interactions.id", ondelete="CASCADE"))
    text: Mapped[str] = mapped_column(Text)
    base_id: Mapped[str] = mapped_column(NAME)
    source_ids: Mapped[list[str]] = mapped_column(JSON)
    created_utc: Mapped[float] = mapped_column(Float)


class MemoryRow(Base):
    __tablename__ = "memories"
    __table_args__ = (
        Index("ix_memories_user_id", "user_id"),
        Index("ix_memories_created_utc", "created_utc"),
        Index("ix_memories_subject", "user_id", "agent_id", "subject"),
        # Every recall asks what is not indexed yet; only those few rows are in this index.
        Index("ix_memories_pending", "id", sqlite_where=text("NOT indexed"), postgresql_where=text("NOT indexed")),
    )
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    user_id: Mapped[str] = mapped_column(NAME)
    agent_id: Mapped[str] = mapped_column(NAME)
    session_id: Mapped[str] = mapped_column(NAME)
    kind: Mapped[str] = mapped_column(String(16))
    text: Mapped[str] = mapped_column(Text)
    source_ids: Mapped[list[str]] = mapped_column(JSON)
    shared: Mapped[bool] = mapped_column(Boolean)
    subject: Mapped[str] = mapped_column(NAME, server_default="")  # of a statement
    valid_to: Mapped[float | None] = mapped_column(Float)
    indexed: Mapped[bool] = mapped_column(Boolean)  # false until the vector index holds it: the outbox
    created_utc: Mapped[float] = mapped_column(Float)


class SnapshotRow(Base):
    __tablename__ = "snapshots"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    rows: Mapped[list[dict[str, Any]]] = mapped_column(
        JSON, deferred=True
    )  # references and weights, see evolve/dataset.py
    excluded: Mapped[list[dict[str, Any]]] = mapped_column(JSON, deferred=True)
    censor: Mapped[str] = mapped_column(ID, server_default="")  # the version that scored it; empty: before they had one
    reader_ids: Mapped[list[str] | None] = mapped_column(
        JSON, deferred=True
    )  # of what its reader was fitted on; none: not kept then
    created_utc: Mapped[float] = mapped_column(Float)


class SnapshotSourceRow(Base):
    """Which interactions a snapshot was made of, so that lineage and forgetting are one indexed query."""

    __tablename__ = "snapshot_sources"
    __table_args__ = (Index("ix_snapshot_sources_interaction_id", "interaction_id"),)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshots.id"), primary_key=True)
    interaction_id: Mapped[str] = mapped_column(ID, primary_key=True)  # no foreign key: it outlives what is forgotten


class AdapterRow(Base):
    __tablename__ = "adapters"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    base_id: Mapped[str] = mapped_column(NAME)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshots.id"))
    phase: Mapped[str] = mapped_column(String(16))
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"))
    folder: Mapped[str] = mapped_column(NAME)  # under <home>/adapters
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    tainted: Mapped[str | None] = mapped_column(Text)  # why it may not serve any more
    created_utc: Mapped[float] = mapped_column(Float)


class VerdictRow(Base):
    __tablename__ = "verdicts"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    candidate_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"))
    incumbent_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"))
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshots.id"))
    accepted: Mapped[bool] = mapped_column(Boolean)
    measures: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    reasons: Mapped[list[str]] = mapped_column(JSON)
    criteria: Mapped[str] = mapped_column(NAME, server_default="")  # id of the gate's settings and the probes
    created_utc: Mapped[float] = mapped_column(Float)


class DeploymentRow(Base):
    """The live alias: the newest row says which adapter serves; no adapter means the base."""

    __tablename__ = "deployments"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    adapter_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"))
    reason: Mapped[str] = mapped_column(Text)
    created_utc: Mapped[float] = mapped_column(Float)


class CycleRow(Base):
    __tablename__ = "cycles"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    started_utc: Mapped[float] = mapped_column(Float)
    finished_utc: Mapped[float | None] = mapped_column(Float)
    snapshot_id: Mapped[str | None] = mapped_column(ForeignKey("snapshots.id"))
    candidate_id: Mapped[str | None] = mapped_column(ForeignKey("adapters.id"))
    error: Mapped[str | None] = mapped_column(Text)
    number: Mapped[int | None] = mapped_column(Integer)  # in the order in which they began, whatever the clock said
    verdict_id: Mapped[int | None] = mapped_column(Integer)
    deployment_id: Mapped[int | None] = mapped_column(Integer)  # by which its candidate went into service
    excluded: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSON, deferred=True
    )  # from its snapshot, as that night found it
    trained: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)  # what it cost, by phase; see `types.PhaseCost`


class ReceiptRow(Base):
    """One `forget`: how much it erased and what it tainted, no text and no ids of what is gone."""

    __tablename__ = "receipts"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    details: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_utc: Mapped[float] = mapped_column(Float)
    finished_utc: Mapped[float | None] = mapped_column(Float)  # none until the bytes are off the disk, too


class TombstoneRow(Base):
    """A salted hash of something that was forgotten, see memory/tombstones.py."""

    __tablename__ = "tombstones"
    key: Mapped[str] = mapped_column(ID, primary_key=True)


class StateRow(Base):
    """What the store knows of itself: the `salt` of its tombstones, a `rebuild` under way, `naming` or
    `corrections` due, how often `topics` changed, which `topics moved` lately, and the name of the `store`, which its
    index bears."""

    __tablename__ = "store_state"
    name: Mapped[str] = mapped_column(ID, primary_key=True)
    value: Mapped[str] = mapped_column(Text)
