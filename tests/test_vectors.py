from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lancedb.table import LanceTable
from nightschool.errors import StoreError
from nightschool.memory import vectors as module
from nightschool.memory.passages import IndexRow
from nightschool.memory.vectors import VectorIndex, narrowed, visible

DIMENSION = 16
ODD = ["ann", "bob", "o'neil", "' OR 1=1 --", 'quo"te', "ünï 🧑", "a%_\\"]


def vector(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return made / np.linalg.norm(made)


def row(id: str, text: str = "some words", *, user: str = "ann", agent: str = "", shared: bool = False, seed: int = 0):
    made = vector(seed)[None]
    return IndexRow(id, user, agent, "s", "note", shared, float(seed), 0, (text,), 1, made)


@pytest.fixture
def index(tmp_path) -> VectorIndex:
    return VectorIndex(str(tmp_path / "index"), DIMENSION, "test")


def found(index: VectorIndex, *, user: str = "ann", agent: str = "") -> set[str]:
    """What is seen in each of the three ways of looking, which must agree."""
    scope = visible(user, agent)
    seen = {r.id for r in index.rows(scope, 100)}
    assert {r.id for r in index.near(vector(0), scope, 100)} == seen
    assert {r.id for r in index.matching(["words"], scope, 100)} == seen
    assert index.count_where(scope) == len(seen)
    return seen


def test_row_comes_back_as_it_was_but_for_half_precision(index):
    windows = np.stack([vector(n) for n in range(3)])
    given = IndexRow("a", "o'neil", "x", "ü", "turn", False, 1.5, 7, ("some words", "more"), 1, windows)
    index.add([given])
    (read,) = index.rows(visible("o'neil", "x"), 9)
    assert replace(read, vectors=windows) == replace(given, vectors=windows)
    np.testing.assert_allclose(read.vectors, windows, atol=1e-3)


def test_nearest_come_first_and_so_do_those_with_more_of_the_words(index):
    index.add([row("a", "a zebra", seed=1), row("b", "the zebra crossing", seed=2)])
    assert [r.id for r in index.near(vector(2), visible("ann", ""), 1)] == ["b"]
    assert [r.id for r in index.matching(["crossing", "zebra"], visible("ann", ""), 9)] == ["b", "a"]
    assert index.matching([], visible("ann", ""), 9) == []


def test_condition_is_narrowed_to_session_kind_and_time(index):
    index.add([row(str(n), seed=n) for n in range(4)])
    scope = visible("ann", "")

    def seen(**narrower) -> set[str]:
        return {r.id for r in index.rows(narrowed(scope, **narrower), 9)}

    assert seen(since=1.0, until=3.0) == {"1", "2"}
    assert seen(kind="turn") == seen(sessions=["t"]) == seen(kind="' OR 1=1 --") == set()
    assert seen(kind="note", sessions=["s", "t"]) == {"0", "1", "2", "3"}


def test_written_row_is_found_at_once_also_through_another_handle(index):
    other = VectorIndex(index.url, DIMENSION, "test")
    assert found(other) == set()
    index.add([row("new")])
    assert found(index) == found(other) == {"new"}


@pytest.mark.parametrize("query", ["the", "a'b", "and", "or", "x" * 39, "日本語", "o’neil"])
def test_any_word_can_be_looked_for(index, query):
    index.add([row("only", f"{query} words")])
    assert [r.id for r in index.matching([query], visible("ann", ""), 9)] == ["only"]


def test_own_rows_and_shared_rows_are_seen_and_nothing_else(index):
    index.add([row("mine"), row("theirs", user="bob"), row("all", user="bob", shared=True), row("agents", agent="x")])
    assert found(index) == {"mine", "all"}
    assert found(index, agent="x") == {"mine", "all", "agents"}
    assert found(index, agent="y") == {"mine", "all"}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(ODD), st.sampled_from(["", *ODD]), st.booleans()), min_size=1, max_size=8),
    st.sampled_from(ODD),
    st.sampled_from(["", *ODD]),
)
def test_search_never_leaves_its_scope(index, rows, user, agent):
    index.drop()
    index.add([row(str(n), user=u, agent=a, shared=shared) for n, (u, a, shared) in enumerate(rows)])
    expected = {str(n) for n, (u, a, shared) in enumerate(rows) if shared or (u == user and a in ("", agent))}
    assert found(index, user=user, agent=agent) == expected


