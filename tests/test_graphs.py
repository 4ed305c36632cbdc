"""Decoding in buffers that stay in place: the same answers, whoever joins, leaves or has which adapter."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nightschool.content import Message
from nightschool.serving import graphs
from nightschool.serving.base import load_base, lora_targets
from nightschool.serving.engine import Sampling
from nightschool.serving.graphs import Buffers, Graphs
from nightschool.serving.local import LocalEngine
from nightschool.serving.lora import as_named
from nightschool.settings import ServingSettings
from peft import LoraConfig, get_peft_model
from torch import nn

PROMPTS: list[list[Message]] = [[{"role": "user", "content": "x" * n + "?"}] for n in (3, 40, 17, 29, 8)]
NAMES = [None, "b2:1", "b2:2", "b2:1", None]
LENGTHS = [24, 9, 17, 30, 5]


@pytest.fixture(scope="module")
def adapters(toy_base: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_adapter(toy_base, tmp_path_factory.mktemp("adapter"), seed) for seed in (1, 2)]


def make_adapter(base: str, folder: Path, seed: int) -> Path:
    model = load_base(base, dtype=torch.float32, device="cpu")
    torch.manual_seed(seed)
    targets = lora_targets(model.config, "attention+mlp")
    with as_named(model):
        lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    lora.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(toy_base: str, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    """On a CPU, as it decodes on a card, but for the recording; rows outgrow their first buffers."""
    monkeypatch.setattr(graphs, "LEAST_WIDTH", 16)
    engine = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
    assert engine._graphs is None and graphs.use_attention(engine._model)
    engine._graphs, engine._expansion = Graphs(engine._model, engine._modules, record=False), None
    for number, path in enumerate(adapters, 1):
        engine.load(f"b2:{number}", path)
    return engine


@pytest.fixture(scope="module")
def expected(toy_base: str, adapters: list[Path]) -> list[str]:
    plain = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
    for number, path in enumerate(adapters, 1):
        plain.load(f"b2:{number}", path)
    return [ask(plain, i) for i in range(5)]


def ask(engine: LocalEngine, i: int) -> str:
    return engine.generate([PROMPTS[i]], adapter=NAMES[i], sampling=Sampling(LENGTHS[i]))[0]


def test_single_answers_are_those_of_a_growing_cache(engine: LocalEngine, expected: list[str]) -> None:
    assert [ask(engine, i) for i in range(5)] == expected
    assert all(expected) and engine._graphs and engine._graphs._buffers


def test_rows_that_join_leave_and_mix_their_adapters_answer_as_alone(engine: LocalEngine, expected: list[str]) -> None:
    for _ in range(3):
        with ThreadPoolExecutor(5) as pool:
            assert list(pool.map(partial(ask, engine), range(5))) == expected


def test_turn_that_goes_on_where_another_ended_is_answered_as_if_read_anew(
    engine: LocalEngine, toy_base: str, adapters: list[Path]
) -> None:
    first = ask(engine, 1)
    talk: list[Message] = [*PROMPTS[1], {"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    fresh = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
    fresh.load("b2:1", adapters[0])
    wanted = fresh.generate([talk], adapter="b2:1", sampling=Sampling(20))
    assert engine._batcher._prefixes._kept
    assert engine.generate([talk], adapter="b2:1", sampling=Sampling(20)) == wanted


def test_buffers_belong_to_one_batch_at_a_time_and_few_are_kept(engine: LocalEngine, expected: list[str]) -> None:
    made = engine._graphs
    assert made is not None
    pieces = [engine.stream(PROMPTS[i], adapter=NAMES[i], sampling=Sampling(LENGTHS[i])) for i in (0, 1, 0)]
    started = [next(piece) for piece in pieces]
    assert [one + "".join(rest) for one, rest in zip(started, pieces, strict=True)] == [expected[i] for i in (0, 1, 0)]
    for i in range(5):
        ask(engine, i)
    assert len(made._buffers) <= graphs.KEPT
    engine._batcher.hand_in(lambda: None).result()  # the last answer comes before its batch is let go
    assert all(buffers.free for buffers in made._buffers)
    (key, taken) = ((1, 16, ()), made._find({}, 1, 16))
    lent = taken.lend(1)
    assert taken.key == key and made._find({}, 1, 16) is not taken
    del lent
    assert taken.free


def test_model_that_cannot_be_recorded_is_stepped_in_the_same_buffers(
    engine: LocalEngine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Buffers, "record", record)
    made = engine._graphs
    assert made is not None
    made._record = True
    slower = "cannot be recorded as a CUDA graph and is slower: operation not permitted"
    with torch.inference_mode(), pytest.warns(UserWarning, match=slower):
        assert made._run(_ready(engine)) is not None
    assert not made._record
    assert ask(engine, 0) == expected[0]


class Card:
    """The part of torch's CUDA that a recording touches; its graphs cannot be recorded, but for empty ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.underway = self.Stream(), list[object]()
        self.emptied, self.asked = 0, list[object]()
        for name, value in {
            **{"Stream": self.Stream, "CUDAGraph": lambda: self, "_get_device_index": lambda *_: 0},
            **{"current_stream": lambda *_: self.stream, "set_stream": partial(setattr, self, "stream")},
            **{"current_device": lambda: 0, "device": lambda _: nullcontext(), "synchronize": lambda: None},
            **{"empty_cache": self.empty_cache, "graph_pool_handle": lambda: (0, len(self.asked))},
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    class Stream:
        device = 0

        def __init__(self, device: object = 0) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    def empty_cache(self) -> None:
        assert not self.underway and graphs.RECORDING.locked()
        self.emptied += 1

    def end(self, device: int, pool: object) -> None:
        self.underway.remove(pool)

    def capture_begin(self, pool: object = None, **_: object) -> None:
        self.underway.append(pool)
        self.asked.append(self.stream)

    def capture_end(self) -> None:
        if self.underway != [None]:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.underway.clear()


def test_recording_that_fails_leaves_the_callers_stream_and_no_pool_in_use(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = _ready(engine)
    card = Card(monkeypatch)
    before, made = card.stream, Graphs(engine._model, engine._modules, record=True)
    with torch.inference_mode(), pytest.warns(UserWarning, match="previous error during capture"):
        assert made._run(buffers) is not None
    assert card.stream is before and not card.underway and not graphs.RECORDING.locked()
    assert card.asked == [made._stream] * 2 and made._stream is not before and not made.recording


def test_adapter_that_is_unloaded_leaves_its_buffers_also_where_it_still_answers(
    engine: LocalEngine, expected: list[str]
) -> None:
    made = engine._graphs
    assert made is not None
    ask(engine, 1)
    held = weakref.ref(next(iter(engine._adapters["b2:1"].weights.values()))[1])
    pieces = engine.stream(PROMPTS[3], adapter="b2:1", sampling=Sampling(LENGTHS[3]))
    first = next(pieces)
    assert any("q_proj" in name for buffers in made._buffers for name in buffers.deltas)
    engine.unload("b2:1")
    assert first + "".join(pieces) == expected[3]  # its rows outgrow their buffers on the way
    assert engine._batcher.hand_in(gc.collect).result() is not None
    assert held() is None and not any(buffers.deltas for buffers in made._buffers)


def test_what_is_kept_is_bound_by_its_bytes_as_well(
    engine: LocalEngine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine._graphs
    assert made is not None
    ask(engine, 0)
    ask(engine, 1)
    assert len(made._buffers) > 1 and all(buffers.bytes > 1 for buffers in made._buffers)
    monkeypatch.setattr(graphs, "KEPT_BYTES", 1)
    assert ask(engine, 2) == expected[2] and len(made._buffers) == 1


def test_full_card_is_tried_once_more_without_idle_buffers_and_goes_on_recording(
    engine: LocalEngine, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, seen = torch.OutOfMemoryError("CUDA out of memory"), list[int]()
    made, read_in = engine._graphs, Buffers.read_in
    assert made is not None
    ask(engine, 0)

    def full_once(again: Callable[..., Any]) -> Callable[..., Any]:
        faults = [full]

        def act(*args: Any) -> Any:
            seen.append(len(made._buffers))
            if faults:
                raise faults.pop()
            return again(*args)

        return act

    monkeypatch.setattr(Buffers, "read_in", full_once(read_in))
    assert ask(engine, 1) == expected[1]
    assert seen[0] > seen[1] == 1
    monkeypatch.setattr(Buffers, "read_in", read_in)
    made._buffers = [_ready(engine) for _ in range(2)]
    monkeypatch.setattr(engine, "_logits_at", full_once(engine._logits_at))
    assert engine.score(PROMPTS[:1], ["Yes."])[0].tokens and not made._buffers

    def record(*_: object) -> None:
        try:
            raise full
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Buffers, "record", record)
    made._record = True
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        made._run(_ready(engine))
    assert made.recording


def _ready(engine: LocalEngine) -> Buffers:
    """Buffers after the prompt was read."""
    from transformers import DynamicCache

    ids = torch.tensor([[5, 6, 7]])
    past = DynamicCache()
    with torch.inference_mode():
        engine._model(ids, past_key_values=past, use_cache=True)
        buffers = Buffers(engine._model, None, 1, 16, {})
        buffers.read_in(past.layers, torch.ones_like(ids), {})
        buffers.put(torch.tensor([[8]]), torch.tensor([[3]]), torch.ones((1, 4)))
    return buffers


def test_queries_that_share_a_key_attend_as_if_it_were_repeated() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    grouped, alone = nn.Module(), nn.Module()
    grouped.num_key_value_groups = 4  # type: ignore[assignment]
    key, value = torch.randn(2, 3, 2, 24, 16)
    mask = torch.rand(3, 1, 1, 24) > 0.5
    mask[..., 0] = True
    for length in (1, 5):
        query = torch.randn(3, 8, length, 16)
        found, _ = graphs.attention(grouped, query, key, value, mask, scaling=0.3)
        repeated = (t.repeat_interleave(4, 1) for t in (key, value))
        wanted, _ = sdpa_attention_forward(alone, query, *repeated, mask, scaling=0.3)
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_recorded_steps_answer_as_steps_that_are_not(toy_base: str, adapters: list[Path]) -> None:
    engine = LocalEngine(ServingSettings(base=toy_base, device="cuda"))
    for number, path in enumerate(adapters, 1):
        engine.load(f"b2:{number}", path)
    recorded = [ask(engine, i) for i in range(5)]
    assert engine._graphs and all(buffers.graph for buffers in engine._graphs._buffers)
    engine._graphs, engine._expansion = Graphs(engine._model, engine._modules, record=False), None
    assert [ask(engine, i) for i in range(5)] == recorded
