import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nightschool.errors import StoreError
from nightschool.memory.cues import Exchange, scalars
from nightschool.memory.embed import MiniLM
from nightschool.memory.reader import (
    NUMBERS,
    SCALARS,
    SHIPPED,
    TREES_FROM,
    Head,
    Reader,
    along,
    features,
    fit_head,
    fit_reader,
    heard,
    keep_reader,
    load_reader,
    platt,
    readers_in,
    ridge,
    ridge_and_trees,
    save_reader,
    shipped_reader,
    split,
    unheard,
)
from nightschool.memory.trees import NO_TREES

GOOD = Exchange("What do you like to read?", "I love novels, Dickens most of all. Do you?", "Me too, he is great!")
BAD = Exchange("What do you like to read?", "tacos are a taco", "What? That makes no sense")
SESSION = Exchange("And on Sunday?", "We open at nine.", "Thanks", ("When do you open?", "hi"), ("At eight.", "Hello!"))


@pytest.fixture(scope="module")
def reader() -> Reader:
    return shipped_reader()


def vectors(embedder: MiniLM, *exchanges: Exchange) -> dict[str, np.ndarray]:
    texts = sorted({text for e in exchanges for text in e.texts if text})
    return dict(zip(texts, embedder.embed(texts), strict=True))


def test_a_coherent_welcome_answer_is_read_as_better_than_nonsense(reader: Reader, embedder: MiniLM):
    good, bad = reader.log_odds([GOOD, BAD], vectors(embedder, GOOD, BAD))
    assert good > bad


def test_an_answer_off_the_question_is_read_as_worse_without_any_reaction(reader: Reader, embedder: MiniLM):
    good, bad = (replace(e, reaction=None) for e in (GOOD, BAD))
    read = reader.log_odds([good, bad], vectors(embedder, good, bad))
    assert read[0] > read[1]


def test_the_same_exchange_is_read_alike_alone_and_among_others(reader: Reader, embedder: MiniLM):
    vector_of = vectors(embedder, GOOD, BAD, SESSION)
    together = reader.log_odds([GOOD, BAD, SESSION] * 7, vector_of)
    alone = [reader.log_odds([e], vector_of)[0] for e in (GOOD, BAD, SESSION)]
    assert together.tolist() == alone * 7


def test_any_text_and_missing_vectors_are_read(reader: Reader):
    odds = reader.log_odds([Exchange("", "", None), Exchange("\x00", "🙂" * 400, "?!")], {})
    assert np.isfinite(odds).all()
    assert reader.log_odds([], {}).shape == (0,)


def test_numbers_that_do_not_name_the_reaction_do_not_look_at_it(embedder: MiniLM, reader: Reader):
    silent = replace(SESSION, reaction=None)
    found = features([SESSION, silent], vectors(embedder, SESSION), reader.coherence)
    keep = unheard(found)
    assert np.array_equal(found[0, keep], found[1, keep])
    assert not np.array_equal(found[0], found[1])


def test_only_the_latest_turns_of_a_long_session_are_compared(embedder: MiniLM, reader: Reader):
    vector_of = vectors(embedder, SESSION)
    long = replace(SESSION, earlier_replies=(SESSION.reply, *["At eight."] * 20))
    short = replace(SESSION, earlier_replies=("At eight.",) * 20)
    assert np.array_equal(*(features([e], vector_of, reader.coherence) for e in (long, short)))


def test_scalars_have_the_same_names_for_every_exchange():
    for exchange in (GOOD, BAD, SESSION, Exchange("", "", None)):
        assert tuple(scalars(exchange)) == SCALARS


# -- fitting ---


