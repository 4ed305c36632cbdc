"""Callers that share the model: who joins whom, what is not read twice, and who is left in peace when one fails."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from nightschool.content import Message
from nightschool.errors import InputError, ServingError
from nightschool.serving import batching
from nightschool.serving.adapters import BASE, Lora
from nightschool.serving.base import load_base, lora_targets
from nightschool.serving.batching import CARD, CPU, Prefixes
from nightschool.serving.decoding import Batch
from nightschool.serving.engine import Sampling, Score
from nightschool.serving.local import LocalEngine
from nightschool.serving.lora import as_named
from nightschool.settings import ServingSettings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache

PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": "Hello."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the station?"}],
    [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C, please"}],
]
LONG = Sampling(max_tokens=40)


@pytest.fixture(scope="module")
def adapters(toy_base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random LoRA adapters of different ranks and scales."""
    found: dict[str, Path] = {}
    for rank, rslora in ((2, False), (4, False), (8, True)):
        model = load_base(toy_base, dtype=torch.float32, device="cpu")
        torch.manual_seed(rank)
        config = LoraConfig(
            r=rank, lora_alpha=8, use_rslora=rslora, target_modules=lora_targets(model.config, "attention+mlp")
        )
        with as_named(model):
            lora = get_peft_model(model, config)
        for name, p in lora.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        found[f"b2:{rank}"] = tmp_path_factory.mktemp("adapter")
        lora.save_pretrained(found[f"b2:{rank}"])
    return found


def test_thread_of_the_engine_has_its_number_of_threads_whatever_holds_when_it_begins(toy_base: str) -> None:
    before = torch.get_num_threads()
    try:
        engine = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=2))
        torch.set_num_threads(1)  # as an embedder does for a while
        assert engine._batcher.hand_in(torch.get_num_threads).result() == 2
        engine.close()
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(toy_base: str, adapters: dict[str, Path]) -> LocalEngine:
    engine = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
    engine._ends = frozenset()  # every answer has its full length
    for name, path in adapters.items():
        engine.load(name, path)
    return engine


@pytest.fixture
def engine(loaded: LocalEngine):
    """With no memory of what other tests asked."""
    loaded._batcher._prefixes = Prefixes(8192)
    yield loaded
    assert wait_until(lambda: not loaded._batcher._working)
    assert not loaded._batcher._batches and not loaded._batcher._waiting


