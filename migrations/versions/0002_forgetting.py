"""receipts and tombstones of what was forgotten, and the state of the store itself"""

from __future__ import annotations

from secrets import token_hex

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "receipts",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_utc", sa.Float(), nullable=False),
        sa.Column("finished_utc", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_receipts"),
    )
    op.create_table(
        "tombstones",
        sa.Column("key", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_tombstones"),
    )
    state = op.create_table(
        "store_state",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_store_state"),
    )
    op.bulk_insert(state, [{"name": "salt", "value": token_hex(32)}])
