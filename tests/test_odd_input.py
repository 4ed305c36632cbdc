"""What nobody expects to be typed or sent: kept and given back as it was, or refused with the field named.

The two public lists (the big list of naughty strings, JSONTestSuite) lie in shared/data beside the checkout or where
BENCH_DATA says; without them their tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from nightschool.errors import InputError
from nightschool.interfaces.printing import when
from nightschool.memory.conversations import Conversation, Owner
from nightschool.memory.importer import import_files

DATA = Path(os.environ.get("BENCH_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")


def public(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there; bench/sources.py says where the data comes from, BENCH_DATA where it lies")
    return path


def conversation(user: str, session: str, words: str, time: float = 0.0) -> Conversation:
    messages = ({"role": "user", "content": words}, {"role": "assistant", "content": words})
    return Conversation(Owner(user, "", session), messages, (time, time))


def test_naughty_strings_are_kept_as_they_are_asked_for_and_forgotten(quick_store):
    strings = [s for s in json.loads(public("blns/blns.json").read_text(encoding="utf-8")) if s.strip()]
    assert len(strings) > 400
    recorded = quick_store.record_many([conversation("ann", f"s{n}", s) for n, s in enumerate(strings)])
    assert recorded.errors == {}
    kept = {i.session_id: (i.turn[0]["content"], i.reply) for i in quick_store.interactions()}
    assert [kept[f"s{n}"] for n in range(len(strings))] == [(s, s) for s in strings]
    for words in strings[::4]:
        quick_store.recall(words, user_id="ann")
    assert quick_store.verify() == []


def test_naughty_names_own_what_is_theirs_and_no_more(quick_store):
    strings = json.loads(public("blns/blns.json").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(s for s in strings if 0 < len(s.encode()) <= 255))
    recorded = quick_store.record_many([conversation(name, name, f"zebra {n}") for n, name in enumerate(names)])
    assert (recorded.new, recorded.errors) == (len(names), {})
    for n, name in list(enumerate(names))[::8]:
        found = quick_store.recall("zebra", user_id=name, threshold=0)
        assert [r.memory.text for r in found] == [f"zebra {n}\nzebra {n}"]
        assert len(quick_store.forget(user_id=name, session_id=name).interaction_ids) == 1


def test_json_that_is_valid_goes_in_and_what_is_not_is_reported(quick_store, tmp_path):
    """Each file of the suite as the value of an unknown key of a conversation."""
    wrong, seen = [], 0
    for path in sorted(public("jsontestsuite/test_parsing").glob("[yn]_*.json")):
        said = json.dumps([{"role": "user", "content": path.name}]).encode()
        file = tmp_path / "in.json"
        file.write_bytes(b'[{"messages": ' + said + b', "extra": ' + path.read_bytes() + b"}]")
        report = import_files(quick_store, [file], now=0.0)
        seen += 1
        if (report.errors == ()) != path.name.startswith("y_") or report.interactions_new > 1:
            wrong.append((path.name, report))
    assert wrong == []
    assert seen > 250


def test_json_on_which_readers_may_differ_is_taken_or_reported_and_never_a_crash(quick_store, tmp_path):
    for path in sorted(public("jsontestsuite/test_parsing").glob("*.json")):
        (tmp_path / "in.jsonl").write_bytes(path.read_bytes())
        assert import_files(quick_store, [tmp_path / "in.jsonl"], now=0.0).interactions_new == 0


ODD = {
    "longest real message": "a" * 348_853,
    "right to left": "\u202eevil\u202c שלום مرحبا",
    "zero width": "zero\u200bwidth\u200d\ufeff",
    "quotes": "' OR '1'='1\"; DROP TABLE memories; --",
    "only signs": "%_\\*?[](){}^$",
    "control": "\x01\x1b[31m\x7f",
    "not normalised": "e\u0301 é",
    "outside of the first plane": "🧑‍🚀𝔘",
}


@pytest.mark.parametrize("words", ODD.values(), ids=list(ODD))
def test_odd_text_is_given_back_as_it_was_exported_and_forgotten(quick_store, words):
    owner = {"user_id": words[:200], "session_id": words[:200]}
    kept = quick_store.record([{"role": "user", "content": words}], words, **owner)
    note = quick_store.remember(words, user_id=words[:200])
    assert quick_store.interaction(kept.id).turn == ({"role": "user", "content": words},)
    assert quick_store.memories([note.id])[note.id].text == words
    path, _ = quick_store.export()
    assert quick_store.restore(path).errors == {}
    assert quick_store.verify() == []
    receipt = quick_store.forget_apply(quick_store.forget(user_id=words[:200]))
    assert (receipt.interactions, receipt.memories) == (1, 2)


@pytest.mark.parametrize("time", [-62_135_596_801.0, -1e300, 0.0, 253_402_300_800.0, 1e300])
def test_ancient_and_future_times_are_kept_and_shown(quick_store, clock, time):
    clock.now = max(clock.now, time)  # a machine that is set to it
    quick_store.record_many([conversation("ann", "s", "hi", time)])
    (kept,) = quick_store.interactions()
    assert kept.created_utc == time
    assert when(time)
    assert [t.sessions for t in quick_store.topics(1.7e9)] == [1]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"user_id": "a\0"}, "user_id holds a NUL"),
        ({"session_id": "\ud800"}, "session_id holds half of a surrogate pair"),
        ({"user_id": "a" * 256}, "user_id has 256 bytes"),
        ({"created_utc": float("nan")}, "created_utc is not a finite number"),
        ({"created_utc": float("inf")}, "created_utc is not a finite number"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_field(quick_store, given, field):
    with pytest.raises(InputError, match=field):
        quick_store.record([{"role": "user", "content": "hi"}], "ok", **{"user_id": "u", "session_id": "s"} | given)
    assert quick_store.counts()["interactions"] == 0


@pytest.mark.parametrize("rating", [float("nan"), float("inf"), 1.0001, True])
def test_score_that_is_none_is_refused(quick_store, rating):
    kept = quick_store.record([{"role": "user", "content": "hi"}], "ok", user_id="u", session_id="s")
    with pytest.raises(InputError, match="rating is"):
        quick_store.rate(kept.id, rating=rating)
    assert quick_store.feedback() == {}