def wait_until(condition: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


class Watched:
    """The engine's forward pass, slow enough to be met, with what went through it, and a fault where one is wanted."""

    def __init__(self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inner, self.pause, self.faulty = engine._next, 0.0, lambda ids: False
        self.shapes: list[tuple[int, int]] = []
        monkeypatch.setattr(engine._batcher, "_forward", self)

    def __call__(self, deltas: Any, **inputs: Any) -> Any:
        time.sleep(self.pause)
        self.shapes.append(tuple(inputs["input_ids"].shape))
        if self.faulty(inputs["input_ids"]):
            raise RuntimeError("a fault")
        return self.inner(deltas, **inputs)


@pytest.fixture
def watched(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(engine, monkeypatch)


def ask_all(engine: LocalEngine, questions: list[tuple[list[Message], str | None, Sampling]]) -> list[str]:
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda q: engine.generate([q[0]], adapter=q[1], sampling=q[2])[0], questions))


# -- one batch ---


def test_callers_with_different_adapters_lengths_and_sampling_share_a_batch(
    engine: LocalEngine, watched: Watched
) -> None:
    samplings = [Sampling(30), Sampling(20, temperature=1.0, seed=5), Sampling(25, temperature=0.7, top_p=0.9)]
    names = [None, "b2:2", "b2:4", "b2:8"]
    questions = [(PROMPTS[i % 3], names[i % 4], samplings[i % 3]) for i in range(12)]
    alone = [engine.generate([prompt], adapter=name, sampling=s)[0] for prompt, name, s in questions]
    assert max(rows for rows, _ in watched.shapes) == 1
    watched.pause = 0.01
    assert ask_all(engine, questions) == alone
    assert max(rows for rows, _ in watched.shapes) >= 8


def test_card_steps_more_rows_together_than_it_reads_and_a_cpu_no_more_than_before(
    engine: LocalEngine, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: dict[str, list[str]] = {}
    for limits in (CPU, CARD):
        monkeypatch.setattr(engine._batcher, "limits", limits)
        watched.shapes.clear()
        together[str(limits)] = engine.generate(PROMPTS[:1] * 40, sampling=Sampling(4, temperature=1.0))
        assert max(rows for rows, width in watched.shapes if width > 1) == 32
        assert max(rows for rows, width in watched.shapes if width == 1) == (32 if limits is CPU else 40)
    assert together[str(CPU)] == together[str(CARD)]


def test_adapter_of_any_rank_and_scale_scores_as_in_peft(
    engine: LocalEngine, adapters: dict[str, Path], toy_base: str
) -> None:
    texts = ["Hi!", "Over there.", "D"]
    for name, path in adapters.items():
        model = load_base(toy_base, dtype=torch.float32, device="cpu")
        with as_named(model):
            peft = PeftModel.from_pretrained(model, path).eval()
        reference = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
        reference._model = peft
        for ours, theirs in zip(
            engine.score(PROMPTS, texts, adapter=name), reference.score(PROMPTS, texts), strict=True
        ):
            assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)


def test_newcomer_joins_an_answer_that_is_on_its_way(engine: LocalEngine, watched: Watched) -> None:
    expected = engine.generate(PROMPTS[1:2], sampling=Sampling(5))
    pieces = engine.stream(PROMPTS[0], sampling=Sampling(200))
    watched.pause = 0.01
    next(pieces)
    assert engine.generate(PROMPTS[1:2], sampling=Sampling(5)) == expected
    assert watched.shapes[-1] == (2, 1)  # the long answer goes on
    pieces.close()


def test_many_prompts_do_not_keep_a_short_question_waiting(engine: LocalEngine, watched: Watched) -> None:
    watched.pause = 0.002
    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(engine.generate, PROMPTS * 60, sampling=LONG)
        assert wait_until(lambda: watched.shapes)
        engine.generate(PROMPTS[:1], sampling=Sampling(3))
        assert not many.done()
        assert many.result() == engine.generate(PROMPTS, sampling=LONG) * 60


def test_scores_and_answers_of_threads_do_not_disturb_each_other(engine: LocalEngine) -> None:
    answers = ["Hi!", "Over there.", "D"]
    scored = engine.score(PROMPTS, answers, adapter="b2:4")
    said = engine.generate(PROMPTS, adapter="b2:2", sampling=LONG)
    with ThreadPoolExecutor(4) as pool:
        saying = [pool.submit(engine.generate, PROMPTS, adapter="b2:2", sampling=LONG) for _ in range(2)]
        scoring = [pool.submit(engine.score, PROMPTS, answers, adapter="b2:4") for _ in range(6)]
    assert all(f.result() == said for f in saying) and all(f.result() == scored for f in scoring)


# -- what was read before ---


def talk(turns: int) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}, " + "abc " * 8} for i in range(turns)]


def test_next_turn_reads_only_what_is_new_and_is_answered_alike(engine: LocalEngine, watched: Watched) -> None:
    first = talk(5)
    (answer,) = engine.generate([first], adapter="b2:4", sampling=LONG)
    longer = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    watched.shapes.clear()
    (reused,) = engine.generate([longer], adapter="b2:4", sampling=LONG)
    assert watched.shapes[0][1] < 100 < len(engine._prompt(first, 40))
    engine._batcher._prefixes = Prefixes(0)
    assert reused == engine.generate([longer], adapter="b2:4", sampling=LONG)[0]


