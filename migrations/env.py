"""Runs the migrations on the connection that the store hands over, in the transaction that is open on it.

The table of the revision is our own: the database may hold the tables of an app, and its chain of migrations.
"""

from alembic import context
from nightschool.memory.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    transactional_ddl=True,
    version_table="nightschool_version",
)
with context.begin_transaction():
    context.run_migrations()
