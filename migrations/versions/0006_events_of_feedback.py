"""what a person did with a reply: copied, accepted, regenerated, edited"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("feedback", sa.Column("event", sa.String(16), nullable=True))
