"""The client of a vLLM server, against a double that answers as the server does."""

from __future__ import annotations

import gc
import json
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Event

import httpx
import pytest
import torch
from nightschool.content import Message
from nightschool.errors import InputError, ServingError, SettingsError
from nightschool.serving import parity
from nightschool.serving.chat import answer_ids, prompt_ids
from nightschool.serving.engine import WEIGHTS, Pieces, Prompt, Sampling
from nightschool.serving.vllm import VLLMEngine
from nightschool.settings import ServingSettings
from safetensors.torch import save_file

LIMITED = Sampling(timeout_s=5.0)
WHOLE = {"finish_reason": "stop"}
PROMPT: list[Message] = [{"role": "user", "content": "Hello."}]


class Server:
    """The routes that we use: what is loaded, and completions that name their model and prompt length."""

    def __init__(self, base: str) -> None:
        self.base, self.loaded, self.asked = base, dict[str, str](), list[dict[str, object]]()
        self.context = 512
        self.fails: Callable[[httpx.Request], httpx.Response | None] = lambda request: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or b"{}")
        if failed := self.fails(request):
            return failed
        match request.url.path:
            case "/v1/models":
                base = {"id": "served", "root": self.base, "parent": None, "max_model_len": self.context}
                return httpx.Response(200, json={"data": [base, *({"id": n, "parent": "served"} for n in self.loaded)]})
            case "/v1/load_lora_adapter":
                self.loaded[body["lora_name"]] = body["lora_path"]
                return httpx.Response(200, text="loaded")
            case "/v1/unload_lora_adapter":
                known = self.loaded.pop(body["lora_name"], None)
                return httpx.Response(200 if known else 404, json={"error": {"message": "no such adapter"}})
            case _:
                return self._complete(body)

    def _complete(self, body: dict[str, object]) -> httpx.Response:
        if body["model"] not in {"served", *self.loaded}:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        self.asked.append(body)
        ids = body["prompt"]
        assert isinstance(ids, list)
        if body.get("stream"):
            pieces = [json.dumps({"choices": [{"text": text}]}) for text in ("Hi", "", " there")]
            return httpx.Response(200, text="".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]))
        listed = [None, *({str(i): {"logprob": -float(at)}} for at, i in enumerate(ids[1:], 1))]
        return httpx.Response(200, json={"choices": [{**WHOLE, "text": f"{body['model']}", "prompt_logprobs": listed}]})


@pytest.fixture
def server(toy_base: str) -> Server:
    return Server(toy_base)


@pytest.fixture
def engine(server: Server) -> Iterator[VLLMEngine]:
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(server))
    with closing(VLLMEngine(ServingSettings(base=server.base, url="http://server"), client)) as opened:
        yield opened


def test_prompts_go_as_token_ids_and_rows_draw_with_seeds_of_their_own(engine: VLLMEngine, server: Server) -> None:
    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("\n",))
    assert engine.generate([PROMPT, PROMPT], sampling=sampling) == ["served", "served"]
    first, second = sorted(server.asked, key=lambda body: str(body["seed"]))
    assert first["prompt"] == list(prompt_ids(engine._tokenizer, PROMPT, 400))
    assert (first["max_tokens"], first["temperature"], first["top_p"], first["stop"]) == (7, 0.5, 0.9, ["\n"])
    assert first["seed"] != second["seed"]


def test_streamed_pieces_come_one_by_one(engine: VLLMEngine) -> None:
    assert list(engine.stream(PROMPT)) == ["Hi", " there"]


def test_comments_and_chunks_without_a_choice_are_passed_over(engine: VLLMEngine, server: Server) -> None:
    lines = [": ping", 'data: {"choices": [{"text": "Hi"}]}', 'data: {"choices": [], "usage": {}}', "data: [DONE]", ""]
    server.fails = lambda request: only_completions(request, httpx.Response(200, text="\n\n".join(lines)))
    assert list(engine.stream(PROMPT)) == ["Hi"]


