from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from threading import Thread
from time import sleep

import pytest
from nightschool.errors import StoreError
from nightschool.memory.erasing import size_of
from nightschool.memory.store import MemoryStore
from nightschool.memory.vectors import VectorIndex


def said(store, words, session="s"):
    return store.record([{"role": "user", "content": words}], "ok", user_id="ann", session_id=session)


def recalled(store, query="zebra"):
    """A vector differs in its last figures by what it is embedded beside, in bfloat16 from the third on."""
    found = store.recall(query, user_id="ann", threshold=0, limit=99)
    return [(r.memory.id, pytest.approx(r.score, abs=5e-3)) for r in found]


def opened(settings, embedder):
    return MemoryStore(settings, embedder=embedder)


def test_who_opens_the_index_may_wait_for_the_writers_while_another_indexes(quick_store):
    said(quick_store, "zebra")
    indexing = quick_store._indexing
    with quick_store.database.writing() as session:
        indexing._mark(session, [r.memory.id for r in quick_store.recall("zebra", user_id="ann")], indexed=False)
    waiting = indexing._waiting()
    with indexing._lock:
        indexing._index = None  # as after another process made it anew
        thread = Thread(target=indexing._add, args=(waiting, {}))
        thread.start()
        sleep(0.3)  # it is at the lock by then
        indexing.pending()  # which needs the writers' transaction
    thread.join(10)
    assert not thread.is_alive() and quick_store.verify() == []


@pytest.mark.parametrize("fault", ["add", "delete"])
def test_what_could_not_be_indexed_is_kept_and_indexed_later(quick_store, monkeypatch, caplog, fault):
    said(quick_store, "one")

    def fail(*_):
        raise StoreError("no space left")

    monkeypatch.setattr(VectorIndex, fault, fail)
    said(quick_store, "I like zebras.")  # it is kept, so whoever tried again would double it
    assert "no space left" in caplog.text
    monkeypatch.undo()
    assert [i.text for i in quick_store.interactions()] == ["one", "I like zebras."]
    for kind, text in (("turn", "I like zebras.\nok"), ("preference", "I like zebras.")):
        assert text in [r.memory.text for r in quick_store.recall("zebras", user_id="ann", kind=kind, threshold=0.0)]
    assert quick_store.verify() == []


def test_what_is_said_first_is_kept_like_the_rest_where_the_index_cannot_be_written(
    settings, hash_embedder, monkeypatch, caplog
):
    def fail(*_):
        raise StoreError("Permission denied")

    with opened(settings, hash_embedder) as store:
        said(store, "one zebra")
        monkeypatch.setattr(VectorIndex, "add", fail)
        said(store, "two zebras")
    with opened(settings, hash_embedder) as store:
        for words in ("three zebras", "four zebras"):
            said(store, words)
        assert len(list(store.interactions())) == 4 and "Permission denied" in caplog.text
        with pytest.raises(StoreError, match="Permission denied"):
            recalled(store)


