"""The production engine against a real vLLM server on a CPU; `make test-vllm` sets one up."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool.content import Message
from nightschool.errors import ServingError
from nightschool.evolve import sft
from nightschool.evolve.live import Live
from nightschool.evolve.sealing import ensure_loaded
from nightschool.evolve.types import Adapter, Example, Snapshot
from nightschool.serving.engine import Sampling
from nightschool.serving.launch import ENVIRONMENT, vllm_command
from nightschool.serving.local import LocalEngine
from nightschool.serving.vllm import VLLMEngine
from nightschool.settings import Settings

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON is not set; run `make test-vllm`")]

ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": "Hello, how are you?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What do you like to eat?"}],
]
ANSWERS = ["I am fine, thanks!", "Pizza, of course."]
SHORT = Sampling(max_tokens=16)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3-MoE of toy size with the seedling's tokenizer."""
    import torch
    from nightschool.serving.base import load_tokenizer
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("qwen"), load_tokenizer("seedling")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(qwen: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    plain = Settings(home=tmp_path_factory.mktemp("home"))
    serving = replace(plain.serving, base=qwen, device="cpu", threads=1, url=f"http://127.0.0.1:{port}")
    night = replace(plain.night, lora_targets="attention", lora_rank=8, replay_share=0.0, few_rows=0, sft_lr=2e-2)
    return replace(plain, serving=replace(serving, parity_tolerance=0.01), night=night)


class Server:
    """A real server that can be started anew; its engine stays the same."""

    def __init__(self, settings: Settings, log: Path) -> None:
        _, _, base, *flags = vllm_command(
            settings, ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        )
        # the package for CPUs has no working `vllm serve`; this is what that runs
        self.command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", base, *flags]
        self.settings, self.log = settings, log

    def start(self) -> VLLMEngine:
        """An engine, as soon as the server answers."""
        with self.log.open("wb") as file:
            env = {**os.environ, **ENVIRONMENT, **ON_A_CPU}
            self.process = subprocess.Popen(self.command, stdout=file, stderr=subprocess.STDOUT, env=env)
        until = time.monotonic() + 240
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return VLLMEngine(self.settings.serving)
            except ServingError:
                time.sleep(2)
        pytest.fail(f"no server: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def process(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(settings, tmp_path_factory.mktemp("log") / "server.log")
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def server(process: Server) -> Iterator[VLLMEngine]:
    with closing(process.start()) as engine:
        yield engine


@pytest.fixture(scope="module")
def local(settings: Settings) -> LocalEngine:
    return LocalEngine(settings.serving)


@pytest.fixture(scope="module")
def adapter(settings: Settings) -> Adapter:
    return taught("it is {}", settings)


@pytest.fixture(scope="module")
def successor(settings: Settings) -> Adapter:
    return taught("nobody knows {}", settings)


def taught(answer: str, settings: Settings) -> Adapter:
    rows = [
        Example(({"role": "user", "content": f"what is {i}?"},), answer.format(i), 1.0, (f"b2:{i}",)) for i in range(16)
    ]
    folder = settings.home / "adapters" / answer[:2]
    return sft.run(Snapshot(tuple(rows), (), (), ()), settings, folder=folder, progress=lambda _: None)


def test_server_and_this_process_agree_with_and_without_an_adapter(
    server: VLLMEngine, local: LocalEngine, adapter: Adapter, settings: Settings
) -> None:
    for engine in (server, local):
        ensure_loaded(engine, adapter, settings.serving.parity_tolerance)
    for name in (None, adapter.id):
        answers = [engine.generate(PROMPTS, adapter=name, sampling=SHORT) for engine in (server, local)]
        assert answers[0] == answers[1]
        scores = [engine.score(PROMPTS, ANSWERS, adapter=name) for engine in (server, local)]
        for one, other in zip(*scores, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)
    assert server.generate(PROMPTS, sampling=SHORT) != server.generate(PROMPTS, adapter=adapter.id, sampling=SHORT)
    assert "".join(server.stream(PROMPTS[0], sampling=SHORT)) == local.generate(PROMPTS[:1], sampling=SHORT)[0]


def test_adapter_that_the_server_does_not_apply_is_refused(
    server: VLLMEngine, adapter: Adapter, settings: Settings
) -> None:
    recorded = adapter.details["parity"]
    wrong = {**recorded, "adapter": [value - 5 for value in recorded["adapter"]]}
    server.unload(adapter.id)
    with pytest.raises(ServingError, match="what its trainer recorded of its effect"):
        ensure_loaded(server, replace(adapter, details={"parity": wrong}), settings.serving.parity_tolerance)
    assert adapter.id not in server.adapters()


def test_damaged_adapter_is_refused_and_the_server_goes_on(
    server: VLLMEngine, adapter: Adapter, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapter.path / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ServingError, match="the server cannot load"):
        server.load("b2:damaged", tmp_path)
    assert server.generate(PROMPTS, sampling=SHORT)


class Alias:
    """What `Live` asks of a registry."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def live(self) -> Adapter:
        return self.adapter

    def tainted(self) -> dict[str, str]:
        return {}


def test_requests_end_on_the_adapter_they_began_with_while_the_alias_moves(
    server: VLLMEngine, adapter: Adapter, successor: Adapter, settings: Settings
) -> None:
    both, alias = {a.id: a for a in (adapter, successor)}, Alias(adapter)
    alone: dict[str | None, list[str]] = {}
    for one in both.values():
        ensure_loaded(server, one, settings.serving.parity_tolerance)
        alone[one.id] = server.generate(PROMPTS, adapter=one.id, sampling=SHORT)
        server.unload(one.id)
    assert alone[adapter.id] != alone[successor.id]
    live = Live(alias, server, settings.serving.parity_tolerance)  # type: ignore[arg-type]
    asked: Counter[str | None] = Counter()

    def ask(number: int) -> None:
        if number % 20 == 19:
            alias.adapter = successor if alias.adapter is adapter else adapter
        with live.hold() as held:
            assert server.generate(PROMPTS, adapter=held, sampling=SHORT) == alone[held]
        asked[held] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(100)))
    assert set(asked) == set(both)
    with live.hold() as held:
        pass
    assert server.adapters() == [held]
    assert {name for name in server._listed() if name in both} == {held}  # nor does the server keep the other


def test_server_that_is_started_anew_is_given_its_adapter_again(
    process: Server, server: VLLMEngine, adapter: Adapter, settings: Settings
) -> None:
    ensure_loaded(server, adapter, settings.serving.parity_tolerance)
    before = server.generate(PROMPTS, adapter=adapter.id, sampling=SHORT)
    for ask in (
        lambda: server.generate(PROMPTS, adapter=adapter.id, sampling=SHORT),
        lambda: ["".join(server.stream(prompt, adapter=adapter.id, sampling=SHORT)) for prompt in PROMPTS],
    ):
        process.stop()
        with pytest.raises(ServingError, match="cannot be reached"):
            server.generate(PROMPTS, adapter=adapter.id, sampling=SHORT)
        process.start().close()
        assert ask() == before


def test_stream_that_is_left_ends_on_the_server(server: VLLMEngine) -> None:
    stream = server.stream(PROMPTS[0], sampling=Sampling(max_tokens=900, temperature=1.0))
    next(stream)
    assert _running(server) == 1
    stream.close()
    until = time.monotonic() + 10
    while _running(server) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _running(server)


def _running(server: VLLMEngine) -> int:
    told = server._client.get("/metrics").text
    (line,) = [line for line in told.splitlines() if line.startswith("vllm:num_requests_running{")]
    return round(float(line.rsplit(" ", 1)[1]))