def test_log_probabilities_after_a_reused_prefix_are_those_of_reading_anew(engine: LocalEngine) -> None:
    ids = torch.tensor([engine._prompt(talk(7), 40)])
    engine.generate([talk(5)], sampling=LONG)
    past = engine._batcher._prefixes.longest(BASE, ids[0].tolist())
    read = past.get_seq_length()
    assert read > 100
    anew, _ = engine._next({}, input_ids=ids)
    again, _ = engine._next({}, input_ids=ids[:, read:], past_key_values=past)
    assert torch.allclose(anew.log_softmax(-1), again.log_softmax(-1), atol=1e-4)


def test_what_one_adapter_read_is_not_reused_by_another(engine: LocalEngine, watched: Watched) -> None:
    engine.generate([talk(5)], adapter="b2:4", sampling=LONG)
    ids = engine._prompt(talk(7), 40)
    for name in (None, "b2:2", "b2:8"):
        assert engine._batcher._prefixes.longest(engine._lora(name), ids) is None
    assert engine._batcher._prefixes.longest(engine._lora("b2:4"), ids) is not None


def test_answer_is_delivered_also_where_there_is_no_room_to_keep_what_was_read(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    expected = engine.generate([talk(5), talk(7)], sampling=LONG)
    monkeypatch.setattr(Batch, "read_so_far", full)
    monkeypatch.setattr("nightschool.serving.decoding._side_by_side", full)  # nor to go on in one batch
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda n: engine.generate([talk(n)], sampling=LONG)[0], (5, 7)))
    assert said == expected


def test_prefixes_leave_by_disuse_within_their_limit() -> None:
    kept, lora = Prefixes(200), Lora({})
    layers = [(torch.zeros(1, 1, 80, 2), torch.zeros(1, 1, 80, 2))]
    for start in (0, 100):
        kept.add(lora, list(range(start, start + 80)), layers)
    assert isinstance(kept.longest(lora, [*range(80), 999]), DynamicCache)
    kept.add(lora, list(range(200, 280)), layers)
    assert kept.longest(lora, [*range(100, 180), 999]) is None
    assert kept.longest(lora, [*range(80), 999]).get_seq_length() == 80
    kept.add(lora, list(range(300)), layers)  # longer than all that may be kept
    assert kept.longest(lora, list(range(250))) is None
    assert kept.longest(lora, [*range(200, 280), 999]) is not None  # and none had to leave for it


# -- late, given up, broken ---


def test_late_answer_is_an_error_that_says_how_far_it_came_and_others_go_on(
    engine: LocalEngine, watched: Watched
) -> None:
    (expected,) = engine.generate(PROMPTS[:1], sampling=LONG)
    watched.pause = 0.02
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.generate, PROMPTS[:1], sampling=LONG)
        with pytest.raises(ServingError, match=r"within timeout_s = 0.2;.* \d+ of at most 400 tokens"):
            engine.generate(PROMPTS[1:], sampling=Sampling(400, timeout_s=0.2))
        assert other.result() == [expected]


def test_cancelled_answers_end_at_once_and_others_go_on(engine: LocalEngine, watched: Watched) -> None:
    (expected,) = engine.generate(PROMPTS[:1], sampling=LONG)
    watched.pause, cancel = 0.02, threading.Event()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(engine.generate, PROMPTS[:1], sampling=LONG)
        cancelled = pool.submit(engine.generate, PROMPTS, sampling=Sampling(400), cancel=cancel)
        assert wait_until(lambda: len(watched.shapes) > 5)
        cancel.set()
        with pytest.raises(ServingError, match=r"was cancelled; \d+ of at most 400 tokens"):
            cancelled.result()
        assert other.result() == [expected]
    assert len(watched.shapes) < 200


