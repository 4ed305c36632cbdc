"""what a night decided, by number and not by the time of a clock that may be set back

Its place among the nights, its verdict, the deployment it made, and what was left out of its snapshot then. And what
the reader of a snapshot was fitted on. What people state is read by new rules, so the store states it again when it is
opened.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


# When a night ended: of one that was killed and is not closed yet, when the next one began.
ENDED = (
    "COALESCE(cycles.finished_utc, (SELECT min(later.started_utc) FROM cycles AS later"
    " WHERE later.started_utc > cycles.started_utc), 1e18)"
)


def upgrade() -> None:
    for name in ("number", "verdict_id", "deployment_id"):
        op.add_column("cycles", sa.Column(name, sa.Integer))
    op.add_column("cycles", sa.Column("excluded", sa.JSON))
    op.add_column("snapshots", sa.Column("reader_ids", sa.JSON))
    op.execute(
        "UPDATE cycles SET number = (SELECT count(*) FROM cycles AS earlier"
        " WHERE earlier.started_utc < cycles.started_utc"
        " OR (earlier.started_utc = cycles.started_utc AND earlier.id <= cycles.id))"
    )
    op.execute(
        "UPDATE cycles SET verdict_id = (SELECT max(verdicts.id) FROM verdicts WHERE"
        f" verdicts.candidate_id = cycles.candidate_id AND verdicts.created_utc BETWEEN cycles.started_utc AND {ENDED})"
    )
    op.execute(
        "UPDATE cycles SET deployment_id = (SELECT max(deployments.id) FROM deployments WHERE"
        " deployments.adapter_id = cycles.candidate_id AND deployments.reason = 'promoted'"
        f" AND deployments.created_utc BETWEEN cycles.started_utc AND {ENDED})"
    )
    op.execute(
        "UPDATE cycles SET excluded ="
        " (SELECT snapshots.excluded FROM snapshots WHERE snapshots.id = cycles.snapshot_id)"
    )
    op.execute(
        "INSERT INTO store_state (name, value) SELECT 'statements', 'due' WHERE EXISTS (SELECT 1 FROM interactions)"
    )
