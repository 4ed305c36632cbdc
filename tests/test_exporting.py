"""An export holds every fact, any tool reads it, and an empty home that takes it in gives the same answers."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
from nightschool.errors import InputError, StoreError
from nightschool.memory.conversations import Owner, interaction_id
from nightschool.memory.formats import conversation_of
from nightschool.memory.importer import import_files
from nightschool.memory.restoring import Restoring, check_head
from nightschool.memory.store import MemoryStore
from nightschool.memory.topic_rows import states
from nightschool.memory.topics import label_of


def said(store, words, reply="ok", user="ann", session="s", role="user", **more):
    return store.record([{"role": role, "content": words}], reply, user_id=user, session_id=session, **more)


def erase(store, **selection):
    return store.forget_apply(store.forget(**selection))


@pytest.fixture
def told(quick_store):
    """A store with something of everything, and a hole where something was forgotten."""
    first = said(quick_store, "the zebra runs")
    quick_store.rate(first.id, rating=1, comment="“good” \u202eright to left\u202c", event="copied")
    quick_store.rate(first.id, correction="a horse\u200b")
    said(quick_store, "result", "done", role="tool", adapter_id="b2:gone", memory_ids=["b2:x"])
    gone = said(quick_store, "forget me 8842")
    said(quick_store, "the lion sleeps", user="bob", session="t", created_utc=-1e18)
    quick_store.remember("a zebra is striped", user_id="ann", source_ids=[first.id])
    quick_store.remember("a lion is not", user_id="bob", shared=True)
    erase(quick_store, interaction_ids=[gone.id])
    return quick_store


@pytest.fixture
def other(settings, tmp_path, hash_embedder):
    with MemoryStore(replace(settings, home=tmp_path / "other"), embedder=hash_embedder) as opened:
        yield opened


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def rewritten(path, change):
    """The export with `change` applied to each of its records; None leaves one out, text stands as it is."""
    changed = [change(record) for record in lines_of(path)]
    kept = (record if isinstance(record, str) else json.dumps(record) for record in changed if record is not None)
    path.write_text("".join(record + "\n" for record in kept))
    return path


def test_export_that_fails_leaves_nothing_of_what_was_said(told, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(StoreError, match=r"facts\.jsonl cannot be written: no space left"):
        told.export(tmp_path / "out" / "facts.jsonl")
    assert not list((tmp_path / "out").iterdir())


def recalled(store, *users):
    return [store.recall(query, user_id=u, threshold=0) for u in users for query in ("zebra", "lion sleeps")]


def facts(store):
    return store.counts(), list(store.interactions()), store.feedback(), recalled(store, "ann", "bob"), store.topics(0)


def test_empty_home_that_takes_an_export_in_gives_the_same_facts_and_answers(told, other):
    path, lines = told.export()
    report = other.restore(path)
    assert (report.errors, report.forgotten) == ({}, 0)
    assert report.new["interaction"] == lines["interaction"] == 3
    assert facts(other) == facts(told)
    assert other.verify() == []
    again, _ = other.export()
    assert lines_of(again)[1:] == lines_of(path)[1:]
    assert said(other, "the zebra runs", session="u").topic_id == next(told.interactions()).topic_id


def without_null_events(record):
    return {name: value for name, value in record.items() if (name, value) != ("event", None)}


def test_feedback_without_the_field_of_events_goes_in_as_before_there_were_any(told, other):
    path = rewritten(told.export()[0], without_null_events)
    assert sorted("event" in r for r in lines_of(path) if r["type"] == "feedback") == [False, True]
    assert other.restore(path).errors == {}
    assert facts(other) == facts(told)


def test_taking_it_in_twice_changes_nothing(told, other):
    path, _ = told.export()
    other.restore(path)
    before = facts(other)
    report = other.restore(path)
    assert (report.errors, report.new["interaction"], report.known["interaction"]) == ({}, 0, 3)
    assert facts(other) == before


def test_note_that_is_known_takes_the_sources_of_a_later_export(told, other):
    other.restore(told.export()[0])
    later = said(told, "zebras again", session="u")
    note = told.remember("a zebra is striped", user_id="ann", source_ids=[later.id])
    other.restore(told.export()[0])
    assert other.memories([note.id])[note.id].source_ids == note.source_ids
    assert len(note.source_ids) == 2
    assert note.id in other.forget(interaction_ids=[later.id]).memory_ids


def test_thumb_that_was_given_again_is_the_last_word_in_a_copy_too(told, other, clock):
    asked = said(told, "zebras?", session="u")
    for rating in (1, -1):
        clock.now += 1
        told.rate(asked.id, rating=rating)
    other.restore(told.export()[0])
    clock.now += 1
    told.rate(asked.id, rating=1)
    for _ in range(2):
        other.restore(told.export()[0])
        assert other.feedback()[asked.id] == told.feedback()[asked.id]
    assert told.feedback()[asked.id][-1].rating == 1 and other.verify() == []


def test_note_may_not_name_the_turn_of_another_user_as_its_source(told, other):
    path, _ = told.export()
    (bobs,) = (i.id for i in told.interactions() if i.user_id == "bob")

    def change(record):
        return record | {"source_ids": [bobs]} if record["type"] == "note" and record["user_id"] == "ann" else record

    (error,) = other.restore(rewritten(path, change)).errors.values()
    assert "another user's turn" in str(error)


def test_what_is_forgotten_does_not_come_back_with_an_export(told, other, tmp_path):
    path, _ = told.export(tmp_path / "mine.jsonl")
    other.restore(path)
    for store in (told, other):
        erase(store, user_id="ann")
        report = store.restore(path)
        assert report.errors == {}
        assert report.forgotten == 5  # two turns, two judgements, one note
        assert {i.user_id for i in store.interactions()} == {"bob"}
        assert store.verify() == []
    carried, _ = other.export(tmp_path / "theirs.jsonl")
    assert len([r for r in lines_of(carried) if r["type"] == "tombstone"]) == 4


def test_tombstones_go_with_the_export(told, other, tmp_path):
    before = tmp_path / "before.jsonl"
    told.export(before)
    erase(told, user_id="bob")
    other.restore(told.export(tmp_path / "after.jsonl")[0])
    assert other.restore(before).forgotten == 2
    assert {i.user_id for i in other.interactions()} == {"ann"}


def test_tombstones_of_another_store_are_refused_where_there_are_some_already(told, other):
    erase(other, interaction_ids=[said(other, "mine", user="carl").id])
    report = other.restore(told.export()[0])
    (reason,) = report.errors.values()
    assert "this store has tombstones of its own" in reason
    assert report.new["interaction"] == 3


def test_export_is_for_its_owner_only_and_a_failing_one_leaves_the_last(told, monkeypatch):
    path, _ = told.export()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("nightschool.memory.exporting.os.fsync", full)
    with pytest.raises(StoreError, match="cannot be written: disk full"):
        told.export()
    assert path.read_bytes() == before


def test_export_that_was_cut_off_is_noticed(told, other):
    path, _ = told.export()
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    (reason,) = other.restore(path).errors.values()
    assert reason == "the last line is missing, so the export is not whole"


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_import_that_dies_between_batches_leaves_a_sound_store(told, other, monkeypatch, batch):
    monkeypatch.setattr("nightschool.memory.restoring.ROWS_A_PAGE", 2)
    path, _ = told.export()
    take, taken = Restoring.batch, []

    def dying(*given):
        if len(taken) == batch:
            raise KeyboardInterrupt
        taken.append(take(*given))

    with monkeypatch.context() as patch:
        patch.setattr(Restoring, "batch", dying)
        with pytest.raises(KeyboardInterrupt):
            other.restore(path)
    assert other.verify() == []
    with other.database.reading() as session:
        held = states(session, other.embedder.dimension)
    assert all(topic.size and np.linalg.norm(topic.centroid_sum) > 0 for topic in held)
    assert other.restore(path).errors == {}
    assert facts(other) == facts(told)


@pytest.mark.parametrize("name", ["adapter_id", "topic_id"])
def test_id_that_no_database_can_hold_is_reported(told, other, name):
    for value in ("x" * 65, "a\0b", "a\ud800"):
        path = rewritten(told.export()[0], lambda r, v=value: r | {name: v} if r["type"] == "interaction" else r)
        assert len(other.restore(path).errors) >= 3
        assert other.counts()["interactions"] == 0


def test_export_replaces_nothing_but_an_export(told, tmp_path):
    path, _ = told.export(tmp_path / "mine.jsonl")
    assert told.export(path)[0] == path
    database = told.settings.home / "nightschool.db"
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "empty").write_bytes(b"")
    for there in (database, tmp_path / "link", tmp_path, tmp_path / "empty"):
        with pytest.raises(InputError, match="is there and is no export"):
            told.export(there)
    assert told.verify() == []


def test_interrupted_import_is_taken_up_by_the_next(told, other, monkeypatch):
    monkeypatch.setattr("nightschool.memory.restoring.ROWS_A_PAGE", 3)
    path, _ = told.export()
    with monkeypatch.context() as patch:
        patch.setattr(other._indexing, "written", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.restore(path)
    assert other.restore(path).errors == {}
    assert facts(other) == facts(told)
    assert other.verify() == []


def moved(record, position):
    """The interaction at another position, under the id that it has there."""
    owner = Owner(record["user_id"], record["agent_id"], record["session_id"])
    return record | {"position": position, "id": interaction_id(owner, position, record["turn"], record["reply"])}


BROKEN = {
    "not JSON": lambda r: "x" if r["type"] == "note" else r,
    "not one of nightschool, topic": lambda r: "[1]" if r["type"] == "note" else r,
    "type is not one of": lambda r: r | {"type": "poem"} if r["type"] == "note" else r,
    "interaction: reply is missing or of another type": lambda r: r | {"reply": 7} if r["type"] == "interaction" else r,
    "interaction: position is missing or of another": lambda r: (
        r | {"position": True} if r["type"] == "interaction" else r
    ),
    "its content has the id": lambda r: r | {"reply": "else"} if r["type"] == "interaction" else r,
    "turn: a message is not an object with role and content": lambda r: (
        r | {"turn": ["hi"]} if r["type"] == "interaction" else r
    ),
    "its topic t:.* is not in the store": lambda r: None if r["type"] == "topic" else r,
    "created_utc is not a finite number": lambda r: (
        r | {"created_utc": float("nan")} if r["type"] == "interaction" else r
    ),
    "position is -1, not a number that a session can have": lambda r: (
        moved(r, -1) if r["type"] == "interaction" and r["reply"] == "done" else r
    ),
    "user_id is empty": lambda r: r | {"user_id": ""} if r["type"] == "note" else r,
    "rating is .*, not a number": lambda r: r | {"rating": float("nan")} if r["type"] == "feedback" else r,
    "event is 'seen'; give one of copied": lambda r: r | {"event": "seen"} if r["type"] == "feedback" else r,
    "feedback .*: its interaction .* is not in the store": lambda r: None if r["type"] == "interaction" else r,
    "note .*: its source .* is not in the store": lambda r: None if r["type"] == "interaction" else r,
    "the first line, and no other, is the head": lambda r: (
        r | {"type": "nightschool", "version": 1, "salt": ""} if r["type"] == "note" else r
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_line_is_named_and_the_others_go_in(told, other, reason):
    import re

    path, _ = told.export()
    total = len(lines_of(path))
    report = other.restore(rewritten(path, BROKEN[reason]))
    assert any(re.search(reason, found) for found in report.errors.values()), report.errors
    assert all(1 <= number <= total for number in report.errors)
    assert report.new.total() > 0
    assert other.verify() == []


HEADS = {
    "version is 2; this nightschool reads exports of version 1": lambda r: r | {"version": 2},
    "salt is not 16 to 64 bytes in hexadecimal": lambda r: r | {"salt": "z" * 32},
    "salt is not 16 to 64 bytes": lambda r: r | {"salt": "00" * 65},
    "nightschool: salt is missing or of another type": lambda r: {"type": "nightschool", "version": 1},
    "the first line, and no other, is the head of an export": lambda _: None,
    "not JSON": lambda _: "PK\x03\x04",
}


@pytest.mark.parametrize("reason", HEADS)
def test_first_line_that_is_no_head_stops_the_import_before_anything_is_written(told, other, reason):
    path = rewritten(told.export()[0], lambda r: HEADS[reason](r) if r["type"] == "nightschool" else r)
    with pytest.raises(InputError, match=rf"^{path.name}:1: {reason}.*; nothing was imported$"):
        other.restore(path)
    assert set(other.counts().values()) == {0}
    path.unlink()
    told.export(path)
    assert other.restore(path).errors == {}
    assert facts(other) == facts(told)


def test_line_that_contradicts_what_is_held_is_refused(told, other):
    said(other, "something else")
    report = other.restore(told.export()[0])
    assert "its session has something else at position 0" in "".join(report.errors.values())
    assert other.verify() == []


def test_importer_of_conversations_names_the_command_for_an_export():
    with pytest.raises(InputError, match="run `nightschool memory import`"):
        conversation_of({"type": "nightschool", "version": 1}, 0.0)


def test_compacting_gives_space_back_and_changes_no_answer(told):
    before = facts(told)
    for n in range(30):
        told.remember(f"note {n} " + "x" * 20_000, user_id="carl")
    told._indexing.pending()
    told.forget(user_id="carl")
    with told.database.writing() as session:
        from nightschool.memory.tables import MemoryRow
        from sqlalchemy import delete

        session.execute(delete(MemoryRow).where(MemoryRow.user_id == "carl"))
    large, small = told.compact()
    assert small < large / 2
    assert facts(told) == before


def test_topic_takes_its_name_from_what_is_left_of_it(other, settings, tmp_path, embedder):
    first, second = ((replace(settings, home=tmp_path / name)) for name in ("first", "second"))
    with MemoryStore(first, embedder=embedder) as one, MemoryStore(second, embedder=embedder) as two:
        founder = said(one, "When do you open the shop on Monday?")
        said(one, "When do you open the shop on Monday, please?", session="t")
        path, _ = one.export()
        two.restore(path)
        assert one.interaction(founder.id).topic_id and len(two.topics(0)) == 1
        erase(two, session_id="s")
        erase(two, session_id="t")
        two.restore(path)  # both were forgotten here
        assert not two.topics(0)
    with MemoryStore(replace(settings, home=tmp_path / "third"), embedder=embedder) as three:
        erase_only = said(three, "When do you open the shop on Monday?")
        erase(three, interaction_ids=[erase_only.id])
        three.restore(path)
        (topic,) = three.topics(0)
        assert topic.label == label_of("When do you open the shop on Monday, please?") and three.verify() == []


def test_two_exports_to_one_path_at_once_leave_a_whole_one(told, tmp_path, monkeypatch):
    path, replace_, inside = tmp_path / "backup.jsonl", os.replace, []

    def slowly(partial, whole):
        if not inside:
            inside.append(partial)
            told.export(path)
        replace_(partial, whole)

    monkeypatch.setattr(os, "replace", slowly)
    told.export(path)
    assert inside and lines_of(path)[-1]["type"] == "end" and not list(tmp_path.glob("*.partial"))


def test_export_that_is_erased_while_it_is_written_says_so(told, tmp_path, monkeypatch):
    replace_ = os.replace

    def erased(partial, whole):
        partial.unlink()
        replace_(partial, whole)

    monkeypatch.setattr(os, "replace", erased)
    with pytest.raises(StoreError, match="forgotten meanwhile, and the export with it"):
        told.export(tmp_path / "backup.jsonl")


def test_what_a_killed_export_left_is_removed_by_the_next_and_nothing_else(told, tmp_path):
    names = {"left": "b.jsonl.abcd1234.partial", "new": "b.jsonl.abcd1235.partial", "other": "b.jsonl.zip.partial"}
    paths = {what: tmp_path / name for what, name in names.items()}
    for what, path in paths.items():
        path.write_text("{}")
        if what != "new":
            os.utime(path, (0, 0))
    (tmp_path / "b.jsonl.abcd1236.partial").symlink_to(tmp_path / "nowhere")
    told.export(tmp_path / "b.jsonl")
    assert [what for what, path in paths.items() if path.exists()] == ["new", "other"]


def test_later_export_brings_the_answer_to_what_was_open_and_an_older_one_takes_nothing(quick_store, other, tmp_path):
    said(quick_store, "My name is Ada. Where is Rome?", "")
    older, _ = quick_store.export(tmp_path / "older.jsonl")
    answered = said(quick_store, "please", "In Italy.")
    quick_store.rate(answered.id, rating=1)
    later, _ = quick_store.export(tmp_path / "later.jsonl")
    other.restore(older)
    restored = other.restore(later)
    assert (restored.errors, restored.new["interaction"], restored.new["feedback"]) == ({}, 1, 1)
    assert facts(other) == facts(quick_store)
    restored = other.restore(older)
    assert (restored.errors, restored.known["interaction"]) == ({}, 1)
    assert facts(other) == facts(quick_store)
    assert other.verify() == []
    assert other.recall("Rome", user_id="ann", threshold=0)[0].memory.text.endswith("In Italy.")


def test_later_export_brings_the_answer_to_a_turn_that_had_its_topic_to_itself(quick_store, other, tmp_path):
    chat = {"session_id": "s", "messages": [{"role": "user", "content": "do you repair wheels"}]}
    whole = chat | {"messages": [*chat["messages"], {"role": "assistant", "content": "in two days"}]}
    for name, conversation in (("older", chat), ("later", whole)):
        (tmp_path / "chat.jsonl").write_text(json.dumps(conversation))
        import_files(quick_store, tmp_path / "chat.jsonl", now=1.0)
        other.restore(quick_store.export(tmp_path / f"{name}.jsonl")[0])
    assert facts(other) == facts(quick_store)
    assert (len(other.topics(0)), other.verify()) == (1, [])


def test_older_export_knows_a_note_of_a_turn_that_was_answered_since(quick_store, other, tmp_path):
    asked = said(quick_store, "Where is Rome?", "")
    quick_store.remember("Rome is far.", user_id="ann", source_ids=[asked.id])
    older, _ = quick_store.export(tmp_path / "older.jsonl")
    answered = said(quick_store, "please", "In Italy.")
    restored = quick_store.restore(older)
    assert (restored.errors, restored.known["note"]) == ({}, 1)
    said(other, "Where is Rome?", "")
    said(other, "please", "In Italy.")
    restored = other.restore(older)  # that has the answer and not the note
    assert (restored.errors, restored.new["note"]) == ({}, 1)
    (note,) = other.memories_of("ann", kind="note", limit=9)
    assert note.source_ids == (answered.id,)


@pytest.mark.parametrize("kind", [["object", "null"], {"a": 1}, None, 3])
def test_type_that_is_no_text_is_told_of_that_line(told, other, kind):
    path = rewritten(told.export()[0], lambda record: record | ({"type": kind} if record["type"] == "note" else {}))
    report = other.restore(path)
    assert sum("type is not one of" in error for error in report.errors.values()) == 2
    assert report.new["interaction"] == 3


def test_file_that_cannot_be_read_or_written_is_an_error_of_the_store(told, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        told.export(tmp_path / "file" / "facts.jsonl")
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        told.restore("/proc/self/mem")


def test_open_turn_that_was_rated_is_not_answered_by_an_export(quick_store, other):
    said(quick_store, "Where is Rome?", "In Italy.")
    rated = said(other, "Where is Rome?", "")
    other.rate(rated.id, rating=-1)
    errors = other.restore(quick_store.export()[0]).errors
    assert any("something else at position 0" in error for error in errors.values())
    assert [i.reply for i in other.interactions()] == [""]


def test_odd_id_in_a_line_of_feedback_is_told_of_that_line(told, other):
    def odd(record):
        return record | {"interaction_id": "\ud800"} if record["type"] == "feedback" else record

    report = other.restore(rewritten(told.export()[0], odd))
    assert sum("half of a surrogate pair" in error for error in report.errors.values()) == 2
    assert report.new["interaction"] == 3


def test_open_turn_that_comes_while_an_export_is_read_is_told_of_its_line(quick_store, other, monkeypatch):
    said(quick_store, "Where is Rome?", "")
    path, _ = quick_store.export()
    said(quick_store, "please", "In Italy.")
    later, _ = quick_store.export(path.with_name("later.jsonl"))
    embed = other._vectors

    def interrupted(texts):
        found = embed(texts)
        monkeypatch.undo()
        said(other, "Where is Rome?", "")
        return found

    monkeypatch.setattr(other, "_vectors", interrupted)
    assert any("written meanwhile" in error for error in other.restore(later).errors.values())
    assert other.restore(later).errors == {}
    assert facts(other) == facts(quick_store)


def test_greeting_goes_through_an_export_and_leaves_no_memory(quick_store, other):
    quick_store.record([], "Hello there.", user_id="ann", session_id="s")
    assert other.restore(quick_store.export()[0]).errors == {}
    assert facts(other) == facts(quick_store)
    assert other.counts()["memories"] == 0


def test_of_what_is_no_file_no_head_is_read(tmp_path):
    assert check_head(tmp_path) is None  # as of a pipe, of which what is read is gone


def test_export_is_brought_in_by_the_name_of_its_file(told, tmp_path):
    path, _ = told.export(str(tmp_path / "all.jsonl"))
    assert path == tmp_path / "all.jsonl" and told.restore(str(path)).known["interaction"] == 3
    with pytest.raises(InputError, match=r"no such file: .*none\.jsonl; nothing was imported"):
        told.restore(tmp_path / "none.jsonl")


def test_replaced_note_comes_in_as_replaced_and_one_that_is_held_stays_as_it_is(told, other, tmp_path):
    (old,) = told.memories_of("ann", kind="note", limit=9)
    new = told.remember("a zebra is spotted", user_id="ann", replaces=old.id)
    path, _ = told.export(tmp_path / "all.jsonl")
    other.restore(path)
    notes = other.memories_of("ann", kind="note", limit=9)
    assert notes == told.memories_of("ann", kind="note", limit=9) and [n.id for n in notes] == [new.id, old.id]
    again = other.remember("a zebra is striped", user_id="ann", replaces=new.id)
    other.restore(path)
    assert again.id == old.id and other.memories([old.id])[old.id].valid_to is None
