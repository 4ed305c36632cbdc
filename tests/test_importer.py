from __future__ import annotations

import json
import os

import pytest
from nightschool.errors import InputError
from nightschool.memory import importer
from nightschool.memory.importer import ImportReport, LineError, _Sliding, import_files

NOW = 1_700_000_000.0


def chat(*words, session=None, rating=None, **record):
    messages = [{"role": ("user", "assistant")[n % 2], "content": w} for n, w in enumerate(words)]
    if rating is not None:
        messages[-1]["rating"] = rating
    return {"messages": messages} | ({"session_id": session} if session else {}) | record


def lines(path, *records):
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def brought(store, *paths, **how):
    return import_files(store, paths, now=NOW, **how)


def rows(store):
    return list(store.interactions()), store.feedback(), store.topics(NOW)


def test_every_format_goes_in_and_a_second_time_changes_nothing(quick_store, tmp_path, clock):
    sharegpt = {"conversations": [{"from": "human", "value": "tea?"}, {"from": "gpt", "value": "yes"}]}
    said = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["hello there"]}}
    export = {"id": "c", "mapping": {"a": {"message": said, "parent": None}}, "current_node": "a"}
    files = [
        lines(tmp_path / "chat.jsonl", chat("hi", "hello", "bye", "bye", rating=1), "", sharegpt),
        lines(tmp_path / "array.json", json.dumps([sharegpt, chat("one", "two", user_id="bob")], indent=2)),
        lines(tmp_path / "conversations.json", [export, {"mapping": {}}]),
    ]
    report = brought(quick_store, *files)
    assert report == ImportReport(5, 5, 1, 1, ())
    before = rows(quick_store)
    clock.now += 1000
    assert brought(quick_store, *files) == ImportReport(5, 0, 6, 0, ())
    assert rows(quick_store) == before
    assert quick_store.verify() == []


def test_broken_lines_are_reported_with_file_line_and_reason_and_the_others_go_in(quick_store, tmp_path):
    path = lines(
        tmp_path / "mixed.jsonl",
        chat("hi", "hello", session="a"),
        '{"messages": [{"role": "user", "content": "secret words',
        chat("hi", "hello", session="b", rating=5),
        chat("hi", "hello", session="c", rating="up"),
        "[1]",
        '{"messages": NaN}',
        "[" * 100_000,
        '{"n": ' + "1" * 5000 + "}",
        chat("hi", "something else", session="a"),
        chat("hi\ud800", "hello", session="d"),
        chat("hi", "hello", session="e"),
    )
    report = brought(quick_store, str(path))
    assert (report.conversations, report.interactions_new, report.feedback_new) == (2, 2, 0)
    assert [(error.file, error.line) for error in report.errors] == [(str(path), n) for n in range(2, 11)]
    expected = [
        "not JSON: Unterminated string starting at",
        "rating is 5, not a number from -1 to 1",
        "rating is of type str",
        "the record is a list of 1",
        "not JSON: NaN is no value",
        "nested too deeply",
        "not JSON: a number that cannot be read",
        "has something else at position 0",
        "message 0: content holds half of a surrogate pair",
    ]
    for error, reason in zip(report.errors, expected, strict=True):
        assert reason in error.reason
        assert "secret" not in error.reason
    assert [i.session_id for i in quick_store.interactions()] == ["a", "e"]


def test_conversation_over_several_lines_is_told_to_be_one(quick_store, tmp_path):
    report = brought(quick_store, lines(tmp_path / "a.jsonl", *json.dumps(chat("hi", "hello"), indent=2).split("\n")))
    assert (report.conversations, report.errors[0].line) == (0, 1)
    assert "a conversation is one line" in report.errors[0].reason


def test_array_goes_in_up_to_its_broken_element(quick_store, tmp_path):
    path = lines(tmp_path / "a.json", "[", json.dumps(chat("hi", "hello")) + ",", '{"messages": ]', "]")
    report = brought(quick_store, path)
    assert (report.interactions_new, len(report.errors)) == (1, 1)
    assert report.errors[0].line == 3
    assert report.errors[0].reason.endswith("; what follows it was not read")


def test_rating_that_changed_in_a_later_file_is_the_latest(quick_store, tmp_path, clock):
    at = "2023-01-05T09:00:00Z"
    for rating in (1, -1, 1, -1):  # and an older file again changes nothing
        brought(quick_store, lines(tmp_path / "a.jsonl", chat("hi", "hello", rating=rating, created_utc=at)))
        clock.now += 60
    (given,) = quick_store.feedback().values()
    assert [f.rating for f in sorted(given, key=lambda f: f.created_utc)] == [1, -1]


