"""the first schema"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID, NAME, KIND = sa.String(64), sa.String(255), sa.String(16)


def upgrade() -> None:
    topics()
    interactions()
    feedback()
    memories()
    snapshots()
    adapters()
    verdicts()
    deployments()
    cycles()


def column(name: str, kind: sa.types.TypeEngine[Any], *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=nullable)


def foreign_key(table: str, name: str, target: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([name], [target], name=f"fk_{table}_{name}", ondelete=ondelete)


def key(table: str, *names: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint(*names, name=f"pk_{table}")


def topics() -> None:
    op.create_table(
        "topics",
        column("id", ID),
        column("label", NAME),
        column("centroid", sa.LargeBinary()),
        column("size", sa.Integer()),
        column("created_utc", sa.Float()),
        key("topics", "id"),
    )


def interactions() -> None:
    op.create_table(
        "interactions",
        column("id", ID),
        column("user_id", NAME),
        column("agent_id", NAME),
        column("session_id", NAME),
        column("position", sa.Integer()),
        column("turn", sa.JSON()),
        column("text", sa.Text()),
        column("reply", sa.Text()),
        column("adapter_id", ID, nullable=True),
        column("memory_ids", sa.JSON()),
        column("topic_id", ID, nullable=True),
        column("created_utc", sa.Float()),
        foreign_key("interactions", "topic_id", "topics.id"),
        key("interactions", "id"),
    )
    session = ["user_id", "agent_id", "session_id", "position"]
    op.create_index("ix_interactions_session", "interactions", session, unique=True)
    op.create_index("ix_interactions_created_utc", "interactions", ["created_utc"])
    op.create_index("ix_interactions_topic_id", "interactions", ["topic_id"])


def feedback() -> None:
    op.create_table(
        "feedback",
        column("id", ID),
        column("interaction_id", ID),
        column("rating", sa.Float(), nullable=True),
        column("correction", sa.Text(), nullable=True),
        column("comment", sa.Text(), nullable=True),
        column("created_utc", sa.Float()),
        foreign_key("feedback", "interaction_id", "interactions.id", ondelete="CASCADE"),
        key("feedback", "id"),
    )
    op.create_index("ix_feedback_interaction_id", "feedback", ["interaction_id"])


def memories() -> None:
    op.create_table(
        "memories",
        column("id", ID),
        column("user_id", NAME),
        column("agent_id", NAME),
        column("session_id", NAME),
        column("kind", KIND),
        column("text", sa.Text()),
        column("source_ids", sa.JSON()),
        column("shared", sa.Boolean()),
        column("indexed", sa.Boolean()),
        column("created_utc", sa.Float()),
        key("memories", "id"),
    )
    op.create_index("ix_memories_user_id", "memories", ["user_id"])
    op.create_index("ix_memories_created_utc", "memories", ["created_utc"])
    pending = sa.text("NOT indexed")
    op.create_index("ix_memories_pending", "memories", ["id"], sqlite_where=pending, postgresql_where=pending)


def snapshots() -> None:
    op.create_table(
        "snapshots",
        column("id", ID),
        column("rows", sa.JSON()),
        column("excluded", sa.JSON()),
        column("created_utc", sa.Float()),
        key("snapshots", "id"),
    )
    op.create_table(
        "snapshot_sources",
        column("snapshot_id", ID),
        column("interaction_id", ID),
        foreign_key("snapshot_sources", "snapshot_id", "snapshots.id"),
        key("snapshot_sources", "snapshot_id", "interaction_id"),
    )
    op.create_index("ix_snapshot_sources_interaction_id", "snapshot_sources", ["interaction_id"])


def adapters() -> None:
    op.create_table(
        "adapters",
        column("id", ID),
        column("base_id", NAME),
        column("snapshot_id", ID),
        column("phase", KIND),
        column("parent_id", ID, nullable=True),
        column("folder", NAME),
        column("details", sa.JSON()),
        column("tainted", sa.Text(), nullable=True),
        column("created_utc", sa.Float()),
        foreign_key("adapters", "snapshot_id", "snapshots.id"),
        foreign_key("adapters", "parent_id", "adapters.id"),
        key("adapters", "id"),
    )


def verdicts() -> None:
    op.create_table(
        "verdicts",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        column("candidate_id", ID),
        column("incumbent_id", ID, nullable=True),
        column("snapshot_id", ID),
        column("accepted", sa.Boolean()),
        column("measures", sa.JSON()),
        column("reasons", sa.JSON()),
        column("created_utc", sa.Float()),
        foreign_key("verdicts", "candidate_id", "adapters.id"),
        foreign_key("verdicts", "incumbent_id", "adapters.id"),
        foreign_key("verdicts", "snapshot_id", "snapshots.id"),
        key("verdicts", "id"),
    )


def deployments() -> None:
    op.create_table(
        "deployments",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        column("adapter_id", ID, nullable=True),
        column("reason", sa.Text()),
        column("created_utc", sa.Float()),
        foreign_key("deployments", "adapter_id", "adapters.id"),
        key("deployments", "id"),
    )


def cycles() -> None:
    op.create_table(
        "cycles",
        column("id", ID),
        column("started_utc", sa.Float()),
        column("finished_utc", sa.Float(), nullable=True),
        column("snapshot_id", ID, nullable=True),
        column("candidate_id", ID, nullable=True),
        column("error", sa.Text(), nullable=True),
        foreign_key("cycles", "snapshot_id", "snapshots.id"),
        foreign_key("cycles", "candidate_id", "adapters.id"),
        key("cycles", "id"),
    )