def test_a_server_that_is_none_of_vllm_is_a_clear_error(engine: VLLMEngine, server: Server) -> None:
    server.fails = lambda request: only_completions(request, httpx.Response(200, text="<html>"))
    with pytest.raises(ServingError, match="http://server does not answer as a vLLM server"):
        engine.generate([PROMPT])
    wordless = httpx.Response(200, json={"choices": [{}]})
    server.fails = lambda request: only_completions(request, wordless)
    with pytest.raises(ServingError, match="does not answer as a vLLM server: KeyError"):
        engine.generate([PROMPT])
    unscored = httpx.Response(200, json={"choices": [{**WHOLE, "text": "x"}]})
    server.fails = lambda request: only_completions(request, unscored)
    with pytest.raises(ServingError, match="no log-probabilities"):
        engine.score([PROMPT], ["Yes"])


def only_completions(request: httpx.Request, answer: httpx.Response) -> httpx.Response | None:
    return answer if request.url.path == "/v1/completions" else None


def test_a_server_that_loads_nothing_at_run_time_is_named_with_the_remedy(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    refusal = httpx.Response(404, json={"detail": "Not Found"})
    server.fails = lambda request: refusal if request.url.path == "/v1/load_lora_adapter" else None
    with pytest.raises(ServingError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        engine.load("b2:one", tmp_path)


def test_the_key_of_the_environment_opens_a_server_that_wants_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(request: httpx.Request) -> httpx.Response | None:
        return None if request.headers.get("Authorization") == "Bearer sesame" else httpx.Response(401)

    server.fails = guarded
    transport, opened = httpx.MockTransport(server), httpx.Client
    monkeypatch.setattr("nightschool.serving.vllm.httpx.Client", lambda **k: opened(**k, transport=transport))
    settings = ServingSettings(base=server.base, url="http://server")
    with pytest.raises(ServingError, match="set VLLM_API_KEY"):
        VLLMEngine(settings)
    monkeypatch.setenv("VLLM_API_KEY", "sesame\n")  # as mounted secrets end
    with closing(VLLMEngine(settings)) as engine:
        assert engine.generate([PROMPT]) == ["served"]


def test_a_stream_of_an_unknown_adapter_fails_at_the_call(engine: VLLMEngine) -> None:
    with pytest.raises(ServingError, match="b2:none is not loaded"):
        engine.stream(PROMPT, adapter="b2:none")


def test_prompt_without_messages_and_answers_without_prompts_are_malformed(engine: VLLMEngine) -> None:
    asked: Prompt = [{"role": "user", "content": "Hello."}]
    for call in (lambda: engine.generate([asked, []]), lambda: engine.stream([]), lambda: engine.score([[]], ["yes"])):
        with pytest.raises(InputError, match="a prompt holds no messages; give one of the user"):
            call()
    with pytest.raises(InputError, match="score: there are 2 prompts and 1 answers; give one answer a prompt"):
        engine.score([asked, asked], ["yes"])


def test_score_takes_the_log_probabilities_of_the_answer_alone(engine: VLLMEngine) -> None:
    (score,) = engine.score([PROMPT], ["Yes"])
    head, tail = prompt_ids(engine._tokenizer, PROMPT, 400), answer_ids(engine._tokenizer, PROMPT, "Yes")
    assert score.token_logprobs == tuple(-float(len(head) + i) for i in range(len(tail)))


def test_adapter_answers_under_its_id_and_leaves_when_unloaded(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    assert engine.adapters() == ["b2:one"] and server.loaded == {"b2:one": str(tmp_path)}
    assert engine.generate([PROMPT], adapter="b2:one") == ["b2:one"]
    engine.unload("b2:one")
    assert engine.adapters() == [] and server.loaded == {}
    with pytest.raises(ServingError, match="b2:one is not loaded"):
        engine.generate([PROMPT], adapter="b2:one")


def test_server_is_asked_past_every_proxy_and_no_longer_than_the_settings_say(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, client = list[httpx.Client](), httpx.Client
    monkeypatch.setattr("nightschool.serving.vllm.httpx.Client", lambda **how: made.append(client(**how)) or made[-1])
    settings = ServingSettings(base=server.base, url="http://127.0.0.1:1/v1/", timeout_seconds=7.0)
    with pytest.raises(ServingError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        VLLMEngine(settings)
    assert not made[0].trust_env and made[0].timeout.read == 7.0


def test_adapter_that_was_refused_answers_once_it_is_loaded_anew(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    engine._refused.add("b2:one")
    with pytest.raises(ServingError):
        engine.generate([PROMPT], adapter="b2:one")
    engine.load("b2:one", tmp_path)
    assert engine.generate([PROMPT], adapter="b2:one") == ["b2:one"]


def test_what_another_process_left_on_the_server_is_discarded_and_what_is_loaded_here_stays(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    server.loaded |= {"b2:two": "elsewhere", "b2:three": "elsewhere"}
    engine.discard({"b2:one", "b2:two", "b2:gone"})
    assert sorted(server.loaded) == ["b2:one", "b2:three"]


def test_unloaded_adapter_stays_on_the_server_until_its_last_call_ends(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    pieces = engine.stream(PROMPT, adapter="b2:one")
    assert next(pieces) == "Hi"
    engine.unload("b2:one")
    assert engine.adapters() == [] and "b2:one" in server.loaded
    assert list(pieces) == [" there"]
    assert server.loaded == {}


def test_unloaded_adapter_stays_for_a_stream_that_nobody_has_begun_to_read(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    read, dropped = (engine.stream(PROMPT, adapter="b2:one") for _ in range(2))
    engine.unload("b2:one")
    assert list(read) == ["Hi", " there"]
    assert engine.adapters() == [] and "b2:one" in server.loaded
    del dropped
    assert engine.generate([PROMPT]) == ["served"] and server.loaded == {}


@pytest.mark.parametrize("ends", ["closed", "failed"])
def test_adapter_leaves_with_its_last_stream_also_where_that_is_broken_off(
    engine: VLLMEngine, server: Server, tmp_path: Path, ends: str
) -> None:
    said = [b'data: {"choices": [{"text": "Hi"}]}\n\n', b'data: {"error": "out of memory"}\n\n']
    server.fails = lambda request: only_completions(request, httpx.Response(200, content=iter(said)))
    engine.load("b2:one", tmp_path)
    pieces = engine.stream(PROMPT, adapter="b2:one")
    assert next(pieces) == "Hi"
    engine.unload("b2:one")
    assert "b2:one" in server.loaded
    if ends == "closed":
        pieces.close()
    else:
        with pytest.raises(ServingError, match="out of memory"):
            next(pieces)
    assert server.loaded == {}


@pytest.mark.parametrize("begun", [False, True])
def test_engine_that_is_closed_leaves_nothing_of_a_stream_that_was_left(
    engine: VLLMEngine, server: Server, tmp_path: Path, begun: bool
) -> None:
    engine.load("b2:one", tmp_path)
    pieces = engine.stream(PROMPT, adapter="b2:one")
    assert not begun or next(pieces) == "Hi"
    engine.unload("b2:one")
    del pieces
    assert "b2:one" in server.loaded
    engine.close()
    assert server.loaded == {}


def within(pieces: Pieces) -> Pieces:
    yield from pieces


def in_a_circle(pieces: Pieces) -> Pieces:
    circle: list[object] = [pieces]
    circle.append(circle)
    return pieces


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("kept", [in_a_circle, within])
def test_stream_that_the_collector_finds_while_a_lock_is_held_waits_for_nobody(
    engine: VLLMEngine, server: Server, tmp_path: Path, begun: bool, kept: Callable[[Pieces], Pieces]
) -> None:
    engine.load("b2:one", tmp_path)
    left, held, collected = [kept(engine.stream(PROMPT, adapter="b2:one"))], Event(), Event()
    assert not begun or next(left[0]) == "Hi"
    engine.unload("b2:one")

    def change() -> bool:  # as another thread that loads an adapter, and needs the lock that is held here
        with engine._changing:
            held.set()
            return collected.wait(3)

    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(change)
        held.wait()
        with engine._lock:
            left.clear()
            gc.collect()
        collected.set()
        assert waited.result()
    assert engine.generate([PROMPT]) == ["served"] and server.loaded == {}


def test_address_that_httpx_takes_for_none_names_its_setting(server: Server) -> None:
    with pytest.raises(SettingsError, match=r"serving\.url is 'http://\*\*\*@1\.2\.3\.999'; it is http://HOST:PORT"):
        VLLMEngine(ServingSettings(base=server.base, url="http://ann:secret@1.2.3.999/"))


def test_an_unload_that_failed_is_made_good_at_the_next_load(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    server.fails = lambda request: httpx.Response(500) if "unload" in request.url.path else None
    with pytest.raises(ServingError, match="status 500"):
        engine.unload("b2:one")
    assert engine.adapters() == [] and "b2:one" in server.loaded
    server.fails = lambda request: None
    engine.load("b2:two", tmp_path)
    assert engine.adapters() == ["b2:two"] and list(server.loaded) == ["b2:two"]


def test_adapter_loaded_again_while_it_leaves_stays(engine: VLLMEngine, server: Server, tmp_path: Path) -> None:
    engine.load("b2:one", tmp_path)
    pieces = engine.stream(PROMPT, adapter="b2:one")
    next(pieces)
    engine.unload("b2:one")
    engine.load("b2:one", tmp_path)
    list(pieces)
    assert engine.adapters() == ["b2:one"] and "b2:one" in server.loaded


def test_server_that_was_started_anew_is_given_the_adapter_again(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    server.loaded.clear()
    assert engine.generate([PROMPT], adapter="b2:one") == ["b2:one"]
    server.loaded.clear()
    assert list(engine.stream(PROMPT, adapter="b2:one")) == ["Hi", " there"]


def test_stream_is_given_the_adapter_again_that_the_server_loses_as_it_is_asked(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    engine.load("b2:one", tmp_path)
    asked: list[str] = []

    def lose(request: httpx.Request) -> None:
        asked.append(request.url.path)
        if asked.count("/v1/completions") == 1:
            server.loaded.clear()

    server.fails = lose
    assert list(engine.stream(PROMPT, adapter="b2:one")) == ["Hi", " there"]
    asked[:] = ["/v1/completions"]
    assert list(engine.stream(PROMPT, adapter="b2:one")) == ["Hi", " there"]
    assert asked[1:] == ["/v1/completions"]  # and nothing else of one that the server has


def test_stream_of_a_base_that_the_server_has_no_more_says_so(engine: VLLMEngine, server: Server) -> None:
    missing = httpx.Response(404, json={"error": {"message": "no such model"}})
    server.fails = lambda request: only_completions(request, missing)
    with pytest.raises(ServingError, match="no such model"):
        list(engine.stream(PROMPT))


def record_parity(engine: VLLMEngine, folder: Path, off: float = 0.0) -> None:
    """What the trainer would have recorded of an adapter that changes nothing, or of one that is `off`."""
    base = [score.logprob for score in engine.score(*zip(*parity.TALKS, strict=True))]
    recorded = {"base": base, "adapter": [value - off for value in base]}
    manifest = {"base_id": engine.base_id, "details": {"parity": recorded}}
    (folder / "adapter.json").write_text(json.dumps(manifest))


def test_adapter_with_weights_that_the_server_passes_by_is_refused(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    for leaf in ("q_proj", "kv_b_proj"):
        name = f"base_model.model.model.layers.0.self_attn.{leaf}.lora_A.weight"
        save_file({name: torch.zeros(2, 4)}, tmp_path / WEIGHTS)
        if leaf == "q_proj":
            engine.load("b2:one", tmp_path)
    with pytest.raises(ServingError, match=r"b2:two has weights on kv_b_proj, .*; run `nightschool night`"):
        engine.load("b2:two", tmp_path)
    assert engine.adapters() == list(server.loaded) == ["b2:one"]


def test_adapter_that_a_new_server_answers_otherwise_with_is_refused(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    record_parity(engine, tmp_path)
    engine.load("b2:one", tmp_path)
    server.loaded.clear()
    assert engine.generate([PROMPT], adapter="b2:one") == ["b2:one"]
    record_parity(engine, tmp_path, off=100)
    server.loaded.clear()
    with pytest.raises(ServingError, match="took up no module of adapter b2:one"):
        engine.generate([PROMPT], adapter="b2:one")
    assert engine.adapters() == [] and server.loaded == {}


def test_nobody_is_answered_by_an_adapter_that_is_being_checked(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    record_parity(engine, tmp_path)
    engine.load("b2:one", tmp_path)
    record_parity(engine, tmp_path, off=100)
    server.loaded.clear()

    def slowly(request: httpx.Request) -> None:
        if b"prompt_logprobs" in request.content:
            time.sleep(0.2)

    server.fails = slowly
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(engine.generate, [PROMPT], adapter="b2:one") for _ in range(2)]
        time.sleep(0.1)  # loaded by now, and not checked yet
        asked += [pool.submit(engine.generate, [PROMPT], adapter="b2:one", sampling=LIMITED) for _ in range(2)]
        for job in asked:
            with pytest.raises(ServingError, match=r"took up no module|refused|not done within"):
                job.result()
    assert server.loaded == {}


@pytest.mark.parametrize(("off", "heard"), [(0.0, ["Hi", " there"]), (100.0, [])])
def test_stream_that_was_asked_for_as_the_check_began_waits_for_its_end(
    engine: VLLMEngine, server: Server, tmp_path: Path, off: float, heard: list[str]
) -> None:
    record_parity(engine, tmp_path, off)
    engine.load("b2:one", tmp_path)
    server.loaded.clear()
    others, loaded = list[Future[list[str]]](), Event()

    def meanwhile(request: httpx.Request) -> None:
        if b"prompt_logprobs" in request.content:
            loaded.set()
            time.sleep(0.2)
        elif b'"stream"' in request.content and not others:
            others.append(pool.submit(engine.generate, [PROMPT], adapter="b2:one"))
            assert loaded.wait(5)

    server.fails = meanwhile
    found: list[str] = []
    with ThreadPoolExecutor() as pool, suppress(ServingError):
        for piece in engine.stream(PROMPT, adapter="b2:one"):
            found.append(piece)
    assert found == heard and ("b2:one" in engine.adapters()) == bool(heard)


def test_adapter_that_another_process_loaded_is_not_loaded_twice(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    server.loaded["b2:one"] = "theirs"
    engine.load("b2:one", tmp_path)
    assert server.loaded == {"b2:one": "theirs"} and engine.adapters() == ["b2:one"]


def test_adapter_that_the_server_refuses_is_not_taken_for_loaded(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    refusal = httpx.Response(400, json={"error": {"message": "rank 64 is too high"}})
    server.fails = lambda request: refusal if "load_lora" in request.url.path else None
    with pytest.raises(ServingError, match=r"b2:one: the server cannot load .*rank 64 is too high"):
        engine.load("b2:one", tmp_path)
    assert engine.adapters() == []


def test_adapter_of_another_base_is_refused_before_the_server_is_asked(
    engine: VLLMEngine, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "adapter.json").write_text('{"base_id": "b2:other"}')
    with pytest.raises(ServingError, match="was trained on base b2:other"):
        engine.load("b2:one", tmp_path)
    assert server.loaded == {}


def test_server_of_another_base_is_refused(server: Server, toy_base: str) -> None:
    client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(Server("/some/other")))
    with pytest.raises(ServingError, match=r"serves served, not serving.base"):
        VLLMEngine(ServingSettings(base=toy_base, url="http://server"), client)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (httpx.ConnectError("refused"), "cannot be reached"),
        (httpx.ReadTimeout("slow"), "gave no answer in .* s; see serving.timeout_seconds"),
    ],
)
def test_server_that_does_not_answer_is_a_clear_error(
    engine: VLLMEngine, server: Server, fault: Exception, reason: str
) -> None:
    def fail(request: httpx.Request) -> None:
        raise fault

    server.fails = fail
    with pytest.raises(ServingError, match=reason):
        engine.generate([PROMPT])
    with pytest.raises(ServingError, match=reason):
        list(engine.stream(PROMPT))


def test_answer_that_is_not_whole_in_time_is_an_error(engine: VLLMEngine, server: Server) -> None:
    def slow(request: httpx.Request) -> None:
        if "completions" in request.url.path and request.extensions["timeout"]["read"] < 2:
            raise httpx.ReadTimeout("slow")

    server.fails = slow
    with pytest.raises(ServingError, match=r"not done within timeout_s = 1.5; allow more time"):
        engine.generate([PROMPT, PROMPT], sampling=Sampling(timeout_s=1.5))
    with pytest.raises(ServingError, match=r"within timeout_s = 1.5"):
        engine.score([PROMPT], ["So it is."], timeout_s=1.5)
    with pytest.raises(ServingError, match=r"within timeout_s = 1.5"):
        list(engine.stream(PROMPT, sampling=Sampling(timeout_s=1.5)))
    assert engine.generate([PROMPT], sampling=Sampling(timeout_s=60)) == ["served"]
    assert engine.generate([PROMPT], sampling=Sampling()) == ["served"]


def test_stream_that_goes_on_beyond_its_time_ends_with_an_error(engine: VLLMEngine, server: Server) -> None:
    def trickle() -> Iterator[bytes]:
        for _ in range(100):
            time.sleep(0.02)
            yield b'data: {"choices": [{"text": "word "}]}\n\n'

    server.fails = lambda r: httpx.Response(200, content=trickle()) if "completions" in r.url.path else None
    heard: list[str] = []
    pieces = engine.stream(PROMPT, sampling=Sampling(timeout_s=0.5))
    with pytest.raises(ServingError, match=r"within timeout_s = 0.5"):
        for piece in pieces:
            heard.append(piece)
    assert 0 < len(heard) < 100


def test_cancelled_answer_ends_on_the_server_too(engine: VLLMEngine, server: Server) -> None:
    cancel, sent = Event(), 0

    def trickle() -> Iterator[bytes]:
        nonlocal sent
        for sent in range(100):
            if sent == 10:
                cancel.set()
            yield b'data: {"choices": [{"text": "word "}]}\n\n'

    server.fails = lambda r: httpx.Response(200, content=trickle()) if "completions" in r.url.path else None
    with pytest.raises(ServingError, match="was cancelled"):
        engine.generate([PROMPT], cancel=cancel)
    assert sent == 10
    with pytest.raises(ServingError, match="was cancelled"):
        engine.score([PROMPT], ["So it is."], cancel=cancel)


def test_pieces_may_hold_whatever_parts_lines_elsewhere(engine: VLLMEngine, server: Server) -> None:
    said = "one\u2028two\x85three\x0cfour"
    event = json.dumps({"choices": [{"text": said}]}, ensure_ascii=False)
    sent = f"data: {event}\r\n\r\ndata: [DONE]".encode()
    bytewise = [sent[i : i + 1] for i in range(len(sent))]
    server.fails = lambda r: httpx.Response(200, content=iter(bytewise)) if "completions" in r.url.path else None
    assert list(engine.stream(PROMPT)) == [said]
    assert engine.generate([PROMPT], cancel=Event()) == [said]


def test_call_that_waits_for_a_check_can_be_cancelled(engine: VLLMEngine, server: Server, tmp_path: Path) -> None:
    record_parity(engine, tmp_path)
    engine.load("b2:one", tmp_path)
    server.loaded.clear()
    checking, ends, cancel = Event(), Event(), Event()

    def slowly(request: httpx.Request) -> None:
        if b"prompt_logprobs" in request.content:
            checking.set()
            ends.wait(20)

    server.fails = slowly
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine.generate, [PROMPT], adapter="b2:one")
        assert checking.wait(10)
        waiting = pool.submit(engine.generate, [PROMPT], adapter="b2:one", cancel=cancel)
        cancel.set()
        with pytest.raises(ServingError, match="was cancelled"):
            waiting.result(10)
        assert not first.done()
        ends.set()
        assert first.result() == ["b2:one"]


def test_refusal_of_the_server_is_told_in_its_words(engine: VLLMEngine, server: Server) -> None:
    server.fails = lambda request: httpx.Response(500, text="broken") if "completions" in request.url.path else None
    with pytest.raises(ServingError, match="refused: status 500"):
        engine.generate([PROMPT])
    with pytest.raises(ServingError, match="status 500"):
        list(engine.stream(PROMPT))


def test_refusal_tells_no_words_of_the_prompt_and_not_more_than_is_read(engine: VLLMEngine, server: Server) -> None:
    ids = json.dumps(list(range(1000, 3000)))
    told = {"error": {"message": f"1 validation error: input {{'prompt': {ids}, 'n': 0}}: n is at least 1" + "!" * 999}}
    server.fails = lambda request: httpx.Response(422, json=told) if "completions" in request.url.path else None
    with pytest.raises(ServingError, match="refused: 1 validation error") as refused:
        engine.generate([PROMPT])
    assert "1003" not in str(refused.value) and "n is at least 1" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_closed_engine_says_so(engine: VLLMEngine) -> None:
    begun = engine.stream(PROMPT)
    engine.close()
    for call in (lambda: engine.generate([PROMPT]), lambda: engine.score([PROMPT], ["Yes."]), lambda: list(begun)):
        with pytest.raises(ServingError, match="the engine is closed; open another"):
            call()


def test_password_of_the_address_opens_the_server_and_is_logged_nowhere(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def guarded(request: httpx.Request) -> httpx.Response | None:
        given = request.headers.get("Authorization", "").removeprefix("Basic ")
        return None if b64decode(given) == b"bob:hunter/2" else httpx.Response(403)

    server.fails = guarded
    transport, opened = httpx.MockTransport(server), httpx.Client
    monkeypatch.setattr("nightschool.serving.vllm.httpx.Client", lambda **k: opened(**k, transport=transport))
    with caplog.at_level("DEBUG"):
        settings = ServingSettings(base=server.base, url="http://bob:hunter%2F2@server")
        with closing(VLLMEngine(settings)) as engine:
            assert engine.generate([PROMPT]) == ["served"]
    assert "/v1/completions" in caplog.text
    assert "hunter" not in caplog.text


def test_answer_longer_than_the_context_is_refused(engine: VLLMEngine) -> None:
    with pytest.raises(ServingError, match="context of 512"):
        engine.generate([PROMPT], sampling=Sampling(max_tokens=512))


def test_stream_that_breaks_off_with_an_error_says_so(engine: VLLMEngine, server: Server) -> None:
    broken = httpx.Response(200, text='data: {"error": {"message": "out of memory"}}\n\n')
    server.fails = lambda request: broken if "completions" in request.url.path else None
    with pytest.raises(ServingError, match=r"the answer broke off: .*out of memory"):
        list(engine.stream(PROMPT))


def test_stream_that_breaks_off_in_the_middle_tells_none_of_the_answer(engine: VLLMEngine, server: Server) -> None:
    broken = httpx.Response(200, text='data: {"choices": [{"text": "my secret\n\n')
    server.fails = lambda request: broken if "completions" in request.url.path else None
    with pytest.raises(ServingError, match=r"the answer broke off: \d+ characters") as error:
        list(engine.stream(PROMPT))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "choice", [{"text": "Half", "finish_reason": "abort"}, {"text": "Half"}, {**WHOLE, "text": None}]
)
def test_half_an_answer_is_none(engine: VLLMEngine, server: Server, choice: dict[str, object]) -> None:
    server.fails = lambda request: only_completions(request, httpx.Response(200, json={"choices": [choice]}))
    with pytest.raises(ServingError, match="broke the answer off"):
        engine.generate([PROMPT])
    streamed = httpx.Response(200, text=f"data: {json.dumps({'choices': [choice]})}\n\n")
    server.fails = lambda request: only_completions(request, streamed)
    with pytest.raises(ServingError, match="the answer broke off"):
        list(engine.stream(PROMPT))


@pytest.mark.parametrize("key", ["one\ntwo", "schlüssel"])
def test_key_that_no_header_can_hold_is_refused_and_not_shown(
    toy_base: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(SettingsError, match="VLLM_API_KEY") as error:
        VLLMEngine(ServingSettings(base=toy_base, url="http://server"))
    assert key not in str(error.value)


def test_server_that_is_no_vllm_is_named(toy_base: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"hello": "world"}))
    client = httpx.Client(base_url="http://server", transport=transport)
    with pytest.raises(ServingError, match="does not answer as a vLLM server"):
        VLLMEngine(ServingSettings(base=toy_base, url="http://server"), client)


def test_answers_are_drawn_as_asked_and_not_as_the_checkpoint_would(engine: VLLMEngine, server: Server) -> None:
    engine.generate([PROMPT])
    (asked,) = server.asked
    assert (asked["repetition_penalty"], asked["top_k"], asked["min_p"]) == (1.0, 0, 0.0)
