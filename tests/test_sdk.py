"""The assistant over a real store, with an engine that says what it was asked."""

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore
from typing import Any, cast

import nightschool
import pytest
from nightschool.aio import THREADS, AsyncAssistant
from nightschool.content import Message
from nightschool.errors import InputError, NotFound, Overtaken, ServingError, SettingsError, StoreError, Unerased
from nightschool.evolve.registry import Registry
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import Adapter, Judged, Snapshot, Verdict
from nightschool.memory.conversations import Owner
from nightschool.memory.embed import Embedder
from nightschool.memory.indexing import Indexing
from nightschool.memory.prompt import REACH
from nightschool.memory.store import MemoryStore
from nightschool.memory.types import Memory, MemoryKind
from nightschool.replies import ReplyStream
from nightschool.sdk import LOOK_S, MOST_WAITING, Assistant
from nightschool.serving.engine import MANIFEST, WEIGHTS, Pieces, Sampling
from nightschool.settings import ServingSettings, Settings


class EchoEngine:
    """Answers with the adapter's id and the whole prompt, so that a test sees what the model was shown."""

    base_id = "base"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def adapters(self) -> list[str]:
        return self.loaded

    def load(self, adapter_id: str, path: Path) -> None:
        self.loaded.append(adapter_id)

    def discard(self, adapter_ids: Collection[str]) -> None:
        pass

    def unload(self, adapter_id: str) -> None:
        self.loaded.remove(adapter_id)

    def stream(
        self, prompt: Sequence[Message], *, adapter: str | None = None, sampling: Sampling | None = None
    ) -> Pieces:
        yield f"{adapter}: "
        yield " | ".join(f"{m['role']}={m['content']}" for m in prompt)


@pytest.fixture
def assistant(tmp_path: Path, embedder: Embedder) -> Iterator[Assistant]:
    settings = Settings(home=tmp_path / "home")
    store = MemoryStore(settings, embedder=embedder)
    registry = Registry.of(store)
    with Assistant(settings, store, registry, EchoEngine()) as opened:
        yield opened


def serve(
    assistant: Assistant, interaction_id: str = "b2:1", base_id: str = "base", weights: bytes = b"weights"
) -> Adapter:
    registry = assistant.registry
    snapshot = Snapshot((), (), (), (Judged((), "x", True, "ada", (interaction_id,)),))
    registry.add_snapshot(snapshot, [])
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(weights)
    facts = {"base_id": base_id, "snapshot_id": snapshot.id, "parent_id": None, "details": {}}
    adapter = seal(folder, phase="sft", created_utc=1.0, **facts)
    registry.add(adapter)
    registry.add_verdict(Verdict(adapter.id, None, snapshot.id, True, (), ("better",)))
    return registry.promote(adapter.id)


def test_reply_is_recorded_with_what_gave_it(assistant: Assistant) -> None:
    reply = assistant.reply("Hello there", user_id="ada")
    kept = assistant.store.interaction(reply.id)
    assert (kept.text, kept.reply, kept.adapter_id, kept.user_id) == ("Hello there", reply.text, None, "ada")
    assert str(reply) == "None: user=Hello there"


def test_notes_are_shown_to_the_model_and_named_in_the_reply(assistant: Assistant) -> None:
    note = assistant.remember("My dog is called Rex.", user_id="ada")
    reply = assistant.reply("What is my dog called?", user_id="ada")
    assert "system=Notes from earlier conversations:\n- My dog is called Rex." in reply.text
    assert reply.memory_ids == (note.id,)


def test_another_user_is_never_shown_a_private_note(assistant: Assistant) -> None:
    assistant.remember("My dog is called Rex.", user_id="ada")
    assert "Rex" not in assistant.reply("What is my dog called?", user_id="bob").text


def test_session_goes_on_and_another_session_starts_anew(assistant: Assistant) -> None:
    assistant.reply("Blue zebras", user_id="ada", session_id="one")
    assert "user=Blue zebras | assistant=" in assistant.reply("Go on", user_id="ada", session_id="one").text
    assert "assistant=" not in assistant.reply("Something else", user_id="ada", session_id="two").text


