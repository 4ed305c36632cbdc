"""corrections that are no memories yet: the store remembers them when it is opened"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute(
        "INSERT INTO store_state (name, value) SELECT 'corrections', 'due'"
        " WHERE EXISTS (SELECT 1 FROM feedback WHERE correction IS NOT NULL)"
    )
