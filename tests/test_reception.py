from dataclasses import replace
from math import log

import pytest
from nightschool.errors import NotFound
from nightschool.evolve.dataset import freeze
from nightschool.evolve.prompts import Prompts
from nightschool.evolve.reception import Reading, met, read
from nightschool.memory.conversations import Review
from nightschool.memory.reader import keep_reader, load_reader, shipped_reader
from nightschool.memory.signals import COEFFICIENTS, censor_id, label
from nightschool.memory.store import MemoryStore
from nightschool.settings import CensorSettings

LOW = CensorSettings(refit_from=20)


def talk(store: MemoryStore, user: str, *said: str, thumbs: dict[int, float] | None = None) -> None:
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(said)]
    reviews = {n: Review(rating=value) for n, value in (thumbs or {}).items()}
    store.record_conversation(messages, user_id=user, session_id=user, created_utc=1.0, reviews=reviews)


def reading(store: MemoryStore, settings: CensorSettings = LOW) -> Reading:
    interactions = list(store.interactions())
    vectors = store.request_vectors([i.id for i in interactions])
    return read(store, Prompts(interactions, {}), store.feedback(), vectors, settings)


@pytest.fixture
def rated(store: MemoryStore) -> MemoryStore:
    """Thirty people who like short answers, and one who says nothing of a short and a long one."""
    for n in range(30):
        short = n % 2 == 0
        reply = (
            f"yes {n}" if short else f"well {n} it depends on many things and so I would rather not say a word about it"
        )
        talk(store, f"u{n}", f"question {n}", reply, thumbs={1: 1.0 if short else -1.0})
    talk(store, "silent", "question a", "yes 77")
    talk(
        store, "quiet", "question b", "well 88 it depends on many things and so I would rather not say a word about it"
    )
    return store


def test_unrated_turns_are_read_and_rated_ones_are_not(store: MemoryStore):
    talk(store, "a", "Do you like films?", "tacos are tacos", "What? That makes no sense", "bye", thumbs={3: 1.0})
    found = reading(store)
    first, second = store.interactions()
    assert found.reader_id == shipped_reader().id
    assert found.signals[first.id].name == "learned"
    assert second.id not in found.signals


def test_reading_can_be_switched_off_and_stops_at_its_budget(store: MemoryStore):
    talk(store, "a", "Do you like films?", "tacos are tacos", "What do you mean?", "I love novels.")
    assert reading(store, replace(LOW, read_turns=0)) == Reading()
    assert len(reading(store, replace(LOW, read_turns=1)).signals) == 1


def test_vectors_of_another_embedder_are_not_read(quick_store: MemoryStore):
    talk(quick_store, "a", "Do you like films?", "tacos are tacos")
    assert reading(quick_store) == Reading()


def test_enough_ratings_of_ones_own_make_a_reader_of_ones_own(rated: MemoryStore):
    found = reading(rated)
    short, long = (next(i for i in rated.interactions() if i.user_id == user) for user in ("silent", "quiet"))
    assert found.signals[short.id].name == "learned_at_home"
    assert found.signals[short.id].value > found.signals[long.id].value
    (kept,) = rated.settings.home.glob("censor-*.safetensors")
    assert load_reader(kept).id == found.reader_id != shipped_reader().id


def test_what_a_reader_was_fitted_on_is_a_source_of_what_it_labels(rated: MemoryStore):
    settings = replace(rated.settings, censor=LOW)
    talk(rated, "chatty", "question b", "yes 1", "and more?", "yes 2", thumbs={1: 1.0})
    snapshot = freeze(rated, settings, now=2.0)
    fitted_on = {*snapshot.reader_ids}
    assert fitted_on & rated.feedback().keys() and fitted_on - rated.feedback().keys()  # rated, and what stands around
    assert freeze(rated, replace(settings, censor=replace(LOW, read_turns=0)), now=2.0).reader_ids == ()


def test_a_reader_of_what_is_forgotten_while_it_is_fitted_is_not_kept(rated: MemoryStore):
    reader = replace(shipped_reader(), at_home=True)
    rated.keep_reader(reader, [i.id for i in rated.interactions()])
    (kept,) = rated.settings.home.glob("censor-*.safetensors")
    ids = [i.id for i in rated.interactions()]
    rated.forget_apply(rated.forget(user_id="silent"))
    assert not kept.exists()
    rated.keep_reader(reader, ids)
    assert not kept.exists()


def test_no_reader_outlives_the_night_after_it_that_uses_none(rated: MemoryStore):
    def kept() -> int:
        return len(list(rated.settings.home.glob("censor-*.safetensors")))

    reading(rated)
    assert kept() == 1
    reading(rated, replace(LOW, read_turns=0))
    assert kept() == 0
    reading(rated)
    for interaction in list(rated.interactions()):
        rated.rate(interaction.id, rating=1.0)
    assert kept() == 1 and reading(rated) == Reading()  # nothing is left to be read
    assert kept() == 0


