"""The bench of a card starts with torch, transformers and peft alone, and says why it does nothing without a card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench" / "gpu.py"
ABSENT = ("trl", "lancedb", "sqlalchemy", "alembic", "datasets", "pyarrow", "sentence_transformers", "tomlkit", "httpx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the bench would run")
def test_without_a_card_it_skips_with_its_reason_and_needs_nothing_of_the_rest() -> None:
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.argv = ['gpu.py']\n"
    code += f"runpy.run_path({str(BENCH)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: torch finds no CUDA device; `--toy`")


def test_every_part_runs_at_toy_size() -> None:
    done = subprocess.run([sys.executable, BENCH, "--toy"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["left_out"] == {}
    ours = [kind + adapter for kind in ("fp8", "fp8_fused") for adapter in ("", "_adapter")]
    theirs = ["bf16", "bf16_grouped", "bf16_static"]
    assert found["tokens_per_s"].keys() == {*ours, *theirs}
    assert all(of.keys() == {"1", "2"} and min(of.values()) > 0 for of in found["tokens_per_s"].values())
    assert found["agree"]["logits_relative"] < 0.1 and found["sft"]["loss_last"] < found["sft"]["loss_first"]
    assert found["dpo"]["loss_last"] < found["dpo"]["loss_first"] and found["fp8_over_bf16_last_batch"] > 0


def test_bench_that_is_asked_to_end_tells_what_it_measured() -> None:
    job = subprocess.Popen([sys.executable, BENCH, "--toy"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout
    begun = next(line for line in job.stdout if line.startswith("fp8, batch 1"))
    job.terminate()
    told, _ = job.communicate(timeout=60)
    found = json.loads(told.splitlines()[-1])
    assert job.returncode == 143 and f"{found['tokens_per_s']['fp8']['1']} tokens/s" in begun
    assert found["left_out"]["what was to come"] == "stopped by a signal: SystemExit(143)"


def test_most_memory_while_decoding_is_of_each_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = imported(monkeypatch)
    bench, peak = gpu.Bench(gpu.TOY, "cpu", 1.0), iter([3 << 30, 5 << 30])
    bench.device = "cuda"
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peak))
    for rows in (1, 2):
        bench.note_speed("fp8", rows, 1.0)
    bench.compare()
    assert bench.found["decode_peak_gib"] == {"fp8": {1: 3.0, 2: 5.0}}


def imported(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = spec_from_file_location("nightschool_bench_gpu", BENCH)
    assert spec and spec.loader
    gpu = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, gpu)  # dataclasses look it up there
    spec.loader.exec_module(gpu)
    return gpu


def test_what_fails_is_named_and_the_rest_is_measured_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = imported(monkeypatch)

    def refuse(*_: object) -> None:
        raise RuntimeError("the card says no")

    monkeypatch.setattr(gpu.fp8, "convert", refuse)
    monkeypatch.setattr(gpu.Bench, "tidy", refuse)
    monkeypatch.setattr(gpu.Bench, "training", lambda self: None)
    monkeypatch.setattr(gpu, "TOY", replace(gpu.TOY, batches=(1,), steps=3))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--minutes", "5"])
    gpu.main()
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["left_out"]["weights, for fp8_steps"] == "RuntimeError: the card says no"
    assert found["left_out"]["tidying after copy"] == "RuntimeError: the card says no"
    assert found["tokens_per_s"]["bf16"]["1"] > 0 and "| bf16 |" in told
