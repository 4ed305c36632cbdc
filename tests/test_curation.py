import pytest
from nightschool.evolve.curation import BOUNDED, CURATION, MASKED, as_taught, fault
from nightschool.evolve.identifiers import ECHOED, PLAIN, SHORTENED, TYPESET
from nightschool.evolve.types import Prompt

PROMPT: Prompt = ({"role": "user", "content": "I am ada@example.org"},)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("Two days.", None),
        ("line\n\ttabbed", None),
        ("no no no no " * 20, "the answer repeats itself"),
        ("word " * 39, None),  # too short to be called a loop
        ("ten\x00 euros", "the answer holds broken characters"),
        ("はい。そうです。" * 40, "the answer repeats itself"),
        ("no,no,no," * 90, "the answer repeats itself"),
        (" ".join(f"{n} bells cost {n * 7} euros." for n in range(60)), None),
        ("".join(f'<tr><td class="cell">{n}</td><td class="cell"></td></tr>' for n in range(59)), None),
        ("0" * 600, "the answer repeats itself"),
        ("caf\ufffd", "the answer holds broken characters"),
        (" ".join(map(str, range(9000))), "the answer is longer than 16000 characters"),
    ],
)
def test_what_is_no_answer_is_named(completion: str, reason: str | None):
    assert fault(completion) == reason


def test_a_row_is_masked_as_one_and_version_0_is_as_it_was_said():
    words = {"chosen": "Hello ada@example.org", "rejected": "Who are you?"}
    assert as_taught(CURATION, PROMPT, words) == {
        "prompt": ({"role": "user", "content": "I am <EMAIL>"},),
        "chosen": "Hello <EMAIL>",
        "rejected": "Who are you?",
    }
    assert as_taught(0, PROMPT, words) == {"prompt": PROMPT, **words}


@pytest.mark.parametrize("version", [MASKED, BOUNDED])
def test_older_versions_know_a_password_by_its_digits_alone(version: int):
    prompt: Prompt = ({"role": "user", "content": "my password is hunter22, his password is hunter"},)
    older = as_taught(version, prompt, {"completion": "ok"})["prompt"]
    assert older[0]["content"] == "my password is <SECRET>, his password is hunter"
    newer = as_taught(PLAIN, prompt, {"completion": "ok"})["prompt"]
    assert newer[0]["content"] == "my password is <SECRET>, his password is <SECRET_2>"


def test_older_versions_miss_a_number_with_more_behind_it():
    prompt: Prompt = ({"role": "user", "content": "pay BE68 5390 0754 7034 by Friday, API_KEY=sesamesesame"},)
    older = as_taught(PLAIN, prompt, {"completion": "ok"})["prompt"]
    assert older == prompt
    newer = as_taught(SHORTENED, prompt, {"completion": "ok"})["prompt"]
    assert newer[0]["content"] == "pay <IBAN> by Friday, API_KEY=<SECRET>"


def test_older_versions_know_the_spaces_and_hyphens_of_a_keyboard_alone():
    prompt: Prompt = ({"role": "user", "content": "Phone:555-123-4567, 555\u2011123\u20114567, ssh://app:s3cret@db"},)
    assert as_taught(SHORTENED, prompt, {"completion": "ok"})["prompt"] == prompt
    newer = as_taught(TYPESET, prompt, {"completion": "ok"})["prompt"]
    assert newer[0]["content"] == "Phone:<PHONE>, <PHONE>, ssh://app:<SECRET>@db"


def test_older_versions_mask_a_password_where_it_is_announced_alone():
    prompt: Prompt = ({"role": "user", "content": "my password is swordfish"},)
    assert as_taught(TYPESET, prompt, {"completion": "Noted: swordfish."})["completion"] == "Noted: swordfish."
    assert as_taught(ECHOED, prompt, {"completion": "Noted: swordfish."})["completion"] == "Noted: <SECRET>."


def test_each_answer_of_a_row_is_taken_to_follow_the_prompt():
    prompt: Prompt = ({"role": "user", "content": "What is the wifi password?"},)
    row = as_taught(CURATION, prompt, {"chosen": "It's swordfish.", "rejected": "Tiger99"})
    assert row["chosen"] == "It's <SECRET>." and row["rejected"] == "<SECRET_2>"
