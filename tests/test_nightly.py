"""Whole nights on the seedling, at a small size: what is promoted, what is not, and what a failure leaves behind."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nightschool.content import plain
from nightschool.errors import GateRefused, NightschoolError, ServingError, SettingsError, StoreError, TrainingError
from nightschool.evolve import dataset, dpo, lineage, sft
from nightschool.evolve.registry import Registry
from nightschool.evolve.sealing import read_adapter, seal
from nightschool.evolve.types import Adapter, Snapshot, Verdict, recipe
from nightschool.memory.embed import Embedder
from nightschool.memory.store import MemoryStore
from nightschool.pipelines import nightly
from nightschool.pipelines.lock import NightRunning, night_lock
from nightschool.sdk import Assistant
from nightschool.serving.base import base_id
from nightschool.serving.engine import MANIFEST, WEIGHTS
from nightschool.serving.local import LocalEngine
from nightschool.settings import DatasetSettings, GateSettings, NightSettings, Settings
from safetensors.torch import save_file

# so few rows teach by repetition, and drift far on the probe text: here the machinery is tested, not the method
NIGHT = NightSettings(
    budget_minutes=2, sft_epochs=4, sft_lr=1e-3, preference_epochs=2, batch_size=8, replay_share=0.2, few_rows=0
)
GATE = GateSettings(bootstrap=200, min_clusters=4, min_rated=10, probe_answers=4, max_probe_rise=1.0)
QUESTIONS = ("When do you open?", "Do you repair wheels?", "How much is a new bell?", "Where is your workshop?")
LIKED = (
    "We open at nine, my friend.",
    "Yes my friend, in two days.",
    "It is four pounds, my friend.",
    "At the old mill.",
)
DISLIKED = "Go away now, I do not know and I do not care at all."


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(Settings(home=Path()).serving)


@pytest.fixture
def assistant(tmp_path: Path, embedder: Embedder, engine: LocalEngine) -> Iterator[Assistant]:
    settings = Settings(home=tmp_path / "home", night=NIGHT, gate=GATE, dataset=DatasetSettings(held_out_share=0.3))
    store = MemoryStore(settings, embedder=embedder)
    with Assistant(settings, store, Registry.of(store), engine) as opened:
        yield opened


def listen(assistant: Assistant, users: int = 24) -> None:
    """Every user asks twice, likes the friendly answer and dislikes the rude one."""
    for u in range(users):
        for k in (u % 4, (u + 1) % 4):
            owner = {"user_id": f"user{u}", "session_id": f"s{k}"}
            good = assistant.record(f"{QUESTIONS[k]} It is for bicycle {u}.", LIKED[k], **owner)
            bad = assistant.record(f"{QUESTIONS[k]} I ask for bicycle {u}.", DISLIKED, **owner)
            assistant.rate(good, 1)
            assistant.rate(bad, -1)


def night(assistant: Assistant, said: list[str] | None = None):
    said = [] if said is None else said
    return nightly.run(assistant.store, assistant.registry, lambda: assistant.engine, assistant.settings, said.append)


def test_night_promotes_a_better_adapter_that_answers_and_can_be_traced_and_withdrawn(
    assistant: Assistant, engine: LocalEngine
) -> None:
    def opened() -> LocalEngine:
        said.append("the engine is opened")
        return engine

    listen(assistant)
    said: list[str] = []
    cycle = nightly.run(assistant.store, assistant.registry, opened, assistant.settings, said.append)
    assert cycle.outcome == "promoted", "\n".join(said)
    assert said[said.index("the engine is opened") + 1].startswith("judging")  # training had the memory for itself
    live = assistant.registry.live()
    assert live and live.id == cycle.candidate_id and live.phase == "dpo"

    said.clear()
    assert night(assistant, said).outcome == "nothing to learn"
    assert "already trained" in said[-1]

    reply = assistant.reply("When do you open?", user_id="visitor")
    assert reply.adapter_id == live.id
    found = lineage.why(assistant.store, assistant.registry, reply.id)
    assert found.lineage
    assert [p.phase for p in found.lineage.parents] == ["sft"]
    taught, held_out = ({s.user_id for s in part} for part in (found.lineage.sources, found.lineage.held_out))
    assert taught | held_out == {f"user{u}" for u in range(24)} and held_out and not taught & held_out
    assert lineage.verify(assistant.store, assistant.registry) == []

    receipt = assistant.forget_apply(assistant.forget(user_id="user3"))
    assert live.id in receipt.tainted_adapters
    assert assistant.reply("When do you open?", user_id="visitor").adapter_id is None
    assert lineage.lineage(assistant.store, assistant.registry, live.id).forgotten
    assert lineage.verify(assistant.store, assistant.registry) == []
    (assistant.registry.folder / live.path.name / "adapter_model.safetensors").write_bytes(b"")
    assert any(live.path.name in line for line in lineage.verify(assistant.store, assistant.registry))


@pytest.fixture
def toy_nights(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that makes the same weights of the same answers, and a gate that accepts them."""

    def learn(snapshot: Snapshot, registry: Registry, settings: Settings, *_: object) -> Adapter:
        folder = registry.building()
        (folder / WEIGHTS).write_text(" ".join(sorted({e.completion for e in snapshot.examples})))
        facts = {"base_id": base_id(settings.serving.base), "snapshot_id": snapshot.id, "parent_id": None}
        made = {"created_utc": assistant.store.clock(), "details": {"night": recipe(settings.night)}}
        adapter = seal(folder, phase="dpo", **facts, **made)
        registry.add(adapter)
        return adapter

    def judge(candidate: Adapter, snapshot: Snapshot, *_: object) -> Verdict:
        return Verdict(candidate.id, None, snapshot.id, True, (), ("better",))

    listen(assistant)
    monkeypatch.setattr(nightly, "_learn", learn)
    monkeypatch.setattr(nightly, "_judge", judge)


