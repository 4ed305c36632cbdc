"""by what a verdict was reached: the settings of the gate and the probes of the operator"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("verdicts", sa.Column("criteria", sa.String(255), nullable=False, server_default=""))
