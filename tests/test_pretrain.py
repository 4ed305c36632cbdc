"""How the seedling is made: the text, the batches, the optimiser, a run that resumes, the FP8 folder, the measures."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from nightschool.serving.engine import Sampling
from nightschool.serving.local import LocalEngine
from nightschool.serving.pretrain import corpus, measure, model, talks, tokens
from nightschool.serving.pretrain.__main__ import evaluate
from nightschool.serving.pretrain.everyday import chat
from nightschool.serving.pretrain.export import export
from nightschool.serving.pretrain.facts import NAMED, facts
from nightschool.serving.pretrain.muon import Muon, orthogonalise, split_parameters
from nightschool.serving.pretrain.run import Plan, Trainer
from nightschool.serving.pretrain.scenes import UNKNOWN, _ask_unknown, from_notes, from_records, turn
from nightschool.serving.pretrain.toolscenes import with_tools
from nightschool.settings import ServingSettings

TALKS = [[turn("user", f"Have you seen film {i}?"), turn("assistant", "Yes, I liked it.")] for i in range(40)]
SMALL = Plan(steps=4, tokens=256, warm_up_steps=2, workers=1)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.train_tokenizer(TALKS, seed=1, vocabulary=tokens.VOCABULARY)


def trainer(tokenizer, folder: Path, plan: Plan = SMALL) -> Trainer:
    batches = tokens.Batches(tokenizer, TALKS, plan.seed, plan.tokens, plan.weights)
    return Trainer(plan, batches, folder, lambda line: None)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer.save_pretrained(folder)
    trainer(tokenizer, folder).run()
    return folder


# -- text ---


def test_same_seed_writes_the_same_conversation() -> None:
    assert [corpus.conversation(Random(i)) for i in range(50)] == [corpus.conversation(Random(i)) for i in range(50)]


def test_every_scene_alternates_sensibly_and_ends_with_the_assistant() -> None:
    for i in range(400):
        talk = corpus.conversation(Random(i))
        roles = [t["role"] for t in talk]
        assert roles[-1] == "assistant" and "system" not in roles[1:]
        assert all(t["content"].strip() for t in talk)
        assert all(roles[k + 1] == "assistant" for k, role in enumerate(roles) if role in ("user", "tool"))


def test_answer_of_a_fact_holds_its_value_and_the_value_stands_in_the_notes() -> None:
    for i in range(300):
        for fact in facts(Random(i), 3):
            assert all(fact.value in text for text in (fact.said, fact.note, fact.answer))
            assert fact.value not in fact.question or len(fact.value) < 4


def test_facts_of_one_conversation_cannot_be_confused() -> None:
    known = facts(Random(3), 30)
    assert len({fact.key for fact in known}) == 30


def test_notes_have_the_form_in_which_memories_are_shown() -> None:
    shown = [from_notes(Random(i))[0]["content"] for i in range(100)]
    assert sum("Notes from earlier conversations:\n- " in text for text in shown) > 25


def test_cell_that_is_asked_for_stands_in_the_record() -> None:
    for i in range(100):
        talk = from_records(Random(i))
        cell = re.sub(r"^(It is|The .+? is) |\.$", "", talk[-1]["content"])
        assert cell in talk[0]["content"]


def test_second_call_copies_its_id_from_the_result() -> None:
    calls = 0
    for i in range(200):
        talk = with_tools(Random(i))
        said = [k for k, t in enumerate(talk) if t["role"] == "assistant" and t["content"].startswith("{")]
        for k in said[1:]:
            (arguments,) = json.loads(talk[k]["content"]).values()
            result = next(t["content"] for t in talk if t["role"] == "tool")
            assert all(json.dumps(value) in result for value in arguments.values())
            calls += 1
    assert calls > 100


def test_domain_of_the_night_is_not_written_about() -> None:
    text = " ".join(t["content"] for i in range(1500) for t in corpus.conversation(Random(i))).lower()
    assert not re.findall(r"\b(coffee|cafe|café|espresso|latte|tea|menu|drink|sandwich|restaurant)\b", text)


def test_written_conversation_keeps_what_was_chosen_and_invents_each_value_once() -> None:
    lines = (
        ("system", "Notes:\\n- My {p=dog|cat} is called <name>.\\n- I am a <job>."),
        ("user", "{Hi|Hello}{!|} What is my {p:dog|cat} called?"),
        ("assistant", "Your {p:dog|cat} is called <name>, not <name2>."),
    )
    for i in range(50):
        (_, notes), (_, asked), (_, answer) = talks.told(lines, Random(i))
        kind, name, other = re.findall(r"Your (\w+) is called (\w+), not (\w+)\.", answer)[0]
        assert f"My {kind} is called {name}.\n- I am a" in notes and f"my {kind} called" in asked
        assert name != other and not re.search(r"\ba [aeiou]", notes)
    assert len({talks.told(lines, Random(i))[1] for i in range(50)}) == 8


def test_every_written_conversation_can_be_told_and_nothing_is_left_over() -> None:
    everything = talks.everything()
    assert len(everything) == len(set(everything)) > 1000
    for i, lines in enumerate(everything):
        for role, text in talks.told(lines, Random(i)):
            assert text and not re.search(r"[{}|\\]|<\w+>", text), (role, text)


def test_line_that_nobody_says_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talks, "FOLDER", tmp_path)
    (tmp_path / "odd.txt").write_text("# theme\nU: Hello!\nB: Hi!\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"talks/odd.txt: 'B: Hi!' is no line"):
        talks.templates("odd")


def test_same_words_are_held_out_wherever_they_stand() -> None:
    talks = [[f"have you seen film {i}?", "yes"] for i in range(2000)]
    held = [corpus.is_held_out(t) for t in talks]
    assert 20 <= sum(held) <= 60
    assert held[::-1] == [corpus.is_held_out(t) for t in talks[::-1]]


# -- tokens ---


def test_tokenizer_gives_back_any_text_and_splits_every_digit(tokenizer) -> None:
    text = 'Zoë paid 40,5 € for "BQ-1987"\n\t{"id": 12} 日本'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]) for i in ids]
    assert all(len(piece.strip()) == 1 for piece in pieces if any(c.isdigit() for c in piece))


def test_template_marks_what_the_assistant_says_with_its_end(tokenizer) -> None:
    talk = [turn("system", "S"), turn("user", "U"), turn("assistant", "A b"), turn("tool", "T"), turn("assistant", "C")]
    out = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "A b<|end|>C<|end|>"
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|tool|>T<|end|><|assistant|>C<|end|><|assistant|>")


def test_batch_follows_from_seed_and_step_and_begins_with_a_role(tokenizer) -> None:
    made = [tokens.Batches(tokenizer, TALKS, 5, 1024, tokens.Weights()) for _ in range(2)]
    first, second = made[0].at(2), made[1].at(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], made[0].at(1)[0])
    inputs, targets, weights, talks = first
    assert inputs.shape == targets.shape == weights.shape == talks.shape == (4, 256)
    assert made[0].at(3)[0].shape == (2, 512)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    roles = {tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user")}
    assert set(inputs[:, 0].tolist()) <= roles
    assert set(weights.unique().tolist()) == {0.25, 1.0, 2.5}


def test_batch_of_templates_encodes_as_the_chat_template_does(tokenizer) -> None:
    batches = tokens.Batches(tokenizer, TALKS, 5, 1024, tokens.Weights())
    for i in range(50):
        talk = corpus.conversation(Random(i))
        ids, _ = batches.encode(talk, tokens.Weights())
        assert ids == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]


def test_conversations_of_a_row_are_numbered_but_in_long_rows(tokenizer) -> None:
    batches = tokens.Batches(tokenizer, TALKS, 5, 1024, tokens.Weights())
    inputs, _, _, talks = batches.at(2)
    begins = F.pad(talks.diff(), (1, 0)).bool()
    roles = {tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user")}
    assert begins.any() and set(inputs[begins].tolist()) <= roles
    assert not batches.at(3).talks.any()


def test_what_was_not_told_is_asked_for_and_not_known() -> None:
    talks = [from_notes(Random(i)) for i in range(300)]
    assert sum(said["content"] in UNKNOWN for talk in talks for said in talk) > 80
    known = [fact for i in range(900) for fact in facts(Random(i), 1) if fact.form == NAMED.said[0]]
    questions = [_ask_unknown(Random(i), [fact])[0]["content"] for i, fact in enumerate(known)]
    alike = [question for question in questions if re.search("called|name of|'s name|Who is", question)]
    assert len(known) > 80 and 0.5 < len(alike) / len(known) < 0.9


def test_everyday_talk_takes_up_the_person_that_was_named() -> None:
    said = [pair for i in range(400) for pair in chat(Random(i))]
    named = [(told, answer) for told, answer in said if " your " in answer and " my " in told.lower()]
    assert len(named) > 25
    taken_up = [set(told.rstrip(".").split()) & set(answer.strip("?!.").split()) for told, answer in named]
    assert sum(bool(words) for words in taken_up) > 0.7 * len(named)


# -- model and optimiser ---


def test_conversations_of_a_row_do_not_see_each_other() -> None:
    ours = model.build_model(0).eval()
    ids = torch.randint(6, 4096, (1, 60), generator=torch.Generator().manual_seed(0))
    talks = torch.tensor([[0] * 25 + [1] * 35])
    mask, positions = model.apart(talks)
    with torch.no_grad():
        together = ours(ids, attention_mask=mask, position_ids=positions).logits
        alone = [ours(part).logits for part in (ids[:, :25], ids[:, 25:])]
    assert torch.allclose(together, torch.cat(alone, 1), atol=1e-4)


def test_own_kernels_compute_what_those_of_transformers_do() -> None:
    ours = model.build_model(0).eval()
    ids = torch.randint(6, 4096, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast = ours(ids).logits
        ours.set_attn_implementation("sdpa")
        ours.set_experts_implementation("eager")
        assert torch.allclose(ours(ids).logits, fast, atol=1e-4)


@pytest.mark.parametrize(("kind", "off"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_tied_cross_entropy_and_its_gradients_are_those_of_torch(kind: torch.dtype, off: float) -> None:
    torch.manual_seed(0)
    hidden, embedding = torch.randn(1500, 16), torch.randn(50, 16)
    target, share = torch.randint(0, 50, (1500,)), torch.rand(1500)
    share /= share.sum()
    mine = [t.clone().requires_grad_() for t in (hidden, embedding)]
    other = [t.clone().requires_grad_() for t in (hidden, embedding)]
    loss = model.TiedCrossEntropy.apply(*mine, target, share, kind)
    expected = (F.cross_entropy(other[0] @ other[1].T, target, reduction="none") * share).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=off)
    (3 * loss).backward()
    (3 * expected).backward()
    for a, b in zip(mine, other, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() / b.grad.norm() < 2 * off


def test_orthogonalised_matrices_have_singular_values_near_one_for_any_stack() -> None:
    for shape in ((40, 24), (24, 40), (5, 32, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.3 and values.max() < 1.4


def test_stack_of_experts_moves_as_its_matrices_would_one_by_one() -> None:
    torch.manual_seed(0)
    stack, grad = torch.randn(3, 16, 8), torch.randn(3, 16, 8)
    together, alone = stack.clone(), [m.clone() for m in stack]
    together.grad = grad
    for p, g in zip(alone, grad, strict=True):
        p.grad = g
    Muon([("experts.down_proj", together)]).step(0.1, 0.01)
    Muon([(f"w{i}", p) for i, p in enumerate(alone)]).step(0.1, 0.01)
    assert torch.allclose(together, torch.stack(alone), atol=1e-3)
    assert (together - stack).norm() > 0.1


def test_every_parameter_has_exactly_one_optimiser() -> None:
    named = list(model.build_model(0).named_parameters())
    hidden, looking, rest, routers = split_parameters(named)
    assert len(hidden) + len(looking) + len(rest) + len(routers) == len(named)
    assert len(routers) == 5 and len(looking) == 18
    assert all(p.ndim >= 2 for _, p in hidden)


def test_bias_moves_against_the_load_and_the_worst_load_is_told() -> None:
    built = model.build_model(0)
    balancer = model.Balancer(built, 0.01)
    with torch.no_grad():
        built(torch.randint(6, 4096, (1, 300), generator=torch.Generator().manual_seed(0)))
    loads = [load.clone() for load in balancer.loads]
    assert all(float(load.sum()) == 600 for load in loads)
    worst = balancer.step()
    assert worst == pytest.approx(max(float(load.max() / load.mean()) for load in loads))
    bias = balancer.routers[0].e_score_correction_bias
    assert bias[loads[0].argmax()] < bias[loads[0].argmin()]
    assert all(float(load.sum()) == 0 for load in balancer.loads)


# -- the run ---


def test_resumed_run_ends_where_an_unbroken_one_does(tokenizer, checkpoint: Path, tmp_path: Path) -> None:
    half = trainer(tokenizer, tmp_path / "half")
    for _ in range(2):
        half.step()
    half.save()
    rest = trainer(tokenizer, tmp_path / "half")
    rest.load()
    assert (rest.done, rest.tokens) == (2, 512)
    rest.run()
    unbroken = trainer(tokenizer, checkpoint)
    unbroken.load()
    assert unbroken.done == rest.done == 4
    for (name, a), b in zip(rest.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_run_that_begins_with_an_exported_model_keeps_its_words_and_says_so(
    tokenizer, checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "out")
    run = trainer(tokenizer, tmp_path / "further", Plan(steps=8, tokens=256, peak=0.5, workers=1, float32=True))
    run.begin_from(tmp_path / "out")
    made = trainer(tokenizer, checkpoint)
    made.load()
    for (name, a), b in zip(run.model.state_dict().items(), made.model.state_dict().values(), strict=True):
        assert (a - b).norm() <= 0.05 * b.norm(), name
    assert run.stage() == len(corpus.STAGES) - 1 and run.rate() == 0.005
    run.step()
    run.save()
    again = trainer(tokenizer, tmp_path / "further")
    again.load()
    assert again.before["tokens"] == made.tokens and again.tokens == 256


def test_save_that_is_cut_off_leaves_the_checkpoint_before_it(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tokenizer, tmp_path)
    run.step()
    run.save()
    run.step()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run.save()
    again = trainer(tokenizer, tmp_path)
    again.load()
    assert again.done == 1
    again.step()
    again.save()
    assert [p.name for p in tmp_path.glob("moments-*")] == ["moments-2.safetensors"]


def test_another_plan_is_told_when_a_run_goes_on(tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path)
    run.step()
    run.save()
    said: list[str] = []
    longer = trainer(tokenizer, tmp_path, Plan(steps=100))
    longer.report = said.append
    longer.load()
    assert len(said) == 1 and "steps" in said[0]


def test_rate_warms_up_stays_and_falls(tokenizer, tmp_path: Path) -> None:
    run = trainer(tokenizer, tmp_path, Plan(steps=100, warm_up_steps=10, decay_share=0.3))
    rates = []
    for run.done in range(100):
        rates.append(run.rate())
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[60] == 1.0
    assert rates[85] == pytest.approx(0.5) and rates[99] < 0.05
    assert rates[70:] == sorted(rates[70:], reverse=True)


def test_checkpoint_is_safetensors_and_json_only(checkpoint: Path) -> None:
    assert {p.suffix for p in checkpoint.iterdir()} == {".safetensors", ".json", ".jinja"}


def test_parts_of_a_batch_add_up_to_the_whole(tokenizer, tmp_path: Path) -> None:
    whole = trainer(tokenizer, tmp_path, Plan(steps=4, tokens=512, workers=1))
    parts = trainer(tokenizer, tmp_path, Plan(steps=4, tokens=512, workers=2))
    assert whole.step()[0] == pytest.approx(parts.step()[0], abs=2e-3)


# -- what comes out ---


def test_exported_folder_is_small_fp8_and_serves(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SAMPLING", Sampling(max_tokens=2))
    export(checkpoint, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) < 16e6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    engine = LocalEngine(ServingSettings(base=str(tmp_path / "out"), device="cpu", threads=1))
    report = measure.measure(tmp_path / "out", TALKS[:4], checkpoint, count=4)
    assert report.perplexity_full == pytest.approx(report.perplexity, rel=0.1)
    assert 1 <= report.expert_load <= 4
    assert len(engine.score([TALKS[0][:1]], ["Yes."])[0].token_logprobs) >= 2


def test_card_names_sources_figures_and_the_command(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    talk = [turn("user", "Hello!"), turn("assistant", "Hi.")]
    report = measure.Report(30.5, 30.1, 1000, 0.93, 0.9, {1: 1.0, 8: 0.8}, 0.7, 0.5, 1.3, 1.4, 1.0, (talk,))
    monkeypatch.setattr("nightschool.serving.pretrain.__main__.measure", lambda *_: report)
    monkeypatch.setattr(corpus, "read_dialogues", lambda path: ([], []))
    export(checkpoint, tmp_path)
    evaluate(tmp_path, Path("dialogues"), checkpoint)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "BSD-3-Clause",
        "30.50",
        "93%",
        "80% among 8",
        "--steps 4 --tokens 256 --threads 1",
        "on 1 CPU cores",
        "user: Hello!\nassistant: Hi.",
    ):
        assert text in card
    assert "{" not in card.split("## Five conversations")[0]
    (tmp_path / "README.md").unlink()
    evaluate(tmp_path, Path("dialogues"), tmp_path / "another")
    assert not (tmp_path / "README.md").exists()  # whose card it would be is not known


def test_invented_values_stand_in_no_list() -> None:
    rng = Random(1)
    for _ in range(100):
        known, asked = measure.invented(rng, 4)
        assert asked in known and asked.value not in measure.KNOWN
