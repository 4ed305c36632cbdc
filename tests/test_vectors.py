from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightschool.errors import StoreError
from nightschool.memory import vectors as module
from nightschool.memory.vectors import IndexRow, VectorIndex

DIMENSION = 16
ODD = ["ann", "bob", "o'neil", "' OR 1=1 --", 'quo"te', "ünï 🧑", "a%_\\"]


def vector(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=DIMENSION).astype(np.float32)
    return made / np.linalg.norm(made)


def row(id: str, text: str = "some words", *, user: str = "ann", agent: str = "", shared: bool = False, seed: int = 0):
    return IndexRow(id, user, agent, "s", "note", shared, text, vector(seed))


@pytest.fixture
def index(tmp_path) -> VectorIndex:
    return VectorIndex(str(tmp_path / "index"), DIMENSION, "test")


def found(index: VectorIndex, text: str = "words", *, user: str = "ann", agent: str = "", seed: int = 0) -> set[str]:
    return {hit.id for hit in index.search(vector(seed), text, user_id=user, agent_id=agent, limit=100)}


def test_hit_has_the_cosine_and_the_weight_of_the_words(index):
    index.add([row("same", "a zebra", seed=1), row("other", "a horse", seed=2)])
    hits = {h.id: h for h in index.search(vector(1), "zebra", user_id="ann", agent_id="", limit=10)}
    assert hits["same"].dense == pytest.approx(1, abs=1e-5)
    assert hits["other"].dense == pytest.approx(float(vector(1) @ vector(2)), abs=1e-5)
    assert hits["same"].words > 0 == hits["other"].words


def test_text_that_is_far_by_cosine_is_found_by_its_words(index):
    index.add([row(f"near{n}", seed=1) for n in range(5)] + [row("far", "the zebra", seed=2)])
    hits = {h.id: h for h in index.search(vector(1), "zebra", user_id="ann", agent_id="", limit=3)}
    assert len(hits) == 4
    assert hits["far"].dense == pytest.approx(float(vector(1) @ vector(2)), abs=1e-5)


def test_written_row_is_found_at_once_also_through_another_handle(index):
    other = VectorIndex(index.url, DIMENSION, "test")
    assert found(other) == set()
    index.add([row("new")])
    assert found(index) == found(other) == {"new"}


@pytest.mark.parametrize("query", ["", "the", "a\"b'c", "AND OR (", "+x -y ~ ^2 *", "x" * 5000, "\u200b", "日本語"])
def test_any_text_is_a_query(index, query):
    index.add([row("only")])
    assert found(index, query) == {"only"}


def test_own_rows_and_shared_rows_are_seen_and_nothing_else(index):
    index.add([row("mine"), row("theirs", user="bob"), row("all", user="bob", shared=True), row("agents", agent="x")])
    assert found(index) == {"mine", "all"}
    assert found(index, agent="x") == {"mine", "all", "agents"}
    assert found(index, agent="y") == {"mine", "all"}
    assert index.count_visible("ann", "x") == 3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    assert index.count_visible(user, agent) == len(expected)


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
    assert [h.id for h in index.search(vector(0), "words", user_id="ann", agent_id="", limit=9)] == ["a"]


def test_nothing_added_makes_no_table(index, tmp_path):
    index.add([])
    assert not (tmp_path / "index").exists()


def test_erased_row_leaves_no_bytes_and_no_older_file(index, tmp_path, bytes_in_home):
    index.add([row(str(n), f"text{n}", seed=n) for n in range(50)])
    index.optimize()
    before = {path for path in (tmp_path / "index").rglob("*.lance") if path.is_file()}
    assert bytes_in_home(vector(7).tobytes())
    index.delete(["7"])
    assert bytes_in_home(vector(7).tobytes()), "deleting alone must not be enough, or erase is not needed"
    index.erase()
    assert not bytes_in_home(vector(7).tobytes())
    assert not any(path.exists() for path in before)
    assert index.count() == 49
    assert found(index, "text8", seed=8) == {str(n) for n in range(50)} - {"7"}


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


def test_fragments_are_joined_after_many_adds_or_many_rows(index, monkeypatch):
    ran: list[int] = []
    monkeypatch.setattr(index, "optimize", lambda: ran.append(1) or VectorIndex.optimize(index))
    monkeypatch.setattr(module, "ADDS_BEFORE_OPTIMIZE", 3)
    monkeypatch.setattr(module, "ROWS_BEFORE_OPTIMIZE", 10)
    for n in range(3):
        index.add([row(str(n))])
    assert len(ran) == 1
    index.add([row(f"b{n}") for n in range(10)])
    assert (len(ran), index.count()) == (2, 13)


def test_table_whose_indexes_were_never_made_gets_them(index):
    index._connect().create_table(module.TABLE, schema=index._schema())
    index.add([row("a")])
    assert len(list(index._open().list_indices())) == 4


@pytest.mark.parametrize(("dimension", "name"), [(DIMENSION, "other"), (8, "test")])
def test_changed_embedder_is_refused_with_the_command_that_helps(index, dimension, name):
    index.add([row("a")])
    with pytest.raises(
        StoreError, match=rf"test \(16 numbers each\), .* {name} \({dimension}\); run `nightschool memory"
    ):
        VectorIndex(index.url, dimension, name).count()


def test_damaged_index_is_a_store_error_that_names_the_command(index, tmp_path):
    index.add([row("a")])
    for path in (tmp_path / "index").rglob("*.lance"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"cannot .* the index: .*nightschool memory rebuild"):
        found(VectorIndex(index.url, DIMENSION, "test"))