def test_what_follows_an_array_is_reported_and_a_time_of_many_digits_is_an_error(quick_store, tmp_path):
    array = json.dumps([chat("hi", "hello")])
    report = brought(quick_store, lines(tmp_path / "two.json", array, array))
    assert (report.interactions_new, report.errors[0].line) == (1, 2)
    assert "something follows the end of the array" in report.errors[0].reason
    late = json.dumps(chat("a", "b")).replace("{", '{"created_utc": 1' + "0" * 400 + ", ", 1)
    report = brought(quick_store, lines(tmp_path / "late.jsonl", late, json.dumps(chat("c", "d", session="t"))))
    assert report.interactions_new == 1 and "not a finite number" in report.errors[0].reason


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_array_is_read_alike_in_pieces_of_any_size(quick_store, tmp_path, monkeypatch, piece):
    monkeypatch.setattr("nightschool.memory.importer.PIECE", piece)
    talks = [chat(f"hé {n} 😀", "hello", session=f"s{n}", created_utc=1234567 + n) for n in range(3)]
    text = json.dumps(talks, ensure_ascii=False, indent=1) + "\n"
    report = brought(quick_store, lines(tmp_path / "array.json", text))
    assert (report.conversations, report.errors) == (3, ())
    assert [(i.text, i.created_utc) for i in quick_store.interactions()] == [
        (f"hé {n} 😀", 1234567.0 + n) for n in range(3)
    ]
    broken = text.replace("hé 2", 'h" 2')
    (error,) = brought(quick_store, lines(tmp_path / "broken.json", broken)).errors
    assert error.line == 1 + broken[: broken.rindex('{\n  "messages"')].count("\n")
    assert "characters after the beginning of the element; what follows it was not read" in error.reason


def test_of_a_large_array_only_what_is_looked_at_is_held(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr("nightschool.memory.importer.PIECE", 1000)
    held, more = [], _Sliding._more

    def noted(self):
        found = more(self)
        held.append(len(self._text))
        return found

    monkeypatch.setattr(_Sliding, "_more", noted)
    path = lines(tmp_path / "array.json", json.dumps([chat("hi " * 100, "hello", session=f"s{n}") for n in range(200)]))
    assert brought(quick_store, path).conversations == 200
    assert path.stat().st_size > 50_000 and max(held) < 3000


def test_array_that_was_cut_off_is_reported(quick_store, tmp_path):
    report = brought(quick_store, lines(tmp_path / "a.json", "[" + json.dumps(chat("hi", "hello"))))
    assert report.interactions_new == 1
    assert "not JSON: Expecting value" in report.errors[0].reason


def test_refused_element_of_an_array_is_reported_with_the_line_where_it_begins(quick_store, tmp_path):
    path = lines(tmp_path / "a.json", "[", json.dumps(chat("hi", "hello")), ",\n\n5,", json.dumps(chat("a", "b")), "]")
    report = brought(quick_store, path)
    assert report.interactions_new == 2
    assert report.errors == (LineError(str(path), 5, "conversation 2: the record is 5, not an object"),)


def test_of_an_array_in_one_line_the_conversation_is_named_that_is_wrong(quick_store, tmp_path):
    talks = json.dumps([chat("hi", "hello"), 5, chat("a", "b")])
    report = brought(quick_store, lines(tmp_path / "a.json", talks.replace("]}]", "]}, {]")))
    assert [(e.line, e.reason.split(":")[0]) for e in report.errors] == [(1, "conversation 2"), (1, "conversation 4")]


def test_byte_order_mark_is_read_over_in_lines_and_arrays(quick_store, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(chat("hi", "hello")), encoding="utf-8-sig")
    (tmp_path / "b.json").write_text(json.dumps([chat("ho", "hello")]), encoding="utf-8-sig")
    assert brought(quick_store, tmp_path / "a.jsonl", tmp_path / "b.json").interactions_new == 2


def test_bytes_that_are_no_utf8_are_reported(quick_store, tmp_path):
    good = json.dumps(chat("hi", "hello")).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n' + good)
    (tmp_path / "b.json").write_bytes(b"[\xff]")
    report = brought(quick_store, tmp_path / "a.jsonl", tmp_path / "b.json")
    assert report.interactions_new == 1
    assert [error.reason for error in report.errors] == [
        "not UTF-8: byte 14",
        "not UTF-8: byte 1; what follows it was not read",
    ]


def test_line_separators_inside_a_message_are_no_line_ends(quick_store, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat("one\u2028two\x85three", "hello"), ensure_ascii=False), encoding="utf-8")
    brought(quick_store, path)
    assert next(quick_store.interactions()).text == "one\u2028two\x85three"


def test_empty_file_brings_nothing(quick_store, tmp_path):
    assert brought(quick_store, lines(tmp_path / "a.jsonl", " \n")) == ImportReport(0, 0, 0, 0, ())


def test_missing_file_is_named_before_anything_goes_in(quick_store, tmp_path):
    path = lines(tmp_path / "a.jsonl", chat("hi", "hello"))
    with pytest.raises(InputError, match=r"no such file: .*gone.jsonl; nothing was brought in"):
        brought(quick_store, path, tmp_path / "gone.jsonl")
    assert quick_store.counts()["interactions"] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file here that opens and cannot be read")
