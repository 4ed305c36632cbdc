"""which version of the Censor scored what a snapshot holds"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("censor", sa.String(64), nullable=False, server_default=""))