def made(reader: Reader, embedder: MiniLM, count: int = 60) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows in which the shorter reply is the better one."""
    replies = ["yes " * (1 + n % 12) for n in range(count)]
    exchanges = [Exchange(f"question {n}", reply.strip(), None) for n, reply in enumerate(replies)]
    satisfied = np.array([float(n % 12 < 6) for n in range(count)])
    return (
        features(exchanges, vectors(embedder, *exchanges), reader.coherence),
        satisfied,
        [f"u{n % 10}" for n in range(count)],
    )


def test_a_refit_learns_what_people_here_like(reader: Reader, embedder: MiniLM):
    found, satisfied, groups = made(reader, embedder)
    own = fit_reader(found, satisfied, satisfied, groups, reader.coherence, reader.embedder)
    odds = own.without.log_odds(found)
    assert own.at_home and not reader.at_home
    assert odds[satisfied == 1].mean() > 0.3 > -0.3 > odds[satisfied == 0].mean()


def test_ratings_dealt_out_at_random_leave_the_refit_without_an_opinion(reader: Reader, embedder: MiniLM):
    found, satisfied, groups = made(reader, embedder, 240)
    shuffled = np.random.default_rng(0).permutation(satisfied)
    own = fit_reader(found, shuffled, shuffled, groups, reader.coherence, reader.embedder)
    assert np.abs(own.without.log_odds(found)).max() < 1.5


def test_the_same_ratings_in_the_same_order_give_the_same_reader(reader: Reader, embedder: MiniLM):
    found, satisfied, groups = made(reader, embedder)
    first, again = (fit_reader(found, satisfied, satisfied, groups, reader.coherence, "m") for _ in range(2))
    assert first.id == again.id != reader.id


WIDTH = 4


def two_sided(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows (count, NUMBERS + 3 WIDTH) that satisfy where a number is near the middle, which no line says."""
    found = np.random.default_rng(seed).normal(size=(count, NUMBERS + 3 * WIDTH))
    found[:, -1] *= 8
    return found, (np.abs(found[:, 0]) < 0.67).astype(float)


def right(head: Head, found: np.ndarray, satisfied: np.ndarray) -> float:
    return float(((head.log_odds(found) > 0) == (satisfied > 0.5)).mean())


def test_trees_stand_beside_the_ridge_where_there_is_enough_to_fit_them_on():
    found, satisfied = two_sided(TREES_FROM)
    groups = [f"u{n % 10}" for n in range(TREES_FROM)]
    enough = fit_head(found, heard(found), satisfied, satisfied, groups)
    fewer = fit_head(found[1:], heard(found), satisfied[1:], satisfied[1:], groups[1:])
    assert right(enough, *two_sided(400, seed=1)) > 0.7 > 0.6 > right(fewer, *two_sided(400, seed=1))
    assert fewer.trees is NO_TREES


def test_both_count_alike_on_what_they_were_fitted_on():
    found, satisfied = two_sided(600)
    line = satisfied + found[:, 0]
    head = ridge_and_trees(found, heard(found), line)
    alone = replace(head, trees=NO_TREES)
    assert alone.score(found).tolist() == ridge(found, heard(found), line).score(found).tolist()
    assert np.isclose((head.score(found) - alone.score(found)).std(), alone.score(found).std(), rtol=1e-5)


def test_trees_that_may_not_look_at_the_reaction_do_not():
    found, satisfied = two_sided(600)
    of_reaction = np.abs(found[:, -1]) / 8  # would be seen
    head = ridge_and_trees(found, unheard(found), satisfied + of_reaction)
    other = np.where(unheard(found), found, found + 5)
    assert np.array_equal(head.score(found), head.score(other))
    assert head.trees(along(found, head.axes)).std() > 0


def test_trees_that_find_nothing_to_split_say_nothing():
    found, satisfied = two_sided(600)
    rare = np.zeros_like(found)
    rare[:5, 0] = 1.0
    head = ridge_and_trees(rare, heard(rare), satisfied)
    assert head.score(rare).tolist() == ridge(rare, heard(rare), satisfied).score(rare).tolist()
    assert head.score(rare)[0] != head.score(rare)[-1]


def test_a_group_is_in_one_fold_only_and_fewer_groups_than_folds_are_refused():
    groups = [f"g{n % 7}" for n in range(50)]
    folds = split(groups)
    assert np.sum(folds, axis=0).tolist() == [1] * 50
    assert all(len({bool(fold[i]) for i in range(50) if groups[i] == name}) == 1 for fold in folds for name in groups)
    with pytest.raises(ValueError, match="4 groups"):
        split(["a", "b", "c", "d"])


def test_calibration_finds_the_odds_that_made_the_labels():
    random = np.random.default_rng(0)
    score = random.normal(size=20_000)
    labels = (random.random(20_000) < 1 / (1 + np.exp(-(0.7 * score - 0.4)))).astype(float)
    slope, offset = platt(score, labels)
    assert (round(slope, 1), round(offset, 1)) == (0.7, -0.4)


# -- files ---


