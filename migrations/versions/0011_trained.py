"""what a night trained, and what that cost

An adapter that is trained once more keeps its id, so what it cost the first time stood nowhere any more. Of nights
before this it is not known.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("cycles", sa.Column("trained", sa.JSON))
