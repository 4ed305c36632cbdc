import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.topics import DAY, TopicIndex, TopicState, label_of, recurrence, topic_id_of


def unit(*values: float) -> np.ndarray:
    v = np.array(values, dtype=np.float32)
    return v / np.linalg.norm(v)


def clouds(centres: int, each: int, seed: int = 0) -> tuple[list[str], np.ndarray, list[int]]:
    """Unit vectors around `centres` directions at right angles, shuffled, with the direction each belongs to."""
    random = np.random.default_rng(seed)
    which = random.permutation(np.repeat(np.arange(centres), each))
    vectors = np.eye(16)[which] + 0.1 * random.standard_normal((len(which), 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return [f"question {k} number {i}" for i, k in enumerate(which)], vectors, list(which)


def test_turns_of_one_direction_share_a_topic_and_others_do_not():
    texts, vectors, which = clouds(5, 20)
    ids = TopicIndex([], 0.6).assign(texts, vectors, now=0.0)
    assert len(set(ids)) == 5
    assert len(set(zip(ids, which, strict=True))) == 5


def test_batches_times_and_a_reload_in_between_change_no_id():
    texts, vectors, _ = clouds(6, 15, seed=1)
    at_once = TopicIndex([], 0.6).assign(texts, vectors, now=0.0)
    first = TopicIndex([], 0.6)
    ids = first.assign(texts[:40], vectors[:40], now=123.0)
    second = TopicIndex(first.changed(), 0.6)
    ids += second.assign(texts[40:41], vectors[40:41], now=456.0)
    ids += second.assign(texts[41:], vectors[41:], now=789.0)
    assert ids == at_once


def test_changed_gives_what_moved_since_the_last_call_and_only_that():
    index = TopicIndex([], 0.6)
    a, b = index.assign(["a", "b"], np.stack([unit(1, 0), unit(0, 1)]), now=5.0)
    assert {t.id: t.size for t in index.changed()} == {a: 1, b: 1}
    assert index.changed() == []
    index.assign(["again a"], unit(1, 0.1)[None], now=9.0)
    (state,) = index.changed()
    assert (state.id, state.size, state.created_utc) == (a, 2, 5.0)
    assert state.centroid_sum == pytest.approx(unit(1, 0) + unit(1, 0.1))


def test_states_given_out_are_not_moved_by_later_turns():
    index = TopicIndex([], 0.6)
    index.assign(["a"], unit(1, 0)[None], now=0.0)
    (state,) = index.changed()
    index.assign(["a"], unit(1, 0)[None], now=0.0)
    assert state.centroid_sum == pytest.approx(unit(1, 0))


def test_a_text_that_founds_a_second_topic_gets_a_second_id():
    index = TopicIndex([], 0.9)
    first, second = index.assign(["same", "same"], np.stack([unit(1, 0), unit(0, 1)]), now=0.0)
    assert first != second
    assert second == topic_id_of("same", {first})


def test_more_topics_than_the_first_allocation_are_kept():
    vectors = np.eye(200, dtype=np.float32)
    index = TopicIndex([], 0.6)
    ids = index.assign([f"text {i}" for i in range(200)], vectors, now=0.0)
    assert len(set(ids)) == 200
    assert index.assign(["x", "y"], vectors[[3, 199]], now=0.0) == [ids[3], ids[199]]


def test_a_full_index_founds_no_more_topics():
    vectors = np.eye(4, dtype=np.float32)
    index = TopicIndex([], 0.6, most=2)
    a, b, c, _ = index.assign(["a", "b", "c", "d"], vectors, now=0.0)
    assert a != b
    assert c in (a, b)
    assert sum(state.size for state in index.changed()) == 4


def test_a_zero_vector_and_no_turns_at_all_are_harmless():
    index = TopicIndex([TopicState("t:x", "x", np.zeros(2, np.float32), 1, 0.0)], 0.6)
    assert index.assign([], np.zeros((0, 2), np.float32), now=0.0) == []
    assert index.assign(["zero"], np.zeros((1, 2), np.float32), now=0.0) != ["t:x"]


def test_texts_without_their_vectors_are_refused():
    with pytest.raises(ValueError, match="2 texts with 1 vectors"):
        TopicIndex([], 0.6).assign(["a", "b"], np.ones((1, 2), np.float32), now=0.0)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("How much does it cost to fix a puncture?", "cost fix puncture"),
        ("Hi, what is this?", "Hi, what is this?"),
        ("The lock, the lock, my lock!", "lock"),
        ("", "(empty)"),
        ("Öffnungszeiten am Samstag", "öffnungszeiten samstag"),
    ],
)
def test_label_is_made_of_the_words_that_say_something(text: str, label: str):
    assert label_of(text) == label


def test_a_session_counts_once_at_its_latest_visit():
    visits = [("t:a", "s1", 0.0), ("t:a", "s1", 30 * DAY), ("t:a", "s2", 0.0), ("t:b", "s1", 15 * DAY)]
    found = recurrence(visits, now=30 * DAY, half_life_days=30)
    assert found["t:a"].value == pytest.approx(1.0 + 0.5)
    assert (found["t:a"].sessions, found["t:a"].last_seen_utc) == (2, 30 * DAY)
    assert found["t:b"].value == pytest.approx(2**-0.5)


def test_one_user_adds_no_more_to_a_topic_than_the_bound():
    visits = [("t:a", ("eve", "", f"s{n}"), 0.0) for n in range(50)] + [("t:a", ("ada", "", "s"), 0.0)]
    bounded, free = (recurrence(visits, 0.0, 30, most_a_user=most)["t:a"] for most in (3.0, 0.0))
    assert (bounded.value, free.value) == (4.0, 51.0)
    assert bounded.sessions == free.sessions == 51
    assert recurrence(visits[:2], 0.0, 30, most_a_user=3.0)["t:a"].value == 2.0


def test_a_visit_from_the_future_counts_as_now():
    assert recurrence([("t:a", "s", 9 * DAY)], now=0.0, half_life_days=30)["t:a"].value == 1.0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.floats(0, 1e8)), max_size=30))
def test_recurrence_never_exceeds_the_sessions_and_ignores_the_order(visits: list[tuple[str, str, float]]):
    forward, backward = recurrence(visits, 1e8, 30), recurrence(reversed(visits), 1e8, 30)
    assert forward == backward
    assert all(0 <= r.value <= r.sessions for r in forward.values())


def test_topics_that_another_moved_or_founded_are_taken_as_they_are() -> None:
    texts, vectors, _ = clouds(4, 10)
    one = TopicIndex([], 0.65)
    one.assign(texts[:20], vectors[:20], 0.0)
    other = TopicIndex(one.changed(), 0.65)
    other.assign(texts[20:], vectors[20:], 1.0)
    one.put(other.changed())
    again = [index.assign(texts, vectors, 2.0) for index in (one, other)]
    assert again[0] == again[1]
    assert {t.id: t.size for t in one.changed()} == {t.id: t.size for t in other.changed()}