def test_file_that_cannot_be_read_is_told_of_and_the_others_go_in(quick_store, tmp_path):
    first, last = (lines(tmp_path / name, chat(name, "hello")) for name in ("a.jsonl", "b.jsonl"))
    report = brought(quick_store, first, "/proc/self/mem", last)
    reason = "it cannot be read: Input/output error; what follows in it is not in"
    assert report == ImportReport(2, 2, 0, 0, (LineError("/proc/self/mem", 0, reason),))


def test_grown_export_adds_what_is_new_and_replaces_the_unanswered_end(quick_store, tmp_path):
    path = tmp_path / "a.jsonl"
    brought(quick_store, lines(path, chat("hi", "hello", "dogs?", session="s")))
    report = brought(quick_store, lines(path, chat("hi", "hello", "dogs?", "yes", rating=1, session="s")))
    assert report == ImportReport(1, 1, 1, 1, ())
    report = brought(quick_store, lines(path, chat("hi", "hello", "dogs?", "yes", rating=-1, session="s")))
    assert report == ImportReport(1, 0, 2, 1, ())
    assert quick_store.verify() == []


def test_progress_counts_conversations_batch_by_batch(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "CONVERSATIONS_A_BATCH", 2)
    told: list[int] = []
    path = lines(tmp_path / "a.jsonl", *(chat(f"hi {n}", "hello") for n in range(5)), "broken")
    report = brought(quick_store, path, progress=told.append)
    assert (told, report.conversations) == ([2, 4, 5], 5)
    assert [error.line for error in report.errors] == [6]


def test_failing_batch_leaves_nothing_of_itself_and_the_next_run_completes(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "CONVERSATIONS_A_BATCH", 2)
    path = lines(tmp_path / "a.jsonl", *(chat(f"hi {n}", "hello", rating=1) for n in range(4)))

    def stop_after_two(done):
        monkeypatch.setattr("nightschool.memory.store.insert_reviews", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        brought(quick_store, path, progress=stop_after_two)
    assert (quick_store.counts()["interactions"], quick_store.counts()["feedback"]) == (2, 2)
    monkeypatch.undo()
    assert brought(quick_store, path) == ImportReport(4, 2, 2, 2, ())
    assert quick_store.verify() == []


def test_of_several_ratings_of_one_reply_in_a_file_the_last_one_counts(quick_store, tmp_path):
    for name, ratings in (("a", (1, -1)), ("b", (-1, 1))):
        file = lines(tmp_path / f"{name}.jsonl", *(chat("hi", "hello", session=name, rating=r) for r in ratings))
        brought(quick_store, file)
    said = {i.session_id: quick_store.feedback()[i.id] for i in quick_store.interactions()}
    last = {name: max(given, key=lambda f: f.created_utc).rating for name, given in said.items()}
    assert last == {"a": -1.0, "b": 1.0}


def test_conversations_without_a_time_are_in_order_whatever_is_refused_between_them(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "CONVERSATIONS_A_BATCH", 4)
    told = [chat(f"n {i}", "so", session=f"{i:02}") if i % 3 else "broken" for i in range(20)]
    brought(quick_store, lines(tmp_path / "a.jsonl", *told))
    found = sorted(quick_store.interactions(), key=lambda i: i.session_id)
    times = [i.created_utc for i in found]
    assert len(times) == 13 and times == sorted(set(times))


@pytest.mark.parametrize("homes", [("Oslo", "Rome"), ("Rome", "Oslo"), ("Kyiv", "Cork"), ("Cork", "Kyiv")])
def test_of_conversations_without_a_time_the_last_one_has_the_last_word(quick_store, tmp_path, clock, homes):
    brought(quick_store, lines(tmp_path / "a.jsonl", *(chat(f"I live in {home}.", "I see.") for home in homes)))
    clock.now += 10
    assert [m.text for m in quick_store.history(user_id="default") if m.valid_to is None] == [f"I live in {homes[1]}."]


def test_error_at_the_beginning_of_an_array_is_told_before_the_rest_is_read(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "PIECE", 64)
    path = tmp_path / "a.json"
    path.write_text('[{"messages": oops, ' + '"x": 1, ' * 10_000 + "}]")
    with path.open("rb") as file:
        (record,) = importer._array("a.json", file)
        assert "not JSON" in record.error and file.tell() < 20_000


def test_number_that_goes_on_where_reading_paused_is_read_whole(quick_store, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "PIECE", 8)
    path = tmp_path / "in.json"
    path.write_text("[ 12345678901, " + json.dumps(chat("hi", "ho")) + "]")
    report = brought(quick_store, path)
    (error,) = report.errors
    assert error.reason == "conversation 1: the record is 12345678901, not an object"
    assert report.interactions_new == 1