def test_who_waits_for_an_engine_that_another_call_cannot_open_fails_with_it(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, waiting = list[float](), Event()

    def opened(_: ServingSettings) -> EchoEngine:
        tried.append(time.monotonic())
        if len(tried) == 1:
            assert waiting.wait(30)
            time.sleep(0.2)  # the others are at the lock by then
            raise ServingError("the server gave no answer in 120 s")
        return EchoEngine()

    monkeypatch.setattr("nightschool.sdk._opened", opened)
    late = Assistant(assistant.settings, assistant.store, assistant.registry)
    with ThreadPoolExecutor(4) as pool:
        opened_by = [pool.submit(lambda: late.engine) for _ in range(4)]
        waiting.set()
        failed = [opening.exception() for opening in opened_by]
    assert all(isinstance(error, ServingError) and "no answer in 120 s" in str(error) for error in failed)
    assert len(tried) == 1 and "user=Hello" in late.reply("Hello").text


def test_engine_is_closed_by_whoever_opened_it(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(EchoEngine):
        closed = False

        def close(self) -> None:
            self.closed = True

    ours, given = Closing(), Closing()
    monkeypatch.setattr("nightschool.sdk._opened", lambda _: ours)
    parts = assistant.settings, assistant.store, assistant.registry
    with Assistant(*parts) as first, Assistant(*parts, given) as second:
        assert first.reply("Hello").text and second.reply("Hello").text
    assert ours.closed and not given.closed


def test_empty_text_is_refused(assistant: Assistant) -> None:
    with pytest.raises(InputError, match="text is empty"):
        assistant.reply(" ")


def test_reply_that_takes_too_long_is_an_error_and_is_not_kept(quick_store: MemoryStore, toy_base: str) -> None:
    serving = ServingSettings(base=toy_base, timeout_seconds=1e-6, threads=1)
    settings = replace(quick_store.settings, serving=serving)
    late = Assistant(settings, quick_store, Registry.of(quick_store))
    with pytest.raises(ServingError, match=r"allow more time .*serving\.timeout_seconds"):
        late.reply("Hello there", user_id="ada")
    assert not list(quick_store.interactions())


def test_feedback_reaches_the_turn(assistant: Assistant) -> None:
    reply = assistant.reply("Hello there")
    assistant.rate(reply, -1, correction="Good day.")
    ((found,),) = assistant.store.feedback().values()
    assert (found.interaction_id, found.rating, found.correction) == (reply.id, -1, "Good day.")


def test_what_was_done_with_a_reply_reaches_the_turn(assistant: Assistant) -> None:
    reply = assistant.reply("Hello there")
    assistant.rate(reply, event="regenerated")
    other = assistant.reply("Hello there")
    assistant.rate(other, event="edited", correction="Good day.")
    found = assistant.store.feedback()
    assert [(f.event, f.correction) for i in (reply, other) for f in found[i.id]] == [
        ("regenerated", None),
        ("edited", "Good day."),
    ]


def test_turn_answered_elsewhere_can_be_recorded_and_rated(assistant: Assistant) -> None:
    kept = assistant.record("Do you open on Sunday?", "Yes, at nine.", user_id="ada")
    assert assistant.rate(kept, 1).interaction_id == kept.id
    assert assistant.recall("open on Sunday", user_id="ada")[0].memory.source_ids == (kept.id,)


def test_live_adapter_answers_and_is_named(assistant: Assistant) -> None:
    adapter = serve(assistant)
    reply = assistant.reply("Hello there")
    assert reply.adapter_id == adapter.id
    assert reply.text.startswith(adapter.id)


def test_switching_the_live_adapter_frees_the_one_before(assistant: Assistant) -> None:
    one = serve(assistant, weights=b"one")
    assert assistant.reply("Hello there").adapter_id == one.id
    two = serve(assistant, weights=b"two")
    assert assistant.reply("Hello there").adapter_id == two.id
    assert assistant.engine.adapters() == [two.id]
    assistant.registry.rollback()
    assert assistant.reply("Hello there").adapter_id == one.id
    assert assistant.engine.adapters() == [one.id]


def test_damaged_live_adapter_is_refused_and_the_base_answers(
    assistant: Assistant, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = serve(assistant)
    (adapter.path / WEIGHTS).write_bytes(b"others")
    with caplog.at_level(logging.WARNING, logger="nightschool"):
        assert assistant.reply("Secret words").adapter_id is None
    assert "the base answers" in caplog.text
    assert "Secret" not in caplog.text


def test_adapter_of_another_base_does_not_answer(assistant: Assistant) -> None:
    serve(assistant, base_id="another")
    assert assistant.reply("Hello there").adapter_id is None


def test_forgetting_withdraws_the_adapter_that_learnt_from_it(assistant: Assistant) -> None:
    kept = assistant.record("My code is 1234.", "Noted.", user_id="ada")
    adapter = serve(assistant, kept.id)
    plan = assistant.forget(user_id="ada")
    assert plan.interaction_ids == (kept.id,)
    assert assistant.registry.live() == adapter
    receipt = assistant.forget_apply(plan)
    assert receipt.tainted_adapters == (adapter.id,)
    assert assistant.registry.live() is None
    assert not (adapter.path / WEIGHTS).exists() and adapter.id in (adapter.path / MANIFEST).read_text()
    assert assistant.reply("Hello there").adapter_id is None


def test_async_front_gives_the_same_answers(assistant: Assistant) -> None:
    front = AsyncAssistant(assistant)

    async def talk() -> str:
        await front.remember("My dog is called Rex.", user_id="ada")
        assert len(await front.recall("dog called", user_id="ada")) == 1
        reply = await front.reply("What is my dog called?", user_id="ada")
        await front.rate(reply, 1)
        await front.record("Is he big?", "No.", user_id="ada", session_id="elsewhere")
        assert await front.history(user_id="ada") == await front.call(assistant.history, user_id="ada")
        assert (await front.forget_apply(await front.forget(user_id="ada"))).interactions == 2
        return reply.text

    assert "Rex" in asyncio.run(talk())


def test_open_makes_a_home_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "there"))
    with nightschool.open() as opened:
        assert opened.settings.home == tmp_path / "there"
    assert (tmp_path / "there" / "nightschool.db").exists()


def test_turns_of_the_session_take_no_place_of_what_is_remembered(assistant: Assistant) -> None:
    assistant.remember("My bicycle is a Brompton.", user_id="ada")
    assistant.record("My bicycle is at the station.", "Good.", user_id="ada", session_id="last week")
    assistant.record("I live in Oslo.", "Nice.", user_id="ada", session_id="now")
    for i in range(8):
        assistant.record(f"Tell me about my bicycle, please, part {i}.", "Yes.", user_id="ada", session_id="now")
    shown = assistant.reply("What is my bicycle?", user_id="ada", session_id="now")
    texts = [memory.text for memory in assistant.store.memories(shown.memory_ids).values()]
    assert any("Brompton" in text for text in texts) and any("station" in text for text in texts)
    assert not any("part" in text for text in texts)
    asked = "Where do I live?"
    assert "- I live in Oslo." not in assistant.reply(asked, user_id="ada", session_id="now").text
    assert "- I live in Oslo." in assistant.reply(asked, user_id="ada", session_id="another").text


def test_no_memory_is_shown_where_none_is_wanted(assistant: Assistant) -> None:
    assistant.remember("My dog is called Rex.", user_id="ada")
    memory = replace(assistant.settings.memory, recall_limit=0)
    assistant.settings = replace(assistant.settings, memory=memory)
    assert assistant.reply("What is my dog called?", user_id="ada").memory_ids == ()


def pieces(*said: str) -> Pieces:
    yield from said


def test_empty_answer_is_an_error_and_is_not_kept(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant.engine, "stream", lambda *_, **__: pieces(""))
    with pytest.raises(ServingError, match="the base answered nothing"):
        assistant.reply("Hello there")
    monkeypatch.setattr(assistant.engine, "stream", lambda *_, **__: pieces(" ", "\n"))
    with pytest.raises(ServingError, match="the base answered nothing"):
        assistant.reply("Hello there")
    assert not list(assistant.store.interactions())


@pytest.mark.parametrize(
    ("odd", "fault"), [("a\0b", "NUL character at 1"), ("\ud83d", "half of a surrogate pair at 0")]
)
def test_answer_that_cannot_be_kept_is_the_engines_fault_and_is_not_shown(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, odd: str, fault: str
) -> None:
    monkeypatch.setattr(assistant.engine, "stream", lambda *_, **__: pieces("Well, ", odd, "more"))
    with pytest.raises(ServingError, match=f"what the base answered holds .*{fault}, so nothing was recorded"):
        assistant.reply("Hello there")
    with assistant.stream("Hello there") as answer:
        assert next(answer) == "Well, "
        with pytest.raises(ServingError, match=fault):
            next(answer)
    assert not list(assistant.store.interactions())


def test_turns_of_one_session_are_answered_one_after_another_and_those_of_others_beside(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, running, most = assistant.engine.stream, [0], [0]

    def slow(prompt: Sequence[Message], **_: object) -> Pieces:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1
        yield from answer(prompt)

    monkeypatch.setattr(assistant.engine, "stream", slow)
    with ThreadPoolExecutor(3) as pool:
        same = [pool.submit(assistant.reply, f"part {i}", session_id="one") for i in range(3)]
        said = sorted((job.result().text for job in same), key=len)
        assert most == [1] and "assistant=" not in said[0] and said[2].count("assistant=") > said[1].count("assistant=")
        for job in [pool.submit(assistant.reply, "part", session_id=f"s{i}") for i in range(3)]:
            job.result()
    assert most[0] > 1


def test_turn_that_waits_too_long_for_the_one_before_is_an_error(assistant: Assistant) -> None:
    assistant.settings = replace(assistant.settings, serving=ServingSettings(timeout_seconds=0.1))
    with ThreadPoolExecutor(1) as pool, assistant._turn_of(Owner("ada", "", "one"), Event()):
        waiting = pool.submit(assistant.reply, "Hello there", user_id="ada", session_id="one")
        with pytest.raises(ServingError, match="the turn before is still being answered"):
            waiting.result()
    assert assistant.reply("Hello there", user_id="ada", session_id="one").text


def meanwhile(assistant: Assistant, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """`act` happens while the next reply is being made."""
    answer = assistant.engine.stream

    def stream(prompt: Sequence[Message], **_: object) -> Pieces:
        monkeypatch.setattr(assistant.engine, "stream", answer)
        act()
        yield from answer(prompt)

    monkeypatch.setattr(assistant.engine, "stream", stream)


def test_reply_to_what_is_forgotten_meanwhile_is_not_kept(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(**selected: str) -> None:
        assistant.forget_apply(assistant.forget(**selected))

    assistant.remember("My door code is 8841.", user_id="ada")
    meanwhile(assistant, monkeypatch, lambda: forget(user_id="ada"))
    with pytest.raises(StoreError, match="forgotten meanwhile; nothing was recorded"):
        assistant.reply("What is my door code?", user_id="ada", session_id="one")
    assistant.record("My door code is 8841.", "Noted.", user_id="ada", session_id="two")
    meanwhile(assistant, monkeypatch, lambda: forget(user_id="ada", session_id="two"))
    with pytest.raises(StoreError, match="kept or forgotten meanwhile"):
        assistant.reply("What is my code?", user_id="ada", session_id="two")
    assert not list(assistant.store.interactions())


def test_reply_of_an_adapter_that_learnt_from_what_is_forgotten_meanwhile_is_not_kept(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = assistant.record("My safe opens with 8842.", "Noted.", user_id="eve", session_id="e")
    serve(assistant, taught.id)
    meanwhile(assistant, monkeypatch, lambda: assistant.forget_apply(assistant.forget(user_id="eve")))
    with pytest.raises(Overtaken, match="forgotten meanwhile; nothing was recorded"):
        assistant.reply("How does the safe open?", user_id="bob", session_id="b")
    assert not list(assistant.store.interactions())


def test_reply_shown_words_that_are_forgotten_while_others_say_the_same_is_not_kept(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = assistant.record("Oh, dear, I live in Oslo now.", "Noted.", user_id="ada", session_id="one")
    assistant.record("Well, I live in Oslo.", "I know.", user_id="ada", session_id="two")
    meanwhile(assistant, monkeypatch, lambda: assistant.forget_apply(assistant.forget(interaction_ids=[first.id])))
    with pytest.raises(Overtaken, match="forgotten meanwhile; nothing was recorded"):
        assistant.reply("Where do I live?", user_id="ada", session_id="three")
    assert [i.session_id for i in assistant.store.interactions()] == ["two"]


def test_weights_that_cannot_be_erased_are_told_of_with_the_receipt(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = assistant.record("My safe opens with 8842.", "Noted.", user_id="eve", session_id="e")
    adapter = serve(assistant, taught.id)
    plan, unlink = assistant.forget(user_id="eve"), Path.unlink

    def refused(path: Path, **how: bool) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "not permitted")
        unlink(path, **how)

    with monkeypatch.context() as patched, pytest.raises(Unerased, match=f"weights.*{adapter.path / WEIGHTS}") as told:
        patched.setattr(Path, "unlink", refused)
        assistant.forget_apply(plan)
    assert told.value.receipt.tainted_adapters == (adapter.id,)
    assert assistant.registry.live() is None and not list(assistant.store.interactions())


def test_recorded_reply_is_traced_to_the_memories_that_it_was_shown(assistant: Assistant) -> None:
    note = assistant.remember("My dog is called Rex.", user_id="ada")
    kept = assistant.record("My dog's name?", "Rex.", user_id="ada", session_id="s", memory_ids=[note.id])
    assert assistant.store.interaction(kept.id).memory_ids == (note.id,)
    for user in ("ada", "bob"):
        with pytest.raises(NotFound, match=f"user '{user}' has no memory"):
            unseen = ["m:none"] if user == "ada" else [note.id]
            assistant.record("And?", "Rex.", user_id=user, session_id="t", memory_ids=unseen)
    of_a = assistant.remember("Rex is a poodle.", user_id="ada", agent_id="a")
    with pytest.raises(NotFound, match=of_a.id):
        ids = (memory.id for memory in (note, of_a))
        assistant.record("And?", "A poodle.", user_id="ada", agent_id="b", session_id="t", memory_ids=cast(Any, ids))
    assert len(list(assistant.store.interactions())) == 1
    assistant.record("And?", "A poodle.", user_id="ada", agent_id="a", session_id="t", memory_ids=[note.id, of_a.id])


def test_calls_that_are_not_waited_for_are_those_of_a_subclass(assistant: Assistant) -> None:
    class Careful(Assistant):
        def remember(self, text: str, **how: Any) -> Memory:
            return super().remember(f"{text} (careful)", **how)

    careful = Careful(assistant.settings, assistant.store, assistant.registry, assistant.engine)
    kept = asyncio.run(AsyncAssistant(careful).remember("My dog is called Rex.", user_id="ada"))
    assert kept.text == "My dog is called Rex. (careful)"


def test_memories_of_a_user_are_listed_newest_first(assistant: Assistant) -> None:
    now = assistant.store.clock()
    for age, text in ((2, "I live in Oslo."), (1, "Is the bakery open?")):
        assistant.record(text, "Yes.", user_id="ada", agent_id="a", session_id="s", created_utc=now - age)
    note = assistant.remember("The bakery closes at six.", user_id="ada")
    assistant.remember("Not hers.", user_id="bob", shared=True)
    found = assistant.memories(user_id="ada")
    assert [m.kind for m in found] == ["note", "turn", *(m.kind for m in found[2:])]
    assert {m.kind for m in found[2:]} == {"turn", "fact"} and all(m.user_id == "ada" for m in found)
    assert assistant.memories(user_id="ada", agent_id="") == assistant.memories(user_id="ada", kind="note") == [note]
    assert assistant.memories(user_id="ada", limit=1) == [note]
    with pytest.raises(InputError, match="kind is 'notes'; give one of turn"):
        assistant.memories(kind=cast(MemoryKind, "notes"))


def test_system_prompt_that_opens_a_session_holds_for_all_of_it(assistant: Assistant) -> None:
    assistant.record([{"role": "system", "content": "You are a pirate."}], "", user_id="ada", session_id="one")
    for i in range(REACH + 2):
        assistant.record(f"And what is {i} and {i}?", f"It is {2 * i}.", user_id="ada", session_id="one")
    text = assistant.reply("Hello", user_id="ada", session_id="one").text
    assert text.startswith("None: system=You are a pirate.") and "what is 1 and 1" not in text
    opening = assistant.store.first_interaction("ada", "", "one")
    assert opening and opening.turn[-1]["content"] == "And what is 0 and 0?"


def test_reply_stands_in_its_session_where_it_was_given(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Assistant(assistant.settings, assistant.store, assistant.registry, assistant.engine)
    meanwhile(assistant, monkeypatch, lambda: other.record("Hello", "Hi.", user_id="ada", session_id="one"))
    with pytest.raises(Overtaken, match="another turn of this session"):
        assistant.reply("How are you?", user_id="ada", session_id="one")
    assert [i.text for i in assistant.store.interactions()] == ["Hello"]


def test_what_a_long_session_said_long_ago_is_remembered(assistant: Assistant) -> None:
    assistant.record("My sister Ingrid keeps bees.", "How nice.", user_id="ada", session_id="one")
    for i in range(70):
        assistant.record(f"And what is {i} and {i}?", f"It is {2 * i}.", user_id="ada", session_id="one")
    reply = assistant.reply("What does my sister keep?", user_id="ada", session_id="one")
    shown = [memory.text for memory in assistant.store.memories(reply.memory_ids).values()]
    assert any("bees" in text for text in shown)
    assert "user=And what is 5 and 5?" not in reply.text and "user=And what is 6 and 6?" in reply.text


def test_answer_is_given_without_notes_where_memory_cannot_be_searched(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreError("the index is broken")

    monkeypatch.setattr(assistant.store, "recall", broken)
    with caplog.at_level(logging.WARNING, logger="nightschool"):
        assert assistant.reply("Secret words").memory_ids == ()
    assert "without what memory holds: the index is broken" in caplog.text and "Secret" not in caplog.text


def held_back(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> tuple[Event, Semaphore]:
    """Answers come when the first is set; the second is raised by one as each is begun."""
    gate, begun, answer = Event(), Semaphore(0), assistant.engine.stream

    def waiting(prompt: Sequence[Message], **_: object) -> Pieces:
        begun.release()
        gate.wait(60)
        yield from answer(prompt)

    monkeypatch.setattr(assistant.engine, "stream", waiting)
    return gate, begun


def test_reply_comes_in_pieces_and_is_recorded_when_they_end(assistant: Assistant) -> None:
    with assistant.stream("Hello there", user_id="ada", session_id="one") as answer:
        assert next(answer) == "None: "
        with pytest.raises(InputError, match="read its pieces to the end"):
            assert answer.reply
        assert list(answer) == ["user=Hello there"] and list(answer) == []
    kept = assistant.store.interaction(answer.reply.id)
    assert (kept.text, kept.reply, kept.user_id) == ("Hello there", "None: user=Hello there", "ada")
    assert answer.reply.text == kept.reply and answer.reply.session_id == "one"


def test_error_of_a_reply_in_pieces_is_raised_where_it_is_read(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Pieces:
        yield "Well, "
        raise ServingError("the server is gone")

    monkeypatch.setattr(assistant.engine, "stream", broken)
    with assistant.stream("Hello there") as answer:
        assert next(answer) == "Well, "
        for _ in range(2):
            with pytest.raises(ServingError, match="the server is gone"):
                next(answer)
    with pytest.raises(InputError, match="text is empty"):
        list(assistant.stream(" "))
    assert not list(assistant.store.interactions())


def test_reply_that_is_not_read_to_its_end_is_not_kept_however_long_it_is_made(assistant: Assistant) -> None:
    with assistant.stream("Hello there", session_id="one") as answer:
        assert next(answer) == "None: "
        time.sleep(0.2)  # the engine has long ended
        with pytest.raises(InputError, match="read its pieces to the end"):
            assert answer.reply
    with pytest.raises(ServingError, match="cancelled"):
        list(answer)
    assert "assistant=" not in assistant.reply("Hello again", session_id="one").text
    assert [i.text for i in assistant.store.interactions()] == ["Hello again"]


def test_reply_that_is_cancelled_while_it_is_written_is_not_kept(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert, stream = assistant.store._insert, assistant.stream("Hello there", session_id="one")

    def leaving(*given: Any) -> object:
        stream.close()
        return insert(*given)

    monkeypatch.setattr(assistant.store, "_insert", leaving)
    with pytest.raises(ServingError, match="cancelled"):
        list(stream)
    assert not list(assistant.store.interactions())
    monkeypatch.undo()
    assert assistant.reply("Hello there", session_id="one").text == "None: user=Hello there"


def test_wait_for_a_piece_that_is_given_up_breaks_the_answer_off(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, _ = held_back(assistant, monkeypatch)
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        async with front.stream("Hello") as answer:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(answer), 0.1)
            gate.set()
            with pytest.raises(ServingError, match="cancelled"):
                await anext(answer)

    asyncio.run(talk())
    assert not list(assistant.store.interactions())


def test_process_ends_though_a_reply_is_not_read_to_its_end() -> None:
    script = """
from nightschool.replies import ReplyStream

def answering(listener):
    listener.hear("Well, ")
    listener.heard_all(60.0)

stream = ReplyStream(answering)
print(next(stream))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "Well, \n"


def test_closing_breaks_off_what_is_still_read(assistant: Assistant) -> None:
    other = Assistant(assistant.settings, assistant.store, assistant.registry, assistant.engine)
    stream = other.stream("Hello")
    assert next(stream)
    other.close()
    with pytest.raises(ServingError, match="cancelled"):
        list(stream)


class Endless:
    """Goes on until it is closed, which `ended` tells."""

    def __init__(self) -> None:
        self.ended, self.said = Event(), 0

    def __call__(self, *_: object, **__: object) -> Pieces:
        try:
            while True:
                self.said += 1
                time.sleep(0.001)
                yield "and "
        finally:
            self.ended.set()


def test_engine_stops_where_a_reply_in_pieces_is_left(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = assistant.engine.stream
    for leave in (ReplyStream.close, lambda stream: None):
        endless = Endless()
        monkeypatch.setattr(assistant.engine, "stream", endless)
        stream = assistant.stream("Hello", session_id="one")
        assert next(stream) == "and "
        leave(stream)
        del stream  # what nobody holds is closed as well
        assert endless.ended.wait(60)
    monkeypatch.setattr(assistant.engine, "stream", answer)
    assert "assistant=" not in assistant.reply("Hello again", session_id="one").text
    assert [i.text for i in assistant.store.interactions()] == ["Hello again"]


def test_awaited_reply_comes_in_pieces(assistant: Assistant) -> None:
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        async with front.stream("Hello there", user_id="ada", session_id="one") as answer:
            assert [piece async for piece in answer] == ["None: ", "user=Hello there"]
        assert assistant.store.interaction(answer.reply.id).reply == answer.reply.text

    asyncio.run(talk())


def test_turns_to_be_recorded_hold_up_nobody_elses_calls(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nightschool.aio.THREADS", 2)
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        async with front.stream("Hello", session_id="one") as unread:
            assert await anext(unread)
            waiting = [asyncio.create_task(front.record("Hi", "Ho", session_id="one")) for _ in range(2)]
            await asyncio.sleep(0.1)
            await asyncio.wait_for(front.recall("tea", user_id="bo"), 30)
            assert not any(task.done() for task in waiting)
            assert [piece async for piece in unread]
        await asyncio.gather(*waiting)

    asyncio.run(talk())


def test_pieces_that_nobody_takes_break_the_reply_off(assistant: Assistant) -> None:
    assistant.settings = replace(assistant.settings, serving=ServingSettings(timeout_seconds=2.0))
    unread = assistant.stream("Hello there", session_id="one")
    assert next(unread) == "None: "
    time.sleep(1.0)  # else the next turn, which waits as long, might give up first
    assert "Hello there" not in assistant.reply("Hello again", session_id="one").text
    with pytest.raises(ServingError, match="not read in time"):
        list(unread)
    assert [i.text for i in assistant.store.interactions()] == ["Hello again"]


def test_awaited_reply_in_pieces_waits_for_a_place_no_longer_than_for_an_answer(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightschool.aio.THREADS", 1)
    front, patient = AsyncAssistant(assistant), assistant.settings
    gate, _ = held_back(assistant, monkeypatch)

    async def talk() -> None:
        async with front.stream("Hello", session_id="one") as unread:
            assistant.settings = replace(patient, serving=ServingSettings(timeout_seconds=0.1))
            with pytest.raises(ServingError, match="1 replies are being read in pieces"):
                async with front.stream("Hello", session_id="two"):
                    pass
            assistant.settings = patient
            gate.set()
            assert [piece async for piece in unread]
        async with front.stream("Hello", session_id="two") as answer:
            assert [piece async for piece in answer]

    asyncio.run(talk())


def test_page_says_how_many_replies_are_open_at_once() -> None:
    page = (Path(nightschool.__file__).parent / "docs" / "sdk.md").read_text(encoding="utf-8")
    assert f"has {THREADS} such streams open" in page and MOST_WAITING == 8 and "At most eight are in line" in page


def test_each_reply_draws_for_itself(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()

    def drawing(*_: object, sampling: Sampling, **__: object) -> Pieces:
        seeds.add(sampling.seed)
        yield "Hi."

    monkeypatch.setattr(assistant.engine, "stream", drawing)
    for session in ("one", "two", "three"):
        assistant.reply("Hello", session_id=session)
    assert len(seeds) > 1


def test_engine_stops_where_an_awaited_reply_is_cancelled(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = AsyncAssistant(assistant)

    async def whole() -> None:
        await front.reply("Hello")

    async def in_pieces() -> None:
        async with front.stream("Hello") as answer:
            async for _ in answer:
                pass

    async def cancelled(talk: Callable[[], Coroutine[None, None, None]], endless: Endless) -> None:
        job = asyncio.create_task(talk())
        while not endless.said:
            await asyncio.sleep(0.01)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    for talk in (whole, in_pieces):
        endless = Endless()
        monkeypatch.setattr(assistant.engine, "stream", endless)
        asyncio.run(cancelled(talk, endless))
        assert endless.ended.wait(60)
    assert not list(assistant.store.interactions())


def test_opening_finishes_a_withdrawal_that_a_crash_interrupted(assistant: Assistant) -> None:
    one, two = serve(assistant), serve(assistant, "b2:2", weights=b"other weights")
    assistant.registry.taint(two.id, "a turn was forgotten")
    with nightschool.open(settings=assistant.settings) as again:
        assert again.registry.deployments()[-1]["adapter_id"] == one.id
    assert not (two.path / WEIGHTS).exists() and (two.path / MANIFEST).exists() and (one.path / WEIGHTS).exists()


def test_home_whose_withdrawal_fails_is_closed_again(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def broken(registry: Registry) -> None:
        opened.append(registry.database)
        raise StoreError("the disk is full")

    monkeypatch.setattr(Registry, "withdraw_tainted", broken)
    with pytest.raises(StoreError, match="the disk is full"):
        nightschool.open(settings=assistant.settings)
    (database,) = opened
    with pytest.raises(StoreError, match="it was closed"), database.reading():
        pass


def test_only_some_turns_of_a_session_wait(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, _ = held_back(assistant, monkeypatch)
    with ThreadPoolExecutor(MOST_WAITING + 1) as pool:
        jobs = [pool.submit(assistant.reply, "Hello", session_id="one") for _ in range(MOST_WAITING + 1)]
        refused = next(as_completed(jobs))
        assert isinstance(refused.exception(), ServingError) and "wait for an answer already" in str(
            refused.exception()
        )
        gate.set()
    assert sum(job.exception() is None for job in jobs) == MOST_WAITING


def test_cancelled_reply_returns_at_once_and_is_not_kept(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = assistant.engine.stream
    gate, begun = held_back(assistant, monkeypatch)
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        job = asyncio.create_task(front.reply("Hello", session_id="one"))
        assert await asyncio.to_thread(begun.acquire, timeout=60)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert not gate.is_set()
        gate.set()
        monkeypatch.setattr(assistant.engine, "stream", answer)
        assert "assistant=" not in (await front.reply("Hello again", session_id="one")).text

    asyncio.run(talk())
    assert [i.text for i in assistant.store.interactions()] == ["Hello again"]


def test_reply_that_is_cancelled_when_it_is_written_already_is_the_last_of_its_session(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, written = Event(), Event(), assistant.store._indexing.written

    def waiting(*given: Any) -> None:
        begun.set()
        assert gate.wait(60)
        written(*given)

    monkeypatch.setattr(assistant.store._indexing, "written", waiting)
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        job = asyncio.create_task(front.reply("Hello", user_id="ada", session_id="one"))
        assert await asyncio.to_thread(begun.wait, 60)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        (last,) = await front.call(assistant.store.latest_interactions, "ada", "", "one", 1)
        assert (last.text, last.reply) == ("Hello", "None: user=Hello")
        gate.set()

    asyncio.run(talk())
    assert assistant.record("Bye", "Bye.", user_id="ada", session_id="one").position == 1
    assert assistant.store.verify() == []


def test_cancelled_replies_that_wait_are_not_answered_and_give_up_their_places(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = held_back(assistant, monkeypatch)
    front = AsyncAssistant(assistant)

    async def talk() -> None:
        first = asyncio.create_task(front.reply("Hello", session_id="one"))
        assert await asyncio.to_thread(begun.acquire, timeout=60)
        jobs = [asyncio.create_task(front.reply("Hello", session_id="one")) for _ in range(MOST_WAITING - 1)]
        await asyncio.sleep(0.1)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await asyncio.sleep(3 * LOOK_S)
        last = asyncio.create_task(front.reply("Hello again", session_id="one"))
        gate.set()
        await asyncio.gather(first, last)

    asyncio.run(talk())
    assert begun.acquire(blocking=False) and not begun.acquire(blocking=False)  # the last, and none between
    assert [i.text for i in assistant.store.interactions()] == ["Hello", "Hello again"]


def test_engine_that_records_in_the_session_it_answers_in_is_an_error_and_no_deadlock(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(assistant, monkeypatch, lambda: assistant.record("A tool", "said so.", user_id="ada", session_id="one"))
    with pytest.raises(StoreError, match="another turn of this session"):
        assistant.reply("Hello", user_id="ada", session_id="one")


def test_many_turns_of_a_session_can_be_recorded_at_once(assistant: Assistant) -> None:
    with ThreadPoolExecutor(3 * MOST_WAITING) as pool:
        list(pool.map(lambda i: assistant.record(f"turn {i}", "ok", session_id="one"), range(3 * MOST_WAITING)))
    assert len(list(assistant.store.interactions())) == 3 * MOST_WAITING


def test_turn_answered_elsewhere_waits_no_longer_than_a_reply(assistant: Assistant) -> None:
    assistant.settings = replace(assistant.settings, serving=ServingSettings(timeout_seconds=0.1))
    with ThreadPoolExecutor(1) as pool, assistant._turn_of(Owner("default", "", "one"), Event()):
        waiting = pool.submit(assistant.record, "Hello there", "Hi.", session_id="one")
        with pytest.raises(ServingError, match="the turn before is still being answered"):
            waiting.result(60)
    assert not list(assistant.store.interactions())


def test_turns_of_a_session_are_answered_in_the_order_in_which_they_came(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = held_back(assistant, monkeypatch)
    order = [str(i) for i in range(MOST_WAITING)]
    with ThreadPoolExecutor(MOST_WAITING) as pool:
        for n, text in enumerate(order, 1):
            pool.submit(assistant.reply, text, session_id="one")
            assert begun.acquire(timeout=60) if n == 1 else True
            while len(assistant._turns_of(Owner("default", "", "one")).threads) < n:
                time.sleep(0.01)
        gate.set()
    assert [i.text for i in assistant.store.interactions()] == order


def over(store: MemoryStore) -> Assistant:
    registry = Registry.of(store)
    return Assistant(store.settings, store, registry, EchoEngine())


def test_reply_that_could_not_be_recorded_is_not_made(
    settings: Settings, make_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryStore(settings, embedder=make_embedder()) as store:
        store.record([{"role": "user", "content": "hi"}], "ho", user_id="ada", session_id="s")
    with MemoryStore(settings, embedder=make_embedder(name="another")) as store:
        fresh = over(store)
        monkeypatch.setattr(fresh.engine, "stream", None)  # so that a call would be another error
        with pytest.raises(StoreError, match="the embedder is another"):
            fresh.reply("Hello")


def test_reply_is_kept_without_notes_where_making_the_index_anew_was_interrupted(
    quick_store: MemoryStore, make_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_store.remember("Hello there", user_id="ada")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Indexing, "pending", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        quick_store.rebuild_index()
    with MemoryStore(quick_store.settings, embedder=make_embedder()) as store:
        reply = over(store).reply("Hello there", user_id="ada")
        assert (reply.memory_ids, store.interaction(reply.id).reply) == ((), reply.text)


def test_what_cannot_be_kept_is_refused_before_it_is_answered(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assistant.engine, "stream", None)  # so that a call would be another error
    for text, owner in (("a\ud800", {}), ("hi", {"session_id": "x" * 300}), ("hi", {"user_id": ""})):
        with pytest.raises(InputError):
            assistant.reply(text, **owner)
    with pytest.raises(InputError, match="a message is of the assistant"):
        assistant.record([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "no")
    with pytest.raises(InputError, match="content is of type NoneType"):
        assistant.record([{"role": "user"}], "no")  # type: ignore[typeddict-item]
    with pytest.raises(InputError, match="surrogate"):
        assistant.rate("\ud800", 1)


@pytest.mark.parametrize("turn", [None, 5, {"role": "user", "content": "hi"}, ["hi"], [None]])
def test_turn_that_is_no_list_of_messages_is_refused(assistant: Assistant, turn: Any) -> None:
    with pytest.raises(InputError, match="message"):
        assistant.record(turn, "ok", user_id="ada")


@pytest.mark.parametrize("reply", [None, 5, {}])
def test_what_is_no_reply_is_not_rated(assistant: Assistant, reply: Any) -> None:
    with pytest.raises(InputError, match="interaction_id is of type"):
        assistant.rate(reply, 1)


def test_subject_of_no_text_is_refused(assistant: Assistant) -> None:
    with pytest.raises(InputError, match="subject holds half of a surrogate pair"):
        assistant.history(user_id="ada", subject="\ud800")


@pytest.mark.parametrize(("session", "found"), [("", "is empty"), (0, "is of type int"), (False, "is of type bool")])
def test_session_that_has_no_name_is_not_the_own_one(assistant: Assistant, session: Any, found: str) -> None:
    front = AsyncAssistant(assistant)
    for attempt in (
        lambda: assistant.reply("Hello", session_id=session),
        lambda: list(assistant.stream("Hello", session_id=session)),
        lambda: assistant.record("Hello", "Hi.", session_id=session),
        lambda: asyncio.run(front.reply("Hello", session_id=session)),
    ):
        with pytest.raises(InputError, match=f"session_id {found}"):
            attempt()
    assert assistant.reply("Hello").session_id == assistant._session_id


def test_closed_assistant_refuses(assistant: Assistant) -> None:
    reply = assistant.reply("Hello", user_id="ada")
    assistant.close()
    for attempt in (
        lambda: assistant.reply("Hello", user_id="ada"),
        lambda: assistant.remember("a note", user_id="ada"),
        lambda: assistant.recall("Hello", user_id="ada"),
        lambda: assistant.rate(reply, 1),
        lambda: assistant.forget(user_id="ada"),
    ):
        with pytest.raises(StoreError, match="it was closed; open the home again"):
            attempt()
    assistant.close()


def test_home_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for home in ("", 5, tmp_path / "file", os.fsdecode(bytes(tmp_path) + b"/\xff\xfe")):
        with pytest.raises(SettingsError, match="home"):
            nightschool.open(home)  # type: ignore[arg-type]


def test_home_and_settings_of_another_home_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one of them"):
        nightschool.open(tmp_path / "one", settings=Settings(home=tmp_path / "two"))