def test_scores_end_between_two_passes_when_cancelled_or_late(
    engine: LocalEngine, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightschool.serving.local.SCORED_TOKENS", 1)  # a pass for each answer
    prompts, answers, cancel = PROMPTS[:1] * 50, ["So it is."] * 50, threading.Event()
    passes: list[int] = []

    def counted(*rows: Any) -> list[Score]:
        passes.append(1)
        time.sleep(0.05)
        if len(passes) == 3:
            cancel.set()
        return LocalEngine._score_batch(engine, *rows)

    monkeypatch.setattr(engine, "_score_batch", counted)
    with pytest.raises(ServingError, match="was cancelled"):
        engine.score(prompts, answers, cancel=cancel)
    assert len(passes) == 3
    with pytest.raises(ServingError, match=r"not done within timeout_s = 1;"):
        engine.score(prompts, answers, timeout_s=1.0)
    assert 3 < len(passes) < 50
    assert len(engine.score(prompts, answers, timeout_s=60)) == 50


@pytest.mark.parametrize("how", ["time", "cancel", "stream"])
def test_answer_ends_at_its_limit_also_while_the_model_is_in_a_pass(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    began, ends = threading.Event(), threading.Event()
    forward = engine._batcher._forward

    def slow(*given: Any, **named: Any) -> Any:
        began.set()
        ends.wait(20)
        return forward(*given, **named)

    monkeypatch.setattr(engine._batcher, "_forward", slow)
    cancel, limited = threading.Event(), Sampling(8, timeout_s=0.0 if how == "cancel" else 0.3)
    threading.Timer(0.3, cancel.set).start()
    try:
        with pytest.raises(ServingError, match=r"not done within|was cancelled"):
            if how == "stream":
                list(engine.stream(PROMPTS[0], sampling=limited))
            else:
                engine.generate(PROMPTS[:1], sampling=limited, cancel=cancel if how == "cancel" else None)
        assert began.is_set() and not ends.is_set()
    finally:
        ends.set()
    monkeypatch.undo()
    assert engine.generate(PROMPTS[:1], sampling=Sampling(8))


def test_scores_that_are_late_in_their_last_pass_are_an_error(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ends = threading.Event(), threading.Event()

    def slow(*_: Any) -> list[Score]:
        began.set()
        ends.wait(20)
        return [Score((0.0,))]

    monkeypatch.setattr(engine, "_score_batch", slow)
    try:
        with pytest.raises(ServingError, match="not done within"):
            engine.score(PROMPTS[:1], ["So it is."], timeout_s=0.3)
        assert began.is_set()
        cancel = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(engine.score, PROMPTS[:1], ["So it is."], cancel=cancel)
            cancel.set()
            with pytest.raises(ServingError, match="was cancelled"):
                waiting.result(10)
    finally:
        ends.set()


def test_cancel_that_is_no_event_is_refused_and_others_are_answered(engine: LocalEngine) -> None:
    with pytest.raises(InputError, match="cancel is a bool"):
        engine.generate(PROMPTS, sampling=LONG, cancel=True)  # type: ignore[arg-type]
    assert engine.generate(PROMPTS[:1], sampling=LONG)


def test_closed_stream_leaves_the_batch(engine: LocalEngine, watched: Watched) -> None:
    watched.pause = 0.01
    pieces = engine.stream(PROMPTS[0], sampling=Sampling(400))
    next(pieces)
    pieces.close()
    assert wait_until(lambda: not engine._batcher._working)
    assert len(watched.shapes) < 100


def test_row_that_breaks_its_batch_fails_alone(engine: LocalEngine, watched: Watched) -> None:
    expected = engine.generate(PROMPTS, sampling=LONG)
    marked = list(engine._prompt([{"role": "user", "content": "@"}], 40))
    watched.faulty = lambda ids: any(row[-len(marked) :] == marked for row in ids.tolist())
    watched.pause = 0.005
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(engine.generate, [p], sampling=LONG) for p in PROMPTS]
        bad = pool.submit(engine.generate, [[{"role": "user", "content": "@"}]], sampling=LONG)
        with pytest.raises(ServingError, match=r"broke off after 0 tokens: a fault"):
            bad.result()
        assert [f.result()[0] for f in good] == expected


def test_fault_that_passes_costs_nobody_an_answer(engine: LocalEngine, watched: Watched) -> None:
    expected = engine.generate(PROMPTS, sampling=LONG)
    watched.shapes.clear()
    watched.faulty = lambda ids: len(watched.shapes) == 7
    assert engine.generate(PROMPTS, sampling=LONG) == expected


def test_figures_that_are_not_finite_are_an_error_of_their_row(engine: LocalEngine, watched: Watched) -> None:
    inner, calls = watched.inner, []

    def damaged(deltas: Any, **inputs: Any) -> Any:
        logits, cache = inner(deltas, **inputs)
        calls.append(1)
        return logits * float("nan") if len(calls) == 3 else logits, cache

    watched.inner = damaged
    with pytest.raises(ServingError, match=r"broke off after 2 tokens: .*not finite"):
        engine.generate(PROMPTS[:1], sampling=LONG)


def test_error_inside_the_thread_reaches_its_callers(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(engine._batcher._prefixes, "longest", lambda *_: 1 / 0)
        with pytest.raises(ServingError, match="division by zero"):
            engine.generate(PROMPTS, sampling=LONG)
    with pytest.raises(ZeroDivisionError):
        engine._batcher.hand_in(lambda: 1 / 0).result()
    assert all(engine.generate(PROMPTS, sampling=LONG))


def test_thread_that_cannot_be_started_is_an_error_and_the_next_call_is_answered(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine.generate(PROMPTS[:1], sampling=LONG)
    while engine._batcher._working:  # the thread of that call ends by itself
        time.sleep(0.01)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(ServingError, match="cannot start its thread"):
            engine.generate(PROMPTS[:1], sampling=LONG)
        with pytest.raises(ServingError, match="cannot start its thread"):
            engine.score(PROMPTS[:1], ["yes"])
    assert all(engine.generate(PROMPTS, sampling=LONG))


def test_closed_engine_lets_go_of_the_model_and_says_so(toy_base: str) -> None:
    engine = LocalEngine(ServingSettings(base=toy_base, device="cpu", threads=1))
    model = weakref.ref(engine._model)
    pieces = engine.stream(PROMPTS[0], sampling=LONG)
    next(pieces)
    engine.close()
    with pytest.raises(ServingError, match="the engine is closed"):  # it was on its way
        list(pieces)
    gc.collect()
    assert model() is None
    for ask in (lambda: engine.generate(PROMPTS), lambda: engine.score(PROMPTS[:1], ["yes"])):
        with pytest.raises(ServingError, match="the engine is closed"):
            ask()
    with pytest.raises(ServingError, match="the engine is closed"):
        engine.load("b2:1", Path("nowhere"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ("",)},
        {"timeout_s": -1.0},
        {"timeout_s": inf},
        {"seed": 2**62},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"sampling: {name} is"):
        Sampling(**wrong)


# -- adapters under load ---


def test_alias_moves_under_load_and_every_answer_is_wholly_of_one_adapter(
    engine: LocalEngine, adapters: dict[str, Path]
) -> None:
    short = Sampling(max_tokens=6)
    whole = {name: engine.generate(PROMPTS, adapter=name, sampling=short) for name in adapters}
    live = ["b2:2"]
    stop = threading.Event()

    def ask(i: int) -> bool:
        while True:
            name = live[0]
            try:
                return engine.generate([PROMPTS[i % 3]], adapter=name, sampling=short) == [whole[name][i % 3]]
            except ServingError as error:  # it left between the look at the alias and the call
                assert "is not loaded" in str(error) and live[0] != name

    def swap() -> None:
        names = list(adapters)
        while not stop.is_set():
            old, new = live[0], names[(names.index(live[0]) + 1) % 3]
            engine.load(new, adapters[new])
            live[0] = new
            engine.unload(old)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(ask, range(60)))
    finally:
        stop.set()
        swapper.join()
        for name, path in adapters.items():
            engine.load(name, path)


def test_unloaded_adapter_leaves_memory_after_its_last_answer(
    engine: LocalEngine, adapters: dict[str, Path], watched: Watched
) -> None:
    engine.load("b2:again", adapters["b2:4"])
    (expected,) = engine.generate(PROMPTS[:1], adapter="b2:again", sampling=LONG)
    held = weakref.ref(engine._lora("b2:again"))
    watched.pause = 0.01
    pieces = engine.stream(PROMPTS[0], adapter="b2:again", sampling=LONG)
    first = next(pieces)
    engine.unload("b2:again")
    gc.collect()
    assert held() is not None
    assert first + "".join(pieces) == expected
    del pieces
    assert wait_until(lambda: not engine._batcher._working)
    gc.collect()
    assert held() is None


# -- a process that ends ---

LEAVING = """
import atexit, sys, threading, time

atexit.register(lambda: tell())  # after all hooks that are registered from here on

from nightschool.errors import ServingError
from nightschool.serving.engine import Sampling
from nightschool.serving.local import LocalEngine
from nightschool.settings import ServingSettings

engine, steps, told = LocalEngine(ServingSettings(base=sys.argv[1], device="cpu", threads=1)), [], {}
engine._ends, step, prompt = frozenset(), engine._batcher._forward, [{"role": "user", "content": "Hello."}]

def counted(*args, **inputs):
    steps.append(1)
    time.sleep(0.003)
    return step(*args, **inputs)

def ask(name, tokens):
    try:
        told[name] = bool(engine.generate([prompt], sampling=Sampling(tokens, timeout_s=30)))
    except ServingError as error:
        told[name] = str(error)

def tell():
    left.join(10)
    print(told, "nightschool-engine" in [thread.name for thread in threading.enumerate()])

engine._batcher._forward = counted
left = threading.Thread(target=ask, args=("daemon", 450), daemon=True)
left.start()
while not steps:
    time.sleep(0.01)
threading.Thread(target=ask, args=("worker", 100)).start()
"""


def test_a_process_waits_for_the_step_and_for_the_answer_only_where_somebody_will_read_it(toy_base: str) -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING, toy_base], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    told = {"worker": True, "daemon": "the process ends, so the engine answers no more"}
    assert ended.stdout == f"{told} False\n"


def test_host_whose_threading_was_imported_by_a_thread_that_has_ended_is_answered(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that embeds Python: no thread of its own was started by it."""
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    monkeypatch.setattr(threading, "_main_thread", ended)
    monkeypatch.setattr(threading.current_thread(), "_daemonic", True)
    assert len(engine.generate(PROMPTS, sampling=Sampling(4, timeout_s=10))) == 3


def test_what_a_process_that_ends_does_not_answer_is_an_error(
    engine: LocalEngine, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched.pause = 0.01
    pieces, ending = engine.stream(PROMPTS[0], sampling=Sampling(400)), threading.Event()
    next(pieces)
    queued = engine._batcher.hand_in(lambda: time.sleep(0.1)), engine._batcher.hand_in(list)
    monkeypatch.setattr(batching, "ENDING", ending)
    ending.set()
    for wait in (lambda: list(pieces), queued[1].result, lambda: engine.generate(PROMPTS)):
        with pytest.raises(ServingError, match="the process ends"):
            wait()


# -- families whose cache cannot be shifted ---


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": None}
MIXED = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS |= {"shared_expert_intermediate_size": 16}
FAMILIES = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {**MIXED, **HEADS, **EXPERTS},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_states_are_answered_side_by_side_though_not_in_one_batch(
    toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(toy_base)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **SMALL, **ids, **FAMILIES[family])
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    engine = LocalEngine(ServingSettings(base=str(tmp_path), device="cpu", threads=1))
    alone = [engine.generate([prompt], sampling=LONG)[0] for prompt in PROMPTS]
    watched = Watched(engine, monkeypatch)
    watched.pause = 0.01
    assert ask_all(engine, [(p, None, LONG) for p in PROMPTS]) == alone
    assert len(set(alone)) == 3 and not engine._batcher._prefixes._kept
    engine._ends = frozenset(range(0, len(tokenizer), 5))  # so that rows of one call leave it at different times
    alone = [engine.generate([prompt], sampling=LONG)[0] for prompt in PROMPTS]
    assert engine.generate(PROMPTS, sampling=LONG) == alone and len(set(map(len, alone))) > 1
