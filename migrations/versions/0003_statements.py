"""what users stated: the subject of a memory, and until when it held"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("memories", sa.Column("subject", sa.String(255), nullable=False, server_default=""))
    op.add_column("memories", sa.Column("valid_to", sa.Float(), nullable=True))
    op.create_index("ix_memories_subject", "memories", ["user_id", "agent_id", "subject"])