def test_vectors_come_back_as_they_were_for_those_ids_that_are_here(index, monkeypatch):
    monkeypatch.setattr(module, "IDS_A_FILTER", 2)
    index.add([row(id, seed=n) for n, id in enumerate(["a", "b'", "c", "d"])])
    read = index.vectors(["a", "b'", "c", "gone"])
    assert read.keys() == {"a", "b'", "c"}
    assert all((read[id] == vector(n)).all() for n, id in enumerate(["a", "b'", "c"]))
    assert index.vectors([]) == {}


def test_deleted_rows_are_gone_and_the_others_stay(index):
    index.add([row("a"), row("o'b"), row("c")])
    index.delete(["o'b", "gone"])
    assert (found(index), index.count(), sorted(index.ids())) == ({"a", "c"}, 2, ["a", "c"])


def test_row_added_twice_counts_twice_and_is_found_once(index):
    index.add([row("a")])
    index.add([row("a")])
    assert (index.count(), index.ids()) == (2, ["a", "a"])
    assert [r.id for r in index.near(vector(0), visible("ann", ""), 9)] == ["a"]


def test_nothing_added_makes_no_table(index, tmp_path):
    index.add([])
    assert not (tmp_path / "index").exists()


def test_erased_row_leaves_no_bytes_and_no_older_file(index, tmp_path, bytes_in_home):
    index.add([row(str(n), f"words {n}", seed=n) for n in range(50)])
    index.optimize()
    before = {path for path in (tmp_path / "index").rglob("*.lance") if path.is_file()}
    assert bytes_in_home(vector(7).tobytes()) and bytes_in_home(vector(7).astype("<f2").tobytes())
    index.delete(["7"])
    assert bytes_in_home(vector(7).tobytes()), "deleting alone must not be enough, or erase is not needed"
    index.erase()
    assert not bytes_in_home(vector(7).tobytes()) + bytes_in_home(vector(7).astype("<f2").tobytes())
    assert not any(path.exists() for path in before)
    assert index.count() == 49
    assert found(index) == {str(n) for n in range(50)} - {"7"}


def test_versions_that_the_clean_up_spares_as_those_of_a_clock_ahead_are_erased_too(index, bytes_in_home, monkeypatch):
    index.add([row("a", seed=7), row("b", seed=8)])
    index.delete(["a"])
    with monkeypatch.context() as ahead:
        ahead.setattr(LanceTable, "optimize", lambda *_, **__: None)
        index.erase()
    assert bytes_in_home(vector(7).tobytes()) == [] and index.ids() == ["b"]
    assert [r.id for r in index.near(vector(8), visible("ann", ""), 9)] == ["b"]
    index.add([row("c", seed=9)])
    assert sorted(index.ids()) == ["b", "c"]


def test_processes_that_each_write_one_row_leave_few_fragments(tmp_path):
    for n in range(module.MOST_FRAGMENTS + 5):
        VectorIndex(str(tmp_path / "index"), DIMENSION, "embedder").add([row(str(n), seed=n)])
    index = VectorIndex(str(tmp_path / "index"), DIMENSION, "embedder")
    assert index.count() == module.MOST_FRAGMENTS + 5
    assert index._open().stats()["fragment_stats"]["num_fragments"] <= 6


def test_last_row_can_be_erased(index, bytes_in_home):
    index.add([row("only", seed=3)])
    index.delete(["only"])
    index.erase()
    assert (index.count(), bytes_in_home(vector(3).tobytes())) == (0, [])
    index.add([row("next")])
    assert found(index) == {"next"}


def test_dropped_index_starts_empty_and_dropping_twice_is_no_error(index):
    index.add([row("a")])
    index.drop()
    index.drop()
    assert index.count() == 0


def fragments(index: VectorIndex) -> int:
    return int(index._open().stats()["fragment_stats"]["num_fragments"])


def test_fragments_of_small_adds_are_joined_and_their_rows_stay_as_they_are(index, monkeypatch):
    monkeypatch.setattr(module, "ADDS_BEFORE_GATHER", 4)
    index.add([row("old", seed=9)])
    index.optimize()
    for n in range(3):
        index.add([row(str(n), f"words {n}", seed=n)])
    index.delete(["1"])
    assert fragments(index) == 3
    index.add([row("3", "words 3", seed=3)])
    assert (fragments(index), index.count()) == (2, 4)
    assert sorted(index.ids()) == ["0", "2", "3", "old"]  # what was deleted meanwhile does not come back
    held = index.vectors(["0", "2", "3"])
    assert all(np.array_equal(held[str(n)], vector(n)) for n in (0, 2, 3))
    assert [r.id for r in index.matching(["words", "3"], visible("ann", ""), 1)] == ["3"]


