from __future__ import annotations

import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from nightschool.errors import SchemaOutdated, StoreError
from nightschool.memory import database as module
from nightschool.memory.database import MIGRATIONS, VERSIONS, Database
from nightschool.memory.tables import Base, FeedbackRow, SnapshotRow, TopicRow
from sqlalchemy import create_engine, inspect, text


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/test.db"


def test_migrations_make_exactly_the_tables_of_the_models(url):
    database = Database(url)
    with database.sql.connect() as connection:
        versions = MigrationContext.configure(connection, opts={"version_table": VERSIONS})
        assert compare_metadata(versions, Base.metadata) == []
        made = {index["name"] for table in Base.metadata.tables for index in inspect(connection).get_indexes(table)}
        assert made == {index.name for table in Base.metadata.tables.values() for index in table.indexes}
    database.close()


def test_chain_has_one_head_and_every_migration_says_what_it_does():
    scripts = ScriptDirectory(str(MIGRATIONS))
    assert len(scripts.get_heads()) == 1
    assert all(script.doc.strip() for script in scripts.walk_revisions())


def test_migrations_import_nothing_of_ours():
    for path in (MIGRATIONS / "versions").glob("0*.py"):
        source = path.read_text(encoding="utf-8")
        assert "nightschool" not in source and "from ." not in source


def test_database_of_a_newer_version_is_refused_and_left_alone(url):
    Database(url).close()
    older = Database(url)
    with older.sql.begin() as connection:
        connection.execute(text(f"UPDATE {VERSIONS} SET version_num = '9999'"))
    older.close()
    with pytest.raises(SchemaOutdated, match=r"test.db is at revision 9999, .* no later one than \d+; install"):
        Database(url)


def test_revision_is_taken_from_where_it_was_kept_before(url):
    Database(url).close()
    sql = create_engine(url)
    with sql.begin() as connection:
        connection.execute(text(f"ALTER TABLE {VERSIONS} RENAME TO alembic_version"))
    Database(url).close()
    with sql.begin() as connection:
        held = [connection.scalar(text(f"SELECT version_num FROM {table}")) for table in (VERSIONS, "alembic_version")]
    assert held == [ScriptDirectory(str(MIGRATIONS)).get_current_head(), "see nightschool_version"]
    Database(url).close()
    sql.dispose()


def test_tables_and_migrations_of_an_app_are_left_alone(url):
    sql = create_engine(url)
    with sql.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num TEXT)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('0007')"))
        connection.execute(text("CREATE TABLE orders (id TEXT, total FLOAT)"))
    database = Database(url)
    with database.reading() as session:
        assert session.get(SnapshotRow, "b2:1") is None
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "0007"
        assert list(session.execute(text("SELECT * FROM orders"))) == []
    database.close()
    sql.dispose()


def test_rows_of_before_keep_what_they_were_and_name_no_censor_and_no_event(url):
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    sql = create_engine(url)
    with sql.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        connection.execute(text("INSERT INTO snapshots VALUES ('b2:1', '[]', '[]', 1.0)"))
        asked = "'b2:2', 'ann', '', 's', 0, '[]', 'hi', 'ok', NULL, '[]', NULL, 1.0"
        connection.execute(text(f"INSERT INTO interactions VALUES ({asked})"))
        connection.execute(text("INSERT INTO feedback VALUES ('b2:3', 'b2:2', 1.0, NULL, NULL, 1.0)"))
    sql.dispose()
    database = Database(url)
    with database.reading() as session:
        assert session.get_one(SnapshotRow, "b2:1").censor == ""
        row = session.get_one(FeedbackRow, "b2:3")
        assert (row.event, row.rating, row.created_utc) == (None, 1.0, 1.0)
    database.close()


def test_failing_migration_leaves_the_database_as_it_was(url, tmp_path, monkeypatch):
    broken = tmp_path / "migrations"
    (broken / "versions").mkdir(parents=True)
    (broken / "env.py").write_bytes((MIGRATIONS / "env.py").read_bytes())
    first = next((MIGRATIONS / "versions").glob("0001_*.py")).read_text(encoding="utf-8")
    (broken / "versions" / "0001_first.py").write_text(first.replace("    cycles()\n", "    1 / 0\n"), encoding="utf-8")
    monkeypatch.setattr(module, "MIGRATIONS", broken)
    with pytest.raises(ZeroDivisionError):
        Database(url)
    monkeypatch.undo()
    database = Database(url)
    assert "cycles" in inspect(database.sql).get_table_names()
    database.close()


def test_two_processes_open_a_new_home_at_once(tmp_path, url):
    code = f"from nightschool.memory.database import Database; Database({url!r}).close()"
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4