def test_index_outside_of_the_home_is_for_its_owner_alone(settings, hash_embedder, tmp_path):
    folder = tmp_path / "elsewhere" / "index"
    memory = replace(settings.memory, index_url=str(folder))
    with opened(replace(settings, memory=memory), hash_embedder) as store:
        said(store, "one zebra")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_store_that_was_opened_before_a_fork_says_so_in_the_child(tmp_path):
    script = tmp_path / "fork.py"
    script.write_text(
        f"""
import os, sys; sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from pathlib import Path
from conftest import HashEmbedder
from nightschool.errors import StoreError
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
store = MemoryStore(Settings(home=Path({str(tmp_path)!r})), embedder=HashEmbedder())
store.remember("a zebra", user_id="ann")
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
said = [dict(role="user", content="b")]
uses = [lambda: store.recall("zebra", user_id="ann"), lambda: store.remember("b", user_id="ann"), store.counts]
for use in [*uses, lambda: store.record(said, "c", user_id="ann", session_id="s"), store.close]:
    try:
        use()
        wrong = use != store.close
    except StoreError as error:
        wrong = "open the home after the fork" not in str(error)
    if wrong:
        os._exit(9)
os._exit(0)
"""
    )
    assert subprocess.run([sys.executable, script], timeout=120, stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("moment", ["before the index", "after the index"])
def test_process_that_dies_between_sql_and_index_loses_nothing_and_doubles_nothing(
    settings, hash_embedder, tmp_path, moment
):
    patched = "VectorIndex.add" if moment == "before the index" else "Indexing._mark"
    module = "vectors" if moment == "before the index" else "indexing"
    script = tmp_path / "die.py"
    script.write_text(
        f"""
import os, sys; sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from pathlib import Path
from conftest import HashEmbedder
from nightschool.memory.{module} import {patched.split(".")[0]}
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
store = MemoryStore(Settings(home=Path({str(tmp_path)!r})), embedder=HashEmbedder())
{patched} = lambda *_, **__: os._exit(9)
store.record([{{"role": "user", "content": "the zebra"}}], "ok", user_id="ann", session_id="s")
"""
    )
    assert subprocess.run([sys.executable, str(script)]).returncode == 9
    with opened(settings, hash_embedder) as store:
        assert len(recalled(store)) == 1
        assert store.verify() == []
        assert store._indexing.index.ids() == [memory_id for memory_id, _ in recalled(store)]


def test_deleted_index_folder_is_made_again_from_sql(settings, hash_embedder):
    with opened(settings, hash_embedder) as store:
        said(store, "the zebra")
        store.remember("a zebra", user_id="ann", shared=True)
        before = recalled(store)
    shutil.rmtree(settings.home / "index")
    with opened(settings, hash_embedder) as store:
        assert recalled(store) == before
        assert store.verify() == []


def test_index_that_lost_doubled_and_kept_rows_is_brought_in_step_when_opened(
    settings, hash_embedder, bytes_in_home, add_to_index
):
    with opened(settings, hash_embedder) as store:
        ids = [store.remember(f"zebra {n}", user_id="ann").id for n in range(3)]
        gone = store.remember("kq7zv9x1w4", user_id="ann").id
        index = store._indexing.index
        vectors = index.vectors([*ids, gone])
        store.forget_apply(store.forget(memory_ids=[gone]))
        index.delete(ids[:1])
        memories = store.memories(ids)
        add_to_index(store, memories[ids[1]], vectors[ids[1]])
        stale = memories[ids[1]].__class__(gone, "ann", "", "", "note", "kq7zv9x1w4", 0.0)
        add_to_index(store, stale, vectors[gone])
        index.delete([])
        add_to_index(store, stale, vectors[gone])
    with opened(settings, hash_embedder) as store:
        assert {memory_id for memory_id, _ in recalled(store)} == set(ids)
        assert sorted(store._indexing.index.ids()) == sorted(ids)
        assert store.verify() == []
    assert bytes_in_home(vectors[gone].tobytes()) == []


def test_rebuilt_index_gives_the_same_recalls_vectors_and_topics(store, clock):
    made = [said(store, words, session=words[-1]) for words in ("where is the zebra", "where is a zebra", "tea please")]
    store.record([{"role": "tool", "content": "x"}], "done", user_id="ann", session_id="z")
    store.remember("zebras have stripes", user_id="ann")
    before = recalled(store, "zebra stripes")
    topics = store.topics(clock.now)
    vectors = store.request_vectors([i.id for i in made])
    assert store.rebuild_index() == 5
    assert recalled(store, "zebra stripes") == before
    assert store.topics(clock.now) == topics
    assert store.request_vectors([i.id for i in made]).keys() == vectors.keys()
    assert store.verify() == []
    assert said(store, "where is the zebra", session="new").topic_id == made[0].topic_id


@pytest.mark.parametrize("change", [{"dimension": 32}, {"name": "other"}])
def test_changed_embedder_is_refused_before_anything_is_written_and_rebuilding_helps(
    settings, hash_embedder, make_embedder, change
):
    with opened(settings, hash_embedder) as store:
        made = said(store, "the zebra")
    with opened(settings, make_embedder(**change)) as store:
        refused = (
            lambda: said(store, "two"),
            lambda: store.recall("zebra", user_id="ann"),
            lambda: store.forget_apply(store.forget(user_id="ann")),
        )
        for attempt in refused:
            with pytest.raises(StoreError, match="run `nightschool memory rebuild`"):
                attempt()
        assert [finding for finding in store.verify() if "nightschool memory rebuild" in finding]
        assert store.counts()["interactions"] == 1
        assert store.rebuild_index() == 1
        assert store.recall("zebra", user_id="ann")[0].memory.source_ids == (made.id,)
        assert said(store, "the zebra", session="t").topic_id == made.topic_id
        assert store.verify() == []


def test_topics_of_another_embedder_are_refused_too(settings, hash_embedder, make_embedder):
    with opened(settings, hash_embedder) as store:
        said(store, "the zebra")
    shutil.rmtree(settings.home / "index")
    with opened(settings, make_embedder(32)) as store:
        with pytest.raises(StoreError, match="made of vectors of 64 numbers, the embedder makes 32; run `nightschool"):
            said(store, "two")
        store.rebuild_index()
        said(store, "two")
        assert store.verify() == []


def test_rebuilding_that_was_interrupted_says_so_and_goes_on_where_it_stopped(
    settings, hash_embedder, make_embedder, monkeypatch
):
    monkeypatch.setattr("nightschool.memory.indexing.IDS_A_QUERY", 2)
    with opened(settings, hash_embedder) as store:
        for n in range(5):
            said(store, f"zebra {n}")
        owner = next(store.interactions())
    other, told = make_embedder(32, "other"), []

    def interrupted(done: int) -> None:
        told.append(done)
        if done >= 4:
            raise KeyboardInterrupt

    with opened(settings, other) as store, pytest.raises(KeyboardInterrupt):
        store.rebuild_index(interrupted)
    with opened(settings, make_embedder(32, "other")) as store:
        with pytest.raises(StoreError, match="or that was interrupted; run `nightschool memory rebuild`"):
            store.recall("zebra", user_id="ann")
        with pytest.raises(StoreError, match="made of vectors of 64 numbers, the embedder makes 32"):
            said(store, "lost?")
        store.embedder.embedded.clear()
        assert any("interrupted" in line for line in store.verify())
        assert store.rebuild_index() == 1
        assert sorted(store.embedder.embedded)[0] == "ok" and len(store.embedder.embedded) == 2
        assert store.verify() == []
        assert len(recalled(store)) == 5
        assert said(store, "zebra 0", session="t").topic_id == owner.topic_id
    assert told == [2, 4]


def test_what_is_written_before_an_interrupted_rebuilding_goes_on_waits_to_be_indexed(
    settings, hash_embedder, monkeypatch, caplog
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with opened(settings, hash_embedder) as store:
        said(store, "zebra 0")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("nightschool.memory.indexing.Indexing.pending", interrupted)
            store.rebuild_index()
    with opened(settings, hash_embedder) as fresh:
        fresh.record([{"role": "user", "content": "zebra 1"}], "", user_id="ann", session_id="t")
        said(fresh, "zebra 2", session="t")  # in the place of the one before
        fresh.remember("zebra 3", user_id="ann")
        assert "kept, and to be indexed later" in caplog.text
        with pytest.raises(StoreError, match="the index is being made anew, or that was interrupted"):
            fresh.recall("zebra", user_id="ann")
        assert fresh.rebuild_index() == 3
        assert len(recalled(fresh)) == 3 and fresh.verify() == []


def test_while_another_process_makes_the_index_anew_nobody_else_does(settings, hash_embedder, make_embedder):
    with opened(settings, hash_embedder) as store, opened(settings, make_embedder()) as other:
        said(store, "zebra 0")
        assert len(recalled(other)) == 1
        told = []

        def meanwhile(done: int) -> None:
            with pytest.raises(StoreError, match="the index is being made anew"):
                other.recall("zebra", user_id="ann")
            told.append((said(other, "zebra 1").text, other.remember("zebra 2", user_id="ann").text))

        before = len(other.embedder.embedded)
        store.rebuild_index(lambda done: meanwhile(done) if not told else None)
        assert told and len(other.embedder.embedded) - before < 5
        assert len(recalled(other)) == 3 and other.verify() == []


def test_index_of_another_store_is_left_alone(settings, hash_embedder, tmp_path):
    shared = replace(settings.memory, index_url=str(tmp_path / "index"))
    settings = replace(settings, memory=shared)
    with opened(settings, hash_embedder) as store:
        said(store, "zebra 0")
    with opened(replace(settings, home=tmp_path / "another", memory=shared), hash_embedder) as other:
        for attempt in (
            lambda: said(other, "zebra"),
            lambda: other.remember("zebra", user_id="ann"),
            lambda: other.recall("zebra", user_id="ann"),
            other.rebuild_index,
        ):
            with pytest.raises(StoreError, match=r"is of another memory; give this one its own memory\.index_url"):
                attempt()
        assert set(other.counts().values()) == {0}
    with opened(settings, hash_embedder) as store:
        assert store.verify() == [] and len(recalled(store)) == 1


def unnamed(index):
    """The same index, as it was before indexes bore the name of their store."""
    table = index._open()
    kept = table.schema.metadata | {b"store": b""}
    index._connect().create_table("memories", table.to_arrow().replace_schema_metadata(kept), mode="overwrite")


@pytest.mark.parametrize("old", [False, True])
def test_index_in_the_home_is_not_emptied_by_another_database(settings, hash_embedder, tmp_path, old):
    with opened(settings, hash_embedder) as store:
        said(store, "zebra 0")
        if old:
            unnamed(store._indexing.index)
    another = replace(settings.memory, database_url=f"sqlite:///{tmp_path}/another.db")
    with opened(replace(settings, memory=another), hash_embedder) as other:
        (found,) = other.verify()
        assert "is of another memory" in found
    with opened(settings, hash_embedder) as store:
        assert len(store._indexing.index.ids()) == 1 and store.verify() == [] and len(recalled(store)) == 1
        assert store._indexing.index.name()
        said(store, "zebra 1", session="t")
        assert len(recalled(store)) == 2


def test_backup_from_before_stores_had_names_goes_on_with_its_index(settings, hash_embedder):
    with opened(settings, hash_embedder) as store:
        said(store, "zebra 0")
        with store.sql.begin() as connection:
            connection.exec_driver_sql("DELETE FROM store_state WHERE name = 'store'")
    with opened(settings, hash_embedder) as store:
        assert store.verify() == [] and len(recalled(store)) == 1


def test_rebuilding_that_another_embedder_interrupted_begins_anew(settings, hash_embedder, make_embedder, monkeypatch):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with opened(settings, hash_embedder) as store:
        said(store, "zebra")
    with opened(settings, make_embedder(32, "other")) as store:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("nightschool.memory.vectors.VectorIndex.drop", interrupted)
            store.rebuild_index()
        assert store.rebuild_index() == 1  # the table of the embedder before is still there
    with opened(settings, hash_embedder) as store:
        assert store.rebuild_index() == 1
        assert store.verify() == []


def test_two_processes_that_index_the_same_memory_index_it_once(settings, hash_embedder):
    with opened(settings, hash_embedder) as one, opened(settings, hash_embedder) as two:
        said(one, "warm up")
        said(two, "warm up", session="t")
        written = one._indexing.written
        one._indexing.written = lambda *given: (two._indexing.pending(), written(*given))
        said(one, "zebra")
        assert sorted(set(one._indexing.index.ids())) == sorted(one._indexing.index.ids())
        assert one.verify() == []


def test_opening_a_store_loads_neither_torch_nor_lancedb(tmp_path):
    code = f"""
import sys
from dataclasses import replace
from pathlib import Path
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
with MemoryStore(Settings(home=Path({str(tmp_path)!r}))) as store:
    store.counts(), store.feedback(), list(store.interactions()), store.topics(0.0)
print(sorted({{"torch", "lancedb", "pyarrow", "sentence_transformers"}} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_index_that_cannot_be_brought_in_step_is_tried_again_by_the_next_call(settings, hash_embedder, monkeypatch):
    with MemoryStore(settings, embedder=hash_embedder) as store:
        store.remember("a zebra", user_id="ann")
    with MemoryStore(settings, embedder=hash_embedder) as store:
        with monkeypatch.context() as broken, pytest.raises(StoreError, match="no room"):
            broken.setattr(store._indexing, "reconcile", lambda: (_ for _ in ()).throw(StoreError("no room")))
            store.recall("zebra", user_id="ann")
        assert [r.memory.text for r in store.recall("a zebra", user_id="ann")] == ["a zebra"]


@pytest.mark.parametrize("kept", [0, 40])
def test_index_whose_newest_version_is_torn_is_made_anew(settings, hash_embedder, tmp_path, kept):
    with opened(settings, hash_embedder) as store:
        said(store, "one zebra")
        (newest, *_) = sorted((settings.home / "index").rglob("*.manifest"))  # versions count down in names
        newest.write_bytes(newest.read_bytes()[:kept])
    with opened(settings, hash_embedder) as store:
        with pytest.raises(StoreError, match="nightschool memory rebuild"):
            recalled(store)
        assert store.rebuild_index() == 1 and len(recalled(store)) == 1
        assert store.verify() == []


def test_disk_that_is_full_is_told_with_what_may_be_full(quick_store):
    said(quick_store, "one zebra")
    told = pytest.raises(StoreError, match=r"database or disk is full; .* SQLITE_TMPDIR")
    with told, quick_store.database.writing() as session:
        session.connection().exec_driver_sql("PRAGMA max_page_count = 1")
        session.connection().exec_driver_sql("CREATE TABLE more AS SELECT randomblob(1000000)")


def test_home_whose_database_has_its_index_elsewhere_by_now_is_refused_until_it_shares_that(
    settings, hash_embedder, tmp_path
):
    memory = replace(settings.memory, database_url=f"sqlite:///{tmp_path}/shared.db")
    ours, theirs = (replace(settings, home=tmp_path / name, memory=memory) for name in ("ours", "theirs"))
    with opened(ours, hash_embedder) as first:
        said(first, "one zebra")
        with opened(theirs, hash_embedder) as second:
            assert len(recalled(second)) == 1
        with pytest.raises(StoreError, match="homes of one database share one index"):
            recalled(first)
    with opened(ours, hash_embedder) as again, pytest.raises(StoreError, match="homes of one database"):
        said(again, "two zebras")
    shared = replace(memory, index_url=theirs.index_url)
    with opened(replace(ours, memory=shared), hash_embedder) as joined, opened(theirs, hash_embedder) as second:
        said(joined, "three zebras")
        assert len(recalled(joined)) == len(recalled(second)) == 2
        assert joined.verify() == second.verify() == []


def test_index_that_could_not_be_made_anew_is_made_by_whoever_comes_next(settings, hash_embedder, monkeypatch):
    with opened(settings, hash_embedder) as store:
        said(store, "one zebra")
    shutil.rmtree(settings.home / "index")

    def full(*_):
        raise OSError(28, "No space left on device")

    with opened(settings, hash_embedder) as store:
        with monkeypatch.context() as patched:
            patched.setattr(VectorIndex, "_make_indexes", full)
            with pytest.raises(StoreError, match="No space left"):
                recalled(store)
        assert len(recalled(store)) == 1 and store.verify() == []
    with opened(settings, hash_embedder) as store:
        assert len(recalled(store)) == 1


def test_process_goes_on_with_an_index_that_another_made_anew(settings, hash_embedder):
    with opened(settings, hash_embedder) as running:
        said(running, "one zebra")
        shutil.rmtree(settings.home / "index")
        with opened(settings, hash_embedder) as other:
            assert len(recalled(other)) == 1
        said(running, "two zebras")
        assert len(recalled(running)) == 2 and running.verify() == []
        with opened(settings, hash_embedder) as other:
            assert other.rebuild_index() == 2
        assert len(recalled(running)) == 2 and running.verify() == []


def test_index_of_another_home_that_bears_the_same_name_is_refused_once_one_is_rebuilt(
    settings, hash_embedder, tmp_path
):
    memory = replace(settings.memory, database_url=f"sqlite:///{tmp_path}/shared.db")
    ours, theirs = (replace(settings, home=tmp_path / name, memory=memory) for name in ("ours", "theirs"))
    with opened(ours, hash_embedder) as first:
        said(first, "one zebra")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    with opened(theirs, hash_embedder) as second:
        assert len(recalled(second)) == 1
        with opened(ours, hash_embedder) as first:
            first.rebuild_index()
        with pytest.raises(StoreError, match="homes of one database share one index"):
            recalled(second)


def test_index_that_another_process_made_first_keeps_its_name(settings, hash_embedder):
    with opened(settings, hash_embedder) as store:
        said(store, "one zebra")
        named = store._indexing.index.name()
        store._indexing._replace(lambda name: VectorIndex(settings.index_url, 64, "hash", name))
        assert store._indexing.index.name() == named and len(recalled(store)) == 1


def test_index_in_working_memory_is_made_by_each_that_opens_it_and_refuses_none(settings, hash_embedder):
    volatile = replace(settings, memory=replace(settings.memory, index_url="memory://"))
    with opened(volatile, hash_embedder) as first:
        said(first, "one zebra")
        with opened(volatile, hash_embedder) as second:
            assert len(recalled(second)) == len(recalled(first)) == 1


def test_size_is_of_all_files_and_none_where_there_is_nothing(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path in (tmp_path / "one", tmp_path / "a" / "b" / "two"):
        path.write_bytes(b"12345")
    assert (size_of(tmp_path), size_of(tmp_path / "one"), size_of(tmp_path / "none")) == (10, 5, 0)