def test_row_that_is_there_twice_stays_so_when_fragments_are_joined(index, monkeypatch):
    monkeypatch.setattr(module, "ADDS_BEFORE_GATHER", 3)
    for name in ("a", "a", "b"):
        index.add([row(name)])
    assert sorted(index.ids()) == ["a", "a", "b"]


def test_table_is_optimized_after_many_rows_and_later_the_larger_it_is(index, monkeypatch):
    ran: list[int] = []
    monkeypatch.setattr(index, "optimize", lambda: ran.append(1) or VectorIndex.optimize(index))
    monkeypatch.setattr(module, "ROWS_BEFORE_OPTIMIZE", 10)
    monkeypatch.setattr(module, "SHARE_BEFORE_OPTIMIZE", 2.0)
    index.add([row(f"a{n}") for n in range(10)])
    assert (len(ran), fragments(index)) == (1, 1)
    for n in range(19):
        index.add([row(f"b{n}")])
    assert len(ran) == 1
    index.add([row("c")])
    assert (len(ran), index.count()) == (2, 30)
    assert fragments(index) <= 2


def test_older_versions_do_not_pile_up(index, monkeypatch):
    monkeypatch.setattr(module, "KEPT_VERSIONS", timedelta(milliseconds=1))
    for n in range(5):
        index.add([row(str(n))])
        time.sleep(0.01)
    before = len(index._open().list_versions())
    index.optimize()
    assert len(index._open().list_versions()) <= 3 < before


def test_table_whose_indexes_were_never_made_gets_them(index):
    index._connect().create_table(module.TABLE, schema=index._schema())
    index.add([row("a")])
    assert len(list(index._open().list_indices())) == 6


class Contended:
    """A table whose indexes other processes are making: so many commits fail, with this message."""

    def __init__(self, table, fails: int, message: str) -> None:
        self._table, self.fails, self.message = table, fails, message

    def __getattr__(self, name: str):
        return getattr(self._table, name)

    def create_index(self, column, config):
        if self.fails:
            self.fails -= 1
            raise RuntimeError(self.message)
        return self._table.create_index(column, config=config)


CONFLICT = "Retryable commit conflict for version 3"


@pytest.mark.parametrize(("fails", "message"), [(3, CONFLICT), (module.CONFLICTS, CONFLICT), (1, "disk full")])
def test_indexes_are_made_through_conflicts_unless_they_never_end_or_are_something_else(index, fails, message):
    index._table = Contended(index._connect().create_table(module.TABLE, schema=index._schema()), fails, message)
    if fails == 3:
        index._make_indexes()
        assert len(list(index._table.list_indices())) == 6
    else:
        with pytest.raises(RuntimeError, match=message):
            index._make_indexes()
        assert index._table.fails == 0


@pytest.mark.parametrize(("dimension", "name"), [(DIMENSION, "other"), (8, "test")])
def test_changed_embedder_is_refused_with_the_command_that_helps(index, dimension, name):
    index.add([row("a")])
    with pytest.raises(
        StoreError, match=rf"test \(16 numbers each\), .* {name} \({dimension}\); run `nightschool memory"
    ):
        VectorIndex(index.url, dimension, name).count()


def test_index_of_another_layout_is_refused_with_the_command_that_helps(index):
    older = index._schema().with_metadata({"embedder": "test", "dimension": str(DIMENSION)})
    index._connect().create_table(module.TABLE, schema=older)
    with pytest.raises(StoreError, match="made by another version; run `nightschool memory rebuild`"):
        index.count()


def test_damaged_index_is_a_store_error_that_names_the_command(index, tmp_path):
    index.add([row("a")])
    for path in (tmp_path / "index").rglob("*.lance"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"cannot .* the index: .*nightschool memory rebuild"):
        found(VectorIndex(index.url, DIMENSION, "test"))


def test_word_of_any_length_is_found_by_it(index):
    digest = "a9993e364706816aba3e25717850c26c9cd0d89d" * 2
    index.add([row("a", f"the sum is {digest}"), row("b", "the sum is known")])
    for _ in range(2):
        assert [r.id for r in index.matching([digest], visible("ann", ""), 9)] == ["a"]
        index.optimize()