def test_being_liked_as_often_as_is_usual_is_no_evidence(store: MemoryStore):
    for n in range(40):
        talk(store, f"u{n}", f"question {n}", f"answer {n}", thumbs={1: -1.0 if n % 10 == 0 else 1.0})
    talk(store, "silent", "question 77", "answer 77")
    found = reading(store)
    silent = next(i for i in store.interactions() if i.user_id == "silent")
    assert found.reader_id != shipped_reader().id
    evidence = found.signals[silent.id].value * COEFFICIENTS["learned_at_home"] if silent.id in found.signals else 0.0
    assert abs(evidence) < 1.0 < log(9)  # nine of ten are liked


@pytest.mark.parametrize(
    ("satisfied", "usual", "labelled"),
    [
        (0.55, 0.9, None),  # less than usual, and rather satisfied all the same
        (0.45, 0.1, None),
        (0.99, 0.9, "liked"),
        (0.01, 0.1, "disliked"),
        (0.2, 0.9, "disliked"),
        (0.05, 0.9, "disliked"),
        (0.95, 0.5, "liked"),
    ],
)
def test_a_reader_alone_labels_what_is_far_from_the_usual_and_on_that_side_of_one_half(
    store: MemoryStore, satisfied: float, usual: float, labelled: str | None
):
    talk(store, "silent", "question 77", "answer 77")
    (asked,) = store.interactions()
    odds, shipped = log(satisfied / (1 - satisfied)), shipped_reader()
    heads = {name: replace(getattr(shipped, name), slope=0.0, offset=odds) for name in ("with_reaction", "without")}
    keep_reader(replace(shipped, **heads, at_home=True, usual=log(usual / (1 - usual))), store.settings.home)
    assert label(met(store, asked.id, LOW), LOW) == labelled


def test_too_few_or_one_sided_ratings_leave_the_shipped_reader(rated: MemoryStore):
    assert reading(rated, replace(LOW, refit_from=31)).reader_id == shipped_reader().id
    for n in range(1, 30, 2):
        rated.rate(next(i.id for i in rated.interactions() if i.user_id == f"u{n}"), rating=1.0)
    assert reading(rated).reader_id == shipped_reader().id


def test_what_was_forgotten_is_in_no_reader_of_the_next_night(rated: MemoryStore):
    before = reading(rated).reader_id
    rated.forget_apply(rated.forget(user_id="u0"))
    assert not list(rated.settings.home.glob("censor-*"))
    after = reading(rated).reader_id
    assert after != before
    assert [path.name for path in rated.settings.home.glob("censor-*")] == [f"censor-{after[3:]}.safetensors"]


# -- one reply ---


def test_what_the_night_read_is_shown_of_one_reply_with_the_version_that_scored_it(rated: MemoryStore):
    found = reading(rated)
    for user in ("silent", "quiet"):
        asked = next(i for i in rated.interactions() if i.user_id == user)
        satisfaction = met(rated, asked.id, LOW)
        assert found.signals[asked.id] in satisfaction.signals
        assert satisfaction.censor == censor_id(found.reader_id)


def test_a_reply_is_met_as_its_thumb_says_whatever_is_read(rated: MemoryStore):
    asked = next(i for i in rated.interactions() if i.user_id == "u1")
    satisfaction = met(rated, asked.id, LOW)
    assert (satisfaction.score, satisfaction.explicit) == (-1.0, True)
    assert satisfaction.censor == censor_id()


def test_the_reader_that_ships_reads_one_reply_before_the_first_night_and_none_if_switched_off(store: MemoryStore):
    talk(store, "a", "Do you like films?", "tacos are tacos", "What? That makes no sense", "")
    first, unanswered = store.interactions()
    satisfaction = met(store, first.id, LOW)
    assert {"learned", "confusion"} <= {s.name for s in satisfaction.signals}
    assert satisfaction.censor == censor_id(shipped_reader().id)
    assert "learned" not in {s.name for s in met(store, first.id, replace(LOW, read_turns=0)).signals}
    assert met(store, unanswered.id, LOW).censor == censor_id()
    with pytest.raises(NotFound, match="b2:gone"):
        met(store, "b2:gone", LOW)


def test_one_reply_is_not_read_from_vectors_of_another_embedder(quick_store: MemoryStore):
    talk(quick_store, "a", "Do you like films?", "tacos are tacos")
    (asked,) = quick_store.interactions()
    satisfaction = met(quick_store, asked.id, LOW)
    assert satisfaction.censor == censor_id()
    assert [s.name for s in satisfaction.signals] == ["session_end"]


def test_a_request_sent_again_by_the_button_is_not_read_as_a_reaction(store: MemoryStore):
    asked, other = ("Do you like films?", "tacos are tacos"), "Yes, a lot."
    talk(store, "a", *asked)
    talk(store, "b", *asked, asked[0], other)
    alone, first, _ = store.interactions()
    store.rate(first.id, event="regenerated")
    found = reading(store).signals
    assert found[first.id] == found[alone.id]


def test_the_same_memory_gives_the_same_snapshot_with_what_was_read(rated: MemoryStore):
    settings = replace(rated.settings, censor=LOW)
    first, again = (freeze(rated, settings, now=2.0) for _ in range(2))
    assert first.id == again.id