def test_folder_with_a_percent_sign_holds_migrations_too(tmp_path, url, monkeypatch):
    odd = tmp_path / "100% mine"
    (odd / "versions").mkdir(parents=True)
    for path in [MIGRATIONS / "env.py", *(MIGRATIONS / "versions").glob("0*.py")]:
        (odd / path.relative_to(MIGRATIONS)).write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "MIGRATIONS", odd)
    Database(url).close()


# -- transactions ---


def test_sqlite_is_durable_concurrent_checked_and_overwrites_what_it_deletes(url):
    database = Database(url)
    with database.sql.connect() as connection:
        pragmas = ("journal_mode", "foreign_keys", "secure_delete", "busy_timeout", "synchronous")
        found = {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in pragmas}
    assert found == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "secure_delete": 1,
        "busy_timeout": 120000,
        "synchronous": 2,
    }
    database.close()


def topic(name):
    return TopicRow(id=name, label=name, centroid=b"", size=1, created_utc=0.0)


def test_failed_transaction_is_rolled_back_and_sql_errors_are_ours(url):
    database = Database(url)
    with pytest.raises(ZeroDivisionError), database.writing() as session:
        session.add(topic("a"))
        session.flush()
        _ = 1 / 0
    with database.reading() as session:
        assert session.get(TopicRow, "a") is None
    twice = pytest.raises(StoreError, match=r"cannot write the database sqlite:.*UNIQUE constraint failed")
    with twice as raised, database.writing() as session:
        session.add(topic("a"))
        session.flush()
        session.execute(text("INSERT INTO topics SELECT * FROM topics"))
    assert raised.value.__cause__ is not None
    with pytest.raises(StoreError, match="cannot read the database"), database.reading() as session:
        session.execute(text("SELECT * FROM nothing"))
    database.close()


def test_reader_sees_what_was_committed_while_a_writer_writes(url):
    database = Database(url)
    with database.writing() as writer:
        writer.add(topic("a"))
        writer.flush()
        with database.reading() as reader:
            assert reader.get(TopicRow, "a") is None
    with database.reading() as reader:
        assert reader.get(TopicRow, "a") is not None
    database.close()


def test_second_writer_waits_from_its_first_statement_on(url, monkeypatch):
    monkeypatch.setattr(module, "PRAGMAS", ("journal_mode=WAL", "busy_timeout=20"))
    database = Database(url)
    with database.writing() as first:
        first.get(TopicRow, "a")
        with pytest.raises(StoreError, match="database is locked"), database.writing() as second:
            second.get(TopicRow, "a")
    database.close()


def test_nights_of_before_they_had_numbers_keep_their_order_their_verdicts_and_what_they_put_into_service(url):
    rows = {
        "INSERT INTO snapshots (id, rows, excluded, created_utc) VALUES ('s', '[]', '[{\"reason\": \"odd\"}]', 1)",
        "INSERT INTO adapters (id, base_id, snapshot_id, phase, folder, details, created_utc)"
        " VALUES ('a', 'base', 's', 'sft', 'a', '{}', 1)",
        "INSERT INTO verdicts (candidate_id, snapshot_id, accepted, measures, reasons, created_utc) VALUES"
        " ('a', 's', false, '[]', '[]', 2), ('a', 's', true, '[]', '[]', 5)",
        "INSERT INTO deployments (adapter_id, reason, created_utc) VALUES ('a', 'promoted', 5.5)",
        "INSERT INTO cycles (id, started_utc, finished_utc, snapshot_id, candidate_id) VALUES"
        " ('z', 1, 3, 's', 'a'), ('b', 4, NULL, 's', 'a'), ('c', 7, 8, NULL, NULL)",
    }
    added = ("number", "verdict_id", "deployment_id", "excluded", "trained")
    new = [*(("cycles", column) for column in added), ("snapshots", "reader_ids")]
    database = Database(url)
    with database.sql.begin() as connection:
        for statement in sorted(
            rows, key=lambda s: "snapshots adapters verdicts deployments cycles".index(s.split()[2])
        ):
            connection.execute(text(statement))
        for table, column in new:
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text(f"UPDATE {VERSIONS} SET version_num = '0009'"))
    database.close()
    database = Database(url)
    with database.sql.connect() as connection:
        found = connection.execute(text("SELECT id, verdict_id, deployment_id, excluded FROM cycles ORDER BY number"))
        assert found.all() == [
            ("z", 1, None, '[{"reason": "odd"}]'),
            ("b", 2, 1, '[{"reason": "odd"}]'),
            ("c", None, None, None),
        ]
    database.close()