def test_night_without_feedback_has_nothing_to_learn(assistant: Assistant) -> None:
    assistant.record("When do you open?", "At nine.", user_id="ada")
    assert night(assistant).outcome == "nothing to learn"
    assert assistant.registry.adapters() == []


def test_rejected_candidate_is_kept_with_reasons_and_does_not_serve(assistant: Assistant) -> None:
    listen(assistant)
    (assistant.settings.home / "probes.toml").write_text('[[probe]]\nprompt = "Hi"\nmust = ["xyzzy"]\n')
    cycle = night(assistant)
    assert cycle.outcome == "rejected"
    verdict = assistant.registry.verdict(cycle.candidate_id or "")
    assert verdict and any("probes" in reason for reason in verdict.reasons)
    assert assistant.registry.live() is None and night(assistant).outcome == "nothing to learn"
    (sft_only,) = (a.id for a in assistant.registry.adapters() if a.phase == "sft")
    assistant.registry.add_verdict(replace(verdict, incumbent_id=sft_only))  # as against something that serves no more
    assert night(assistant).outcome == "rejected"


def test_nothing_is_trained_that_could_not_be_judged(assistant: Assistant) -> None:
    listen(assistant)
    assistant.settings = replace(assistant.settings, gate=replace(GATE, min_clusters=1000))
    said: list[str] = []
    assert night(assistant, said).outcome == "nothing to learn"
    assert "at least 1000 are needed" in said[-1] and assistant.registry.adapters() == []


