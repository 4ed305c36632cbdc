"""The SQL side of the store: the engine, the migrations, and the two kinds of transaction.

The invariant: a database is read or written only at the revision of this code. Writers wait for each other from their
first statement on, so what a writing transaction reads stays true until it commits.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from ..errors import SchemaOutdated, SettingsError, StoreError
from ..settings import SECRET

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
WRITING, ALONE = "nightschool_writing", "nightschool_alone"
VERSIONS = "nightschool_version"  # as in migrations/env.py: the database may be an app's, with a chain of its own
FORMER_VERSIONS = "alembic_version"  # as the table was called
MOVED = "see nightschool_version"  # there, so that an older version refuses the database
FIRST_TABLES = {"interactions", "feedback", "memories", "topics", "snapshots", "adapters"}
UNWRITTEN = ("unable to open database file", "attempt to write a readonly database")
UNWRITABLE = "; SQLite writes a log beside it even to read it: copy a home that is read-only elsewhere"
FULL = "database or disk is full"
NO_ROOM = (
    "; where the disk has room, it is the folder of temporary files, through which SQLite erases: start again with"
    " SQLITE_TMPDIR set to one with room for the whole database, as the home"
)
DIALECTS = {  # whose locks and erasing we know, and what brings the driver
    "sqlite": "begin the URL with sqlite:///",
    "postgresql": "run `pip install 'nightschool[postgres]'` and begin the URL with postgresql+psycopg://",
}
WRITERS_LOCK = 5_177_013  # any number, the same in every process
LOOK_S = 0.05  # between two looks
WAIT_S = 120.0  # for another writer, who may be erasing from a large index
LIBPQ_DRIVERS = ("psycopg", "psycopg2")
PATIENCE = {  # in seconds, the last one in milliseconds: a server that is cut off is else waited for by the hour
    **{"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3},
    "tcp_user_timeout": 60_000,
}
PRAGMAS = (f"busy_timeout={WAIT_S * 1000:.0f}", "foreign_keys=ON", "secure_delete=ON")


def without_password(url: str) -> str:
    """SettingsError if it is no URL of a database."""
    return SECRET.sub(r"\1***", _parsed(url).render_as_string(hide_password=True))


def wait_until(found: Callable[[], bool], wait_s: float) -> bool:
    """Whether it is found so within `wait_s` seconds, looked at once at least."""
    until = monotonic() + wait_s
    while not found():
        if monotonic() >= until:
            return False
        sleep(LOOK_S)
    return True


def file_of(url: str) -> Path | None:
    """The file of an SQLite database; None of one that is on a server, in working memory, or named by a URI."""
    found = _parsed(url)
    name = found.database or ":memory:"
    if found.get_backend_name() != "sqlite" or name.startswith((":memory:", "file:")):
        return None
    return Path(name)


def _parsed(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise SettingsError("memory.database_url is not one that SQLAlchemy can read; see its `make_url`") from error


def _checked(url: str) -> str:
    """The same, if it is of a kind of database that can hold a memory; SettingsError otherwise."""
    kind = _parsed(url).get_backend_name()
    if kind not in DIALECTS:
        raise SettingsError(f"memory.database_url is of {kind!r}; only {' and '.join(DIALECTS)} hold a memory")
    if kind == "sqlite" and (_parsed(url).database or ":memory:").startswith(":memory:"):
        raise SettingsError(
            f"memory.database_url is {without_password(url)}, which every thread would have one of its own of, and"
            " which is gone with this process; name a file, as in sqlite:////var/lib/nightschool.db"
        )
    return url


def _make_private(file: Path) -> None:
    """Make an empty database that its owner alone may read; SQLite gives its log the same mode."""
    with suppress(OSError):  # it is there, or cannot be, and then SQLite says why
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


@contextmanager
def _file_alone(file: Path | None, wait_s: float) -> Iterator[Callable[[], bool]]:
    if file is None:
        yield lambda: True
        return
    lock = FileLock(f"{file.resolve()}.night.lock", timeout=wait_s, mode=0o600)
    with suppress(Timeout):
        lock.acquire()
    try:
        yield lambda: lock.is_locked
    finally:
        lock.release()


def _holds(connection: Connection, key: int) -> bool:
    """Whether the server still knows that this connection holds `key`; it may be another one than took it."""
    own = "locktype = 'advisory' AND pid = pg_backend_pid() AND granted"
    try:
        found = connection.exec_driver_sql(f"SELECT count(*) FROM pg_locks WHERE {own} AND objid = {key}").scalar()
    except SQLAlchemyError:
        return False
    return bool(found)


class _ServerLock:
    """An advisory lock, which goes with its connection: where that was cut it is taken on another, if it is free."""

    def __init__(self, engine: Engine, key: int, wait_s: float) -> None:
        self._engine, self._key = engine.execution_options(isolation_level="AUTOCOMMIT"), key
        self._wait_s = wait_s
        self._connection = self._engine.connect()
        self._taken = self._take()

    def held(self) -> bool:
        if self._taken and not _holds(self._connection, self._key):
            self._taken = self._take_again()
        return self._taken

    def release(self) -> None:
        with suppress(SQLAlchemyError), self._connection as connection:  # where the server is gone, so is the lock
            if self._taken:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({self._key})")

    def _take(self) -> bool:
        asked = f"SELECT pg_try_advisory_lock({self._key})"
        return wait_until(lambda: bool(self._connection.exec_driver_sql(asked).scalar()), self._wait_s)

    def _take_again(self) -> bool:
        """Whether that was possible; of a server that is gone, nobody knows who has it."""
        try:
            self._connection.invalidate()
            self._connection.close()
            self._connection = self._engine.connect()
            return self._take()
        except SQLAlchemyError:
            return False


class Database:
    def __init__(self, url: str) -> None:
        self.url, self._named = without_password(url), file_of(url)
        self._closed, self._process = False, os.getpid()
        with self._translated("open"):
            self.sql = open_engine(url)
            if self._named:
                _make_private(self._named)
            self._writer = self.sql.execution_options(**{WRITING: True})
            try:
                self._upgrade()
            except BaseException:
                self.close()
                raise

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with self._translated("read"), Session(self.sql) as session:
            yield session

    @contextmanager
    def moment(self) -> Iterator[Session]:
        """Reading in which everything is as it was at the first statement, whoever writes meanwhile."""
        postgres = self.sql.dialect.name == "postgresql"  # SQLite reads a moment anyway
        engine = self.sql.execution_options(isolation_level="REPEATABLE READ") if postgres else self.sql
        with self._translated("read"), Session(engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """One transaction, alone among writers; rolled back whole if anything in it fails."""
        with self._translated("write"), Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def alone(self, key: int, wait_s: float = 0.0) -> Iterator[Callable[[], bool]]:
        """Take `key` if nobody else holds it for `wait_s`; says whenever it is asked whether it is held.

        SQLite's is a lock beside its file, whatever the key; one that has no file is nobody else's. What a server let
        go with a connection is taken again when it is asked for, unless somebody else took it since.
        """
        if self.sql.dialect.name != "postgresql":
            with _file_alone(self._file(), wait_s) as held:
                yield held
            return
        lock = _ServerLock(self.sql, key, wait_s)
        try:
            yield lock.held
        finally:
            lock.release()

    def _file(self) -> Path | None:
        """The file that SQLite reads, by a URI too; None of a database in working memory."""
        with self._translated("read"), self.sql.connect() as connection:
            name = connection.exec_driver_sql("SELECT file FROM pragma_database_list WHERE name = 'main'").scalar()
        file = Path(str(name))
        return file if file.is_file() else None

    def erase(self) -> None:
        """Take what was deleted out of SQLite's file and its write-ahead log.

        `secure_delete` alone is not enough: a cell that was moved to another page before it was deleted leaves a copy.
        Not covered: other databases keep deleted rows until their own vacuum, and their logs and backups for longer.
        """
        if self.sql.dialect.name != "sqlite":
            return
        with self._alone("erase from") as connection:
            connection.exec_driver_sql("VACUUM")
            busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
        if busy:
            raise StoreError(
                f"{self.url}: the rows are deleted, but another connection still reads the log that holds them;"
                " close it and open the store again, which takes it up where it stopped"
            )

    def compact(self) -> None:
        """Give back the space of deleted rows, and bring the planner's statistics up."""
        with self._alone("compact") as connection:
            connection.exec_driver_sql("VACUUM")
            connection.exec_driver_sql("ANALYZE")
            if self.sql.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _alone(self, action: str) -> Iterator[Connection]:
        """A connection on which no transaction is opened, for the statements that refuse to be in one."""
        sqlite = self.sql.dialect.name == "sqlite"
        options: dict[str, Any] = {ALONE: True} if sqlite else {"isolation_level": "AUTOCOMMIT"}
        with self._translated(action), self.sql.connect().execution_options(**options) as connection:
            yield connection

    def require_own_process(self) -> None:
        """StoreError in a process that was forked after it was opened: neither SQLite nor LanceDB outlives that."""
        if os.getpid() != self._process:
            raise StoreError(
                f"{self.url} was opened before this process was forked; start processes by spawn,"
                " or open the home after the fork"
            )

    def close(self) -> None:
        self._closed = True  # a pool that is disposed of opens connections anew
        self.sql.dispose(close=os.getpid() == self._process)  # in a fork they are those of the process before

    def _upgrade(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        scripts = ScriptDirectory.from_config(config)
        with self.sql.connect() as connection:
            held = _revision(connection)
        if held is not None and held not in {script.revision for script in scripts.walk_revisions()}:
            raise SchemaOutdated(
                f"{self.url} is at revision {held}, and this version of nightschool knows no later one than"
                f" {scripts.get_current_head()}; install the version that wrote it, or a newer one"
            )
        if held != scripts.get_current_head():
            with self._writer.begin() as connection:
                _adopt(connection, scripts)
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        if self._closed:
            raise StoreError(f"cannot {action} the database {self.url}: it was closed; open the home again")
        self.require_own_process()
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            hint = UNWRITABLE if self._named and self._named.exists() and cause in UNWRITTEN else ""
            hint = hint or (NO_ROOM if cause == FULL else "")
            raise StoreError(f"cannot {action} the database {self.url}: {cause}{hint}") from error


def open_engine(url: str) -> Engine:
    # a traceback would hold what people said
    careful: dict[str, Any] = {"hide_parameters": True}
    if _parsed(_checked(url)).get_backend_name() != "sqlite":
        # a server may have closed what stood idle, and who waited for another writer has to see what that one wrote
        careful |= {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
        if _parsed(url).get_driver_name() in LIBPQ_DRIVERS:
            careful["connect_args"] = {k: v for k, v in PATIENCE.items() if k not in _parsed(url).query}
    try:
        engine = create_engine(url, **careful)
    except (ImportError, NoSuchModuleError) as error:
        raise SettingsError(
            f"memory.database_url is {without_password(url)}, and its driver is not here: {error};"
            f" {DIALECTS[_parsed(_checked(url)).get_backend_name()]}"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where we say, see `_begin`
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    _use_wal(connection)


def _use_wal(connection: Any) -> None:
    """Of a new file; SQLite itself does not wait for another process that does the same."""
    until = monotonic() + WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or monotonic() >= until:
                raise
            sleep(LOOK_S)


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    writing = options.get(WRITING, False)
    if connection.dialect.name == "sqlite":
        if not options.get(ALONE, False):
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
    elif writing and connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT_S * 1000:.0f}ms'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK})")
        connection.exec_driver_sql("SET LOCAL lock_timeout TO DEFAULT")


def _revision(connection: Connection) -> str | None:
    return _migrations(connection).get_current_revision()


def _migrations(connection: Connection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"version_table": VERSIONS})


def _adopt(connection: Connection, scripts: ScriptDirectory) -> None:
    """Take the revision from where it was kept before, if the tables there are ours and not those of an app."""
    tables = set(inspect(connection).get_table_names())
    if VERSIONS not in tables and {FORMER_VERSIONS, *FIRST_TABLES} <= tables:
        former = connection.exec_driver_sql(f"SELECT version_num FROM {FORMER_VERSIONS}").scalar()
        _migrations(connection).stamp(scripts, str(former))
        connection.exec_driver_sql(f"UPDATE {FORMER_VERSIONS} SET version_num = '{MOVED}'")
