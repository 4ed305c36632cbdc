from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.content import canonical_json, content_id, files_id

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), PLAIN, min_size=2, max_size=5))
def test_order_of_keys_does_not_change_the_id(value: dict[str, object]) -> None:
    assert content_id(value) == content_id(dict(reversed(value.items())))


@given(PLAIN, PLAIN)
def test_ids_agree_exactly_when_the_canonical_form_does(a: object, b: object) -> None:
    assert (content_id(a) == content_id(b)) == (canonical_json(a) == canonical_json(b))


def test_ids_are_the_same_in_every_version() -> None:
    assert content_id(["ü", 1, None]) == "b2:106cffcb29fe252cbbc4405ac42932ef"


def test_numbers_that_json_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_lone_surrogates_have_an_id() -> None:
    assert content_id("\ud800") != content_id("?")


def test_files_are_named_by_their_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"xy")
    (tmp_path / "b").write_bytes(b"")
    first = files_id([tmp_path / "a", tmp_path / "b"])
    assert files_id([tmp_path / "b", tmp_path / "a"]) == first
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"y")
    assert files_id([tmp_path / "a", tmp_path / "b"]) != first