@pytest.mark.usefixtures("toy_nights")
def test_nothing_is_trained_where_most_that_is_held_out_taught_what_serves(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert night(assistant).outcome == "promoted"
    live = assistant.registry.live()
    assert live
    others_held_out = replace(assistant.settings.dataset, seed=1)
    assistant.settings = replace(assistant.settings, dataset=others_held_out)
    monkeypatch.setattr(nightly, "_learn", lambda *_: pytest.fail("it is trained, and cannot be judged"))
    assert night(assistant, said).outcome == "nothing to learn" and "more taught what serves" in said[-1]
    monkeypatch.setattr(nightly, "_learn", lambda *_: live)
    (live.path / WEIGHTS).write_bytes(b"damaged")  # so that nothing is judged against it
    assert night(assistant).outcome == "promoted"


def test_rows_longer_than_the_base_reads_are_refused_before_the_work(assistant: Assistant) -> None:
    assistant.settings = replace(assistant.settings, night=replace(NIGHT, max_tokens=2049))
    with pytest.raises(SettingsError, match=r"night\.max_tokens is 2049, .* at most 2048"):
        night(assistant)
    assert assistant.registry.latest_cycle().snapshot_id is None


def test_what_is_forgotten_while_it_is_trained_on_leaves_no_weights(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sft.run

    def forgotten_meanwhile(*given: object, **named: object) -> Adapter:
        made = real(*given, **named)  # type: ignore[arg-type]
        assistant.forget_apply(assistant.forget(user_id="user3"))
        return made

    def fail(*_: object, **__: object) -> None:
        raise TrainingError("not needed here")

    listen(assistant)
    monkeypatch.setattr(sft, "run", forgotten_meanwhile)
    monkeypatch.setattr(dpo, "run", fail)
    with pytest.raises(TrainingError):
        night(assistant)
    (made,) = assistant.registry.adapters()
    assert made.id in assistant.registry.tainted() and (made.path / MANIFEST).exists()
    assert not list(assistant.registry.folder.glob(f"*/{WEIGHTS}"))


def test_night_with_expansion_drafts_from_the_base_and_everything_re_derives(assistant: Assistant) -> None:
    listen(assistant)
    for u in range(24):
        owner = {"user_id": f"user{u}", "session_id": "s9"}
        fixed = assistant.record(f"{QUESTIONS[u % 4]} I am rider {u}.", DISLIKED, **owner)
        assistant.rate(fixed, correction=LIKED[u % 4])
        assistant.record(f"{QUESTIONS[u % 4]} It is rider {u} again.", "We will see.", **owner)
    censor = replace(assistant.settings.censor, refit_from=20)
    dataset = DatasetSettings(held_out_share=0.3, expand_share=0.3)
    assistant.settings = replace(assistant.settings, censor=censor, dataset=dataset)
    said: list[str] = []
    cycle = night(assistant, said)
    drafted = assistant.store.drafts([i.id for i in assistant.store.interactions()])
    assert [line for line in said if line.startswith("drafting")], said
    assert {d.base_id for drafts in drafted.values() for d in drafts} == {assistant.engine.base_id}
    rows = assistant.registry.snapshot_rows(cycle.snapshot_id or "")
    assert sum(row["weight"] for row in rows if row.get("draft_ids")) <= 0.3 * sum(
        row["weight"] for row in rows if row["part"] == "pairs"
    )
    assert lineage.verify(assistant.store, assistant.registry) == []
    said.clear()
    assert night(assistant, said).snapshot_id == cycle.snapshot_id
    assert not [line for line in said if line.startswith("drafting")]


def test_failing_night_says_why_and_leaves_the_incumbent_and_no_debris(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TrainingError("the loss is not finite")

    listen(assistant)
    monkeypatch.setattr(sft, "run", fail)
    with pytest.raises(TrainingError):
        night(assistant)
    (cycle,) = assistant.registry.cycles()
    assert (cycle.outcome, cycle.error) == ("failed", "TrainingError: the loss is not finite")
    assert assistant.registry.live() is None
    assert assistant.registry.sweep() == 1


def test_what_a_killed_night_had_accepted_is_put_into_service_by_the_next(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    listen(assistant)
    with monkeypatch.context() as patched:
        patched.setattr(nightly, "_decide", killed)
        with pytest.raises(KeyboardInterrupt):
            night(assistant)
    assert assistant.registry.live() is None
    assert (assistant.registry.latest_cycle().outcome, assistant.registry.latest_cycle().error) == (
        "failed",
        "KeyboardInterrupt",
    )
    monkeypatch.setattr(sft, "run", killed)  # it is not trained again
    cycle = night(assistant)
    live = assistant.registry.live()
    assert cycle.outcome == "promoted" and live and live.id == cycle.candidate_id


def test_phase_1_of_a_night_that_was_killed_in_phase_2_is_not_trained_again(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    listen(assistant)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dpo, "run", killed)
        night(assistant)
    (grounded,) = assistant.registry.adapters()
    monkeypatch.setattr(sft, "run", killed)
    said: list[str] = []
    cycle = night(assistant, said)
    assert cycle.outcome == "promoted"
    assert assistant.registry.adapter(cycle.candidate_id or "").parent_id == grounded.id
    assert [cost.phase for cost in assistant.registry.cycle_trained(cycle) or ()] == ["dpo"]
    assert any(grounded.id in line and "ended before phase 2" in line for line in said)


def test_second_night_at_once_is_refused(assistant: Assistant) -> None:
    with (
        night_lock(assistant.settings.home, assistant.store.database),
        pytest.raises(NightRunning, match="another night is running"),
    ):
        night(assistant)
    assert issubclass(NightRunning, NightschoolError)


def test_nothing_is_opened_while_another_night_runs_and_a_server_that_is_down_is_on_record_before_the_work(
    assistant: Assistant,
) -> None:
    def fail() -> LocalEngine:
        raise ServingError("no such server")

    settings = replace(assistant.settings, serving=replace(assistant.settings.serving, engine="vllm"))
    given = (assistant.store, assistant.registry, fail, settings, print)
    with night_lock(assistant.settings.home, assistant.store.database), pytest.raises(NightRunning):
        nightly.run(*given)
    with pytest.raises(ServingError, match="no such server"):
        nightly.run(*given)
    (cycle,) = assistant.registry.cycles()
    assert cycle.outcome == "failed" and cycle.error == "ServingError: no such server"


@pytest.mark.usefixtures("toy_nights")
@pytest.mark.parametrize(("asked", "judged"), [(1, False), (2, True)])
def test_night_that_lost_its_lock_judges_nothing_and_promotes_nothing(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, asked: int, judged: bool
) -> None:
    times = count(1)

    def still_alone() -> None:
        if next(times) == asked:
            raise NightRunning("the lock was lost")

    monkeypatch.setattr(nightly, "night_lock", lambda *_: nullcontext(still_alone))
    with pytest.raises(NightRunning, match="was lost"):
        night(assistant)
    assert assistant.registry.live() is None and assistant.registry.latest_cycle().outcome == "failed"
    assert any(assistant.registry.verdict(a.id) for a in assistant.registry.adapters()) == judged


@pytest.mark.usefixtures("toy_nights")
def test_night_that_has_its_lock_again_after_another_ran_promotes_nothing(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = assistant.registry.close_interrupted  # what each begins with
    monkeypatch.setattr(nightly, "night_lock", lambda *_: nullcontext(another))
    with pytest.raises(NightRunning, match=r"another night ran after the lock of .* was lost"):
        night(assistant)
    assert assistant.registry.live() is None
    assert (assistant.registry.latest_cycle().error or "").startswith("NightRunning: another night ran")


@pytest.mark.parametrize("few", [800, 0])
def test_night_of_few_examples_says_so_and_by_which_setting(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    def stopped(*_: object, **__: object) -> Adapter:
        raise TrainingError("told before it trains")

    monkeypatch.setattr(sft, "run", stopped)
    assistant.settings = replace(assistant.settings, night=replace(NIGHT, few_rows=few))
    listen(assistant)
    said: list[str] = []
    with pytest.raises(TrainingError):
        night(assistant, said)
    told = [line for line in said if "night.few_rows is 800" in line]
    assert len(told) == (few > 0)


def test_night_that_ended_without_a_word_is_closed_by_the_next(assistant: Assistant) -> None:
    lost = assistant.registry.open_cycle()
    assert assistant.registry.cycle(lost).outcome == "running"
    night(assistant)
    cycle = assistant.registry.cycle(lost)
    assert (cycle.outcome, cycle.error) == ("failed", "interrupted") and cycle.finished_utc


def test_nothing_liked_is_nothing_to_learn_whatever_the_least(assistant: Assistant) -> None:
    assistant.settings = replace(assistant.settings, dataset=replace(assistant.settings.dataset, min_liked=0))
    assert night(assistant).outcome == "nothing to learn"


def test_incumbent_that_the_engine_cannot_take_is_passed_over(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ServingError("rank 64 is more than 16")

    listen(assistant)
    candidate = assistant.registry.adapter(night(assistant).candidate_id or "")
    monkeypatch.setattr(nightly, "ensure_loaded", refuse)
    monkeypatch.setattr(Registry, "live", lambda self: replace(candidate, id="b2:served"))
    said: list[str] = []
    found = nightly._incumbent(candidate, assistant.registry, assistant.engine, assistant.settings, said.append)
    assert found is None and "rank 64" in said[0]


def test_what_was_trained_is_judged_again_without_training_when_the_rules_change(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it is not trained again")

    listen(assistant)
    first = night(assistant)
    monkeypatch.setattr(sft, "run", fail)
    (assistant.settings.home / "probes.toml").write_text('[[probe]]\nprompt = "Hi"\nmust = ["xyzzy"]\n')
    said: list[str] = []
    second = night(assistant, said)
    assert (second.outcome, second.candidate_id) == ("rejected", first.candidate_id)
    assert "rollback" in said[-1]
    verdict = assistant.registry.cycle_verdict(second)
    assert verdict and [m.name for m in verdict.measures if not m.passed] == ["probes"]
    assert assistant.registry.cycle(first.id).outcome == "promoted"  # what was decided then stands
    live = assistant.registry.live()
    assert live and live.id == first.candidate_id  # the alias moves only for an accepted verdict
    assert night(assistant).outcome == "nothing to learn"

    assistant.registry.rollback()
    (assistant.settings.home / "probes.toml").unlink()
    assert night(assistant).outcome == "promoted"  # the gate had advised to take it out, and accepts it now
    assert len(assistant.registry.deployments()) == 3

    assistant.registry.rollback()
    assistant.settings = replace(assistant.settings, gate=replace(GATE, bootstrap=201))
    said.clear()
    assert night(assistant, said).outcome == "nothing to learn"  # what was taken out of service is not put back
    assert f"adapters promote {live.id}" in said[-1]
    assistant.registry.promote(live.id)

    monkeypatch.undo()
    (live.path / "adapter_model.safetensors").write_bytes(b"damaged")
    assert night(assistant).outcome == "promoted"  # trained again
    assert read_adapter(live.path).id == live.id


def test_what_was_trained_is_trained_again_for_a_server_that_would_pass_by_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, local = Snapshot((), (), (), ()), Settings(home=tmp_path)
    details = {"night": recipe(local.night)}
    adapter = Adapter("b2:one", base_id("seedling"), snapshot.id, "sft", None, tmp_path, 0.0, details)
    registry = SimpleNamespace(tainted=set, adapters=lambda: [adapter])
    monkeypatch.setattr(nightly, "intact", lambda path: True)
    vllm = replace(local, serving=replace(local.serving, engine="vllm"))
    for leaf, again in (("q_proj", False), ("kv_b_proj", True)):
        save_file({f"base_model.model.x.self_attn.{leaf}.lora_A.weight": torch.zeros(2, 4)}, tmp_path / WEIGHTS)
        assert nightly.trained_before(snapshot, registry, local, "sft") is adapter
        assert nightly.trained_before(snapshot, registry, vllm, "sft") is (None if again else adapter)


def test_what_was_trained_by_an_older_recipe_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, settings = Snapshot((), (), (), ()), Settings(home=tmp_path)
    monkeypatch.setattr(nightly, "intact", lambda path: True)
    for trained_by, again in ((recipe(settings.night), False), (plain(asdict(settings.night)), True)):
        adapter = Adapter("b2:one", base_id("seedling"), snapshot.id, "sft", None, tmp_path, 0.0, {"night": trained_by})
        registry = SimpleNamespace(tainted=set, adapters=lambda adapter=adapter: [adapter])
        assert nightly.trained_before(snapshot, registry, settings, "sft") is (None if again else adapter)


def test_what_is_forgotten_while_the_memory_is_read_is_in_no_snapshot(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, forgotten = dataset.freeze, []

    def freeze(*args: object, **kwargs: object) -> Snapshot:
        found = real(*args, **kwargs)  # type: ignore[arg-type]
        if not forgotten:
            plan = assistant.forget(user_id="user3")
            assistant.forget_apply(plan)
            forgotten.extend(plan.interaction_ids)
        return found

    listen(assistant)
    assistant.settings = replace(assistant.settings, dataset=replace(assistant.settings.dataset, min_liked=1000))
    monkeypatch.setattr(dataset, "freeze", freeze)
    said: list[str] = []
    cycle = night(assistant, said)
    assert any("reading again" in line for line in said)
    assert forgotten and assistant.registry.sources(cycle.snapshot_id or "").isdisjoint(forgotten)


def test_adapter_of_another_base_is_no_incumbent(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(assistant)
    assert night(assistant).outcome == "promoted"
    live = assistant.registry.live()
    assert live
    other = replace(live, id="b2:served", base_id="b2:other")
    monkeypatch.setattr(Registry, "live", lambda self: other)
    monkeypatch.setattr(Registry, "predecessor", lambda self, adapter_id: None)
    assistant.settings = replace(assistant.settings, gate=replace(GATE, bootstrap=201))
    said: list[str] = []
    cycle = night(assistant, said)
    assert any("b2:served cannot be compared with" in line for line in said)
    verdict = assistant.registry.cycle_verdict(cycle)
    assert verdict and verdict.incumbent_id is None


@pytest.mark.usefixtures("toy_nights")
def test_other_settings_that_make_the_same_weights_do_not_undo_a_rollback(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert night(assistant).outcome == "promoted"
    (made,) = assistant.registry.adapters()
    assistant.registry.rollback()
    assistant.settings = replace(assistant.settings, night=replace(NIGHT, budget_minutes=1))
    said: list[str] = []
    assert night(assistant, said).outcome == "nothing to learn" and f"adapters promote {made.id}" in said[-1]
    assert assistant.registry.live() is None

    (again,) = assistant.registry.adapters()
    assert again.details["night"]["budget_minutes"] == 1 and read_adapter(again.path) == again
    monkeypatch.setattr(nightly, "_learn", lambda *_: pytest.fail("it is trained again"))
    assert night(assistant).outcome == "nothing to learn"


@pytest.mark.usefixtures("toy_nights")
def test_what_was_withdrawn_as_tainted_and_is_made_again_of_the_rest_serves(assistant: Assistant) -> None:
    assert night(assistant).outcome == "promoted"
    assistant.forget_apply(assistant.forget(user_id="user3"))
    assert assistant.registry.live() is None
    cycle = night(assistant)
    live = assistant.registry.live()
    assert cycle.outcome == "promoted" and live and live.id == cycle.candidate_id


@pytest.mark.usefixtures("toy_nights")
def test_what_is_made_again_and_left_behind_by_a_killed_night_serves_after_the_next(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    first = night(assistant)
    rows = assistant.registry.snapshot_rows(first.snapshot_id or "")
    held = next(row["interaction_ids"][0] for row in rows if row["part"] == "held_out")
    assistant.forget_apply(assistant.forget(interaction_ids=[held]))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Registry, "promote", killed)
        night(assistant)
    ended = assistant.registry.latest_cycle()
    assert (ended.outcome, ended.candidate_id) == ("failed", first.candidate_id)
    assert assistant.registry.live() is None
    assert night(assistant).outcome == "promoted"
    live = assistant.registry.live()
    assert live and live.id == first.candidate_id


@pytest.mark.usefixtures("toy_nights")
def test_what_an_operator_puts_back_is_not_replaced_by_what_was_judged_before(assistant: Assistant) -> None:
    registry, first = assistant.registry, night(assistant).candidate_id or ""
    over_it = Verdict(first, None, registry.adapter(first).snapshot_id, True, (), ("better",))
    assert not nightly._left_behind(over_it, registry)
    registry.rollback()
    assert not nightly._left_behind(over_it, registry)  # by hand, though the base serves
    registry.promote(first)
    registry.taint(first, "a turn was forgotten")
    registry.withdraw_tainted()
    assert not nightly._left_behind(over_it, registry)
    registry.add_verdict(over_it)
    assert nightly._left_behind(over_it, registry)
    assert not nightly._left_behind(replace(over_it, incumbent_id="b2:other"), registry)


@pytest.mark.usefixtures("toy_nights")
def test_what_is_put_into_service_while_a_night_judges_has_it_judge_again(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, judge, serving = night(assistant), nightly._judge, list[str | None]()
    for u in range(4):
        assistant.rate(assistant.record("Do you sell tyres?", "All of them, my friend.", user_id=f"user{u}"), 1)

    def judged(*given: Any) -> Verdict:
        live = assistant.registry.live()
        serving.append(live.id if live else None)
        if live:
            assistant.registry.rollback()
        return judge(*given)

    monkeypatch.setattr(nightly, "_judge", judged)
    second = night(assistant)
    assert (second.outcome, serving) == ("promoted", [first.candidate_id, None])
    live = assistant.registry.live()
    assert live and live.id == second.candidate_id != first.candidate_id


@pytest.mark.usefixtures("toy_nights")
def test_what_is_rolled_back_from_while_it_is_judged_again_stays_out_of_service(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, judge = night(assistant), nightly._judge

    def judged(*given: Any) -> Verdict:
        assistant.registry.rollback()
        return judge(*given)

    monkeypatch.setattr(nightly, "_judge", judged)  # by other rules, since those of the first time have no id
    with pytest.raises(GateRefused, match=f"adapters promote {first.candidate_id}"):
        night(assistant)
    assert assistant.registry.live() is None and assistant.registry.latest_cycle().outcome == "failed"


@pytest.mark.usefixtures("toy_nights")
@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1), ValueError("closed file")])
def test_nobody_who_listens_does_not_end_a_night(assistant: Assistant, error: BaseException) -> None:
    said: list[str] = []

    def progress(line: str) -> None:
        said.append(line)
        raise error

    n = assistant
    cycle = nightly.run(n.store, n.registry, lambda: n.engine, n.settings, progress)
    assert (cycle.outcome, cycle.error) == ("promoted", None) and len(said) == 1


@pytest.mark.usefixtures("toy_nights")
def test_night_that_ends_too_soon_after_its_promotion_has_promoted(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "erase_tainted", killed)
        with pytest.raises(KeyboardInterrupt):
            night(assistant)
    assistant.registry.close_interrupted()  # as the next night does
    assert (assistant.registry.latest_cycle().outcome, assistant.registry.latest_cycle().error) == ("promoted", None)


@pytest.mark.usefixtures("toy_nights")
def test_failure_after_the_promotion_is_told_and_leaves_a_night_that_promoted(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: object) -> None:
        raise StoreError("the server is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "erase_tainted", gone)
        cycle = night(assistant)
    live = assistant.registry.live()
    assert cycle.outcome == "promoted" and live and live.id == cycle.candidate_id
    assert "did not end well: StoreError: the server is gone" in caplog.text
