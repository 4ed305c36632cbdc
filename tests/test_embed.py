from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from nightschool.loading import loading
from nightschool.memory.embed import READ, MiniLM, one_thread
from nightschool.serving.base import load_base
from transformers.utils import logging


def test_rows_are_float32_of_length_one_in_the_order_of_the_texts(embedder):
    texts = ["my dog is called Rex", "the pool opens at seven", ""]
    vectors = embedder.embed(texts)
    assert (vectors.shape, vectors.dtype) == ((3, embedder.dimension), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[1], embedder.embed(texts[1:2])[0], atol=2e-2)


def test_related_texts_are_nearer_than_unrelated_ones(embedder):
    asked, near, far = embedder.embed(["how old is my dog?", "the age of my puppy", "train times to Leeds"])
    assert asked @ near > asked @ far + 0.3


def test_same_text_is_embedded_once_a_call_and_has_the_same_row(embedder, monkeypatch):
    encoded: list[str] = []
    encode = embedder._model.encode
    monkeypatch.setattr(embedder._model, "encode", lambda texts, **how: encoded.extend(texts) or encode(texts, **how))
    vectors = embedder.embed(["a", "b", "a", "a"])
    assert encoded == ["a", "b"]
    assert (vectors[0] == vectors[2]).all() and (vectors[0] == vectors[3]).all() and (vectors[0] != vectors[1]).any()


def test_no_texts_are_no_rows(embedder):
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_enormous_text_is_embedded(embedder):
    assert np.isfinite(embedder.embed(["word " * 70_000])).all()


def test_no_more_of_a_long_text_is_tokenised_than_the_model_reads(embedder, monkeypatch):
    words = "the bicycle stands in the rain " * 20_000
    encode, given = embedder._model.encode, []
    monkeypatch.setattr(embedder._model, "encode", lambda texts, **said: given.extend(texts) or encode(texts, **said))
    short, long = embedder.embed([words[:10_000], words])
    assert float(short @ long) > 0.9999 and [len(text) for text in given] == [10_000, READ]


@pytest.mark.parametrize("head", ["deadbeef" * 5000, " " * 40_000, "x" * 40_000 + "\n" * 40_000])
def test_what_comes_after_a_long_word_or_many_spaces_is_read(embedder, head):
    tyre, wine, alone = embedder.embed(
        [f"{head} How do I mend a tyre?", f"{head} Which wine is it?", "Which wine is it?"]
    )
    assert float(tyre @ wine) < 0.9 and float(wine @ alone) > 0.6


def test_threads_of_torch_are_one_inside_and_as_before_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_draws_no_progress_bar_and_leaves_the_switch_as_it_was(shown, capfd):
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        MiniLM().embed(["a"])
        assert logging.is_progress_bar_enabled() is shown
        assert capfd.readouterr() == ("", "")
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_one_model_is_built_at_a_time():
    """Two at once left one of them without weights."""
    jobs = ThreadPoolExecutor(2)
    with loading():
        built = [jobs.submit(MiniLM().embed, ["a"]), jobs.submit(load_base, "seedling", dtype=torch.float32)]
        assert not wait(built, timeout=1).done
    assert built[0].result().shape == (1, 384) and not any(p.is_meta for p in built[1].result().parameters())
    jobs.shutdown()
