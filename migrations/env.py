"""Runs the migrations on the connection that the store hands over, in the transaction that is open on it."""

from alembic import context
from nightschool.memory.tables import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