def test_a_saved_reader_reads_the_same(reader: Reader, tmp_path: Path):
    save_reader(reader, tmp_path / "r.safetensors")
    again = load_reader(tmp_path / "r.safetensors")
    assert again.id == reader.id
    assert again.log_odds([GOOD], {}).tolist() == reader.log_odds([GOOD], {}).tolist()


def test_trees_fitted_at_home_are_kept_without_loss(reader: Reader, tmp_path: Path):
    found, satisfied = two_sided(600)
    head = ridge_and_trees(found, heard(found), satisfied)
    save_reader(replace(reader, with_reaction=head), tmp_path / "r.safetensors")
    again = load_reader(tmp_path / "r.safetensors").with_reaction
    unseen = along(two_sided(300, seed=1)[0], head.axes)
    assert again.trees(unseen).tolist() == head.trees(unseen).tolist() != [0.0] * 300
    assert np.array_equal(again.axes, head.axes)


def test_a_file_from_before_there_were_trees_is_read_by_its_ridge_and_keeps_its_id(reader: Reader, tmp_path: Path):
    from safetensors.numpy import load_file, save_file

    held = load_file(SHIPPED)
    late = [f"{head}.{part}" for head in ("with_reaction", "without") for part in ("axes", "roots", "nodes", "cuts")]
    earlier = {name: value for name, value in held.items() if name not in late}
    about = {"embedder": reader.embedder, "at_home": "false", "scalars": ",".join(SCALARS)}
    save_file(earlier, tmp_path / "earlier.safetensors", metadata=about)
    read = load_reader(tmp_path / "earlier.safetensors")
    save_reader(read, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == earlier.keys() == held.keys() - set(late)
    found = features([GOOD], {}, reader.coherence)
    ridge_alone = replace(reader.with_reaction, trees=NO_TREES).log_odds(found)
    assert read.log_odds([GOOD], {}).tolist() == ridge_alone.tolist() != reader.log_odds([GOOD], {}).tolist()
    assert read.id == load_reader(tmp_path / "again.safetensors").id != reader.id


def test_reading_needs_no_library_that_fits():
    read = "from nightschool.memory.cues import Exchange\nfrom nightschool.memory.reader import shipped_reader as r\n"
    read += "print(r().log_odds([Exchange('hi', 'Hello!', None)], {}).shape)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['sklearn'] = None\n{read}"], capture_output=True, text=True
    )
    assert done.stdout == "(1,)\n", done.stderr


def test_what_is_usual_goes_with_the_file_and_is_zero_for_the_one_that_ships(reader: Reader, tmp_path: Path):
    assert reader.usual == 0.0
    save_reader(replace(reader, usual=1.0986122886681098), tmp_path / "r.safetensors")
    assert load_reader(tmp_path / "r.safetensors").usual == 1.0986122886681098


def test_a_file_that_is_damaged_or_of_other_features_is_refused_by_name(reader: Reader, tmp_path: Path):
    from safetensors.numpy import save_file

    (tmp_path / "broken.safetensors").write_bytes(SHIPPED.read_bytes()[:500])
    save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors", metadata={"scalars": "words"})
    for name in ("broken", "other", "missing"):
        with pytest.raises(StoreError, match=f"{name}.safetensors"):
            load_reader(tmp_path / f"{name}.safetensors")


def test_the_coefficients_come_with_a_card_that_names_them(reader: Reader):
    assert reader.id in SHIPPED.with_suffix(".md").read_text(encoding="utf-8")


def test_reader_of_a_night_takes_the_place_of_that_of_the_night_before(reader: Reader, tmp_path):
    keep_reader(reader, tmp_path)
    newer = replace(reader, without=reader.with_reaction)
    keep_reader(newer, tmp_path)
    (kept,) = readers_in(tmp_path)
    assert load_reader(kept).id == newer.id != reader.id


def test_scores_that_tell_the_labels_apart_exactly_are_calibrated_to_finite_odds():
    slope, offset = platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert slope > 1 and np.isfinite([slope, offset]).all()


def test_store_keeps_no_reader_that_was_fitted_on_what_is_forgotten_meanwhile(reader, quick_store):
    told = quick_store.record([{"role": "user", "content": "hi"}], "ok", user_id="ann", session_id="s")
    quick_store.keep_reader(reader, [told.id, "b2:gone"])
    assert readers_in(quick_store.settings.home) == []
    quick_store.keep_reader(reader, [told.id])
    assert len(readers_in(quick_store.settings.home)) == 1
