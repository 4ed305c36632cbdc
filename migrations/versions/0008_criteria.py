"""by what a verdict was reached: the settings of the gate and the probes of the operator"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("verdicts", sa.Column("criteria", sa.String(255), nullable=False, server_default=""))
