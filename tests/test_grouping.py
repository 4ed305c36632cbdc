import numpy as np
import pytest
from nightschool.memory.grouping import MIN_TOPICS, groups, labels, otsu
from nightschool.memory.topics import TopicState


def topic(n: int, vector: np.ndarray, label: str = "", size: int = 1) -> TopicState:
    return TopicState(f"t:{n:03}", label or f"word{n}", vector.astype(np.float32), size, float(n))


def families(count: int, each: int, spread: float = 0.5, seed: int = 0) -> list[TopicState]:
    """`count` directions with `each` topics around them, taking turns: topic n belongs to family n % count."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((count, 96))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    noise = spread * random.standard_normal((count * each, 96)) / np.sqrt(96)
    return [topic(n, centres[n % count] + noise[n]) for n in range(count * each)]


@pytest.mark.parametrize("spread", [0.3, 0.5, 0.8])  # the threshold follows how loose the families are
def test_topics_of_one_family_are_one_group_named_by_the_oldest(spread: float):
    topics = families(12, 8, spread)
    assert groups(topics) == {t.id: f"t:{n % 12:03}" for n, t in enumerate(topics)}


def test_a_group_keeps_its_name_as_topics_come():
    topics = families(12, 10)
    early, late = groups(topics[:80]), groups(topics)
    assert early.items() <= late.items()


def test_the_order_in_which_topics_are_given_does_not_matter():
    topics = families(12, 8)
    assert groups(topics[::-1]) == groups(topics)


def test_few_topics_and_topics_without_a_direction_stand_alone():
    topics = families(5, 9)
    assert len(topics) < MIN_TOPICS
    assert groups(topics) == {t.id: t.id for t in topics}
    assert groups([]) == {}
    assert set(groups([*families(12, 8), topic(900, np.zeros(96))])) == {t.id for t in families(12, 8)} | {"t:900"}


def test_otsu_parts_two_heaps():
    assert otsu([0.1, 0.12, 0.15, 0.8, 0.9]) == pytest.approx(0.475)
    assert otsu([0.3]) == 0.3


def test_the_label_of_a_group_is_what_its_topics_share_and_others_do_not():
    vector = np.ones(4)
    topics = [
        topic(0, vector, "fix puncture price"),
        topic(1, vector, "puncture repair", size=3),
        topic(2, vector, "bread price hour"),
        topic(3, vector, "price bread", size=2),
        topic(4, vector, "The lock"),
    ]
    group_of = {"t:000": "t:000", "t:001": "t:000", "t:002": "t:002", "t:003": "t:002", "t:004": "t:004"}
    found = labels(topics, group_of)
    assert found["t:000"].split()[:2] == ["puncture", "repair"]
    assert found["t:002"].split()[0] == "bread"
    assert found["t:004"] == "The lock"
