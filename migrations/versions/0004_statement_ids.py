"""statements that have ids of their first source: the store names them again when it is opened"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute(
        "INSERT INTO store_state (name, value) SELECT 'naming', 'due'"
        " WHERE EXISTS (SELECT 1 FROM memories WHERE subject <> '')"
    )
