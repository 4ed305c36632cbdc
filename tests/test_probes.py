"""The operator's own conditions: read as they are meant or refused, and hard."""

from pathlib import Path

import pytest
from nightschool.errors import SettingsError
from nightschool.evolve.probes import Probe, load_probes


def probes(home: Path, text: str) -> tuple[Probe, ...]:
    (home / "probes.toml").write_text(text, encoding="utf-8")
    return load_probes(home)


def test_a_home_without_a_file_has_no_probes(tmp_path: Path) -> None:
    assert load_probes(tmp_path) == ()


def test_probes_are_read_in_order(tmp_path: Path) -> None:
    text = '[[probe]]\nprompt = "a?"\nmust = ["x", "y"]\n[[probe]]\nprompt = "b?"\nmust_not = ["z"]\n'
    assert probes(tmp_path, text) == (Probe("a?", ("x", "y")), Probe("b?", (), ("z",)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[probe", "not valid TOML"),
        ('[[probes]]\nprompt = "a?"', "unknown probes; a probe begins with"),
        ('[probe]\nprompt = "a?"', r"write \[\[probe\]\]"),
        ('probe = ["a"]', r"write \[\[probe\]\]"),
        ('[[probe]]\nprompt = "a?"\nmusst = ["x"]', "probe 1: unknown musst; known: must, must_not, prompt"),
        ('[[probe]]\nmust = ["x"]', "probe 1: prompt is None"),
        ('[[probe]]\nprompt = " "\nmust = ["x"]', "probe 1: prompt is ' '"),
        ('[[probe]]\nprompt = "a?"', "every answer would pass"),
        ('[[probe]]\nprompt = "a?"\nmust = "x"', "must is 'x'; give a list"),
        ('[[probe]]\nprompt = "a?"\nmust_not = [""]', r"must_not is \[''\]; give a list"),
    ],
)
def test_what_is_no_probe_is_an_error_that_says_where_and_why(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        probes(tmp_path, text)


def test_a_mark_of_byte_order_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "probes.toml").write_text('[[probe]]\nprompt = "Hello"\nmust = ["Hi"]\n', encoding="utf-8-sig")
    assert [probe.prompt for probe in load_probes(tmp_path)] == ["Hello"]


def test_a_file_that_cannot_be_read_is_an_error_and_not_no_probes(tmp_path: Path) -> None:
    (tmp_path / "probes.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        load_probes(tmp_path)


@pytest.mark.parametrize(
    ("answer", "faults"),
    [
        ("We open from NINE to six.", []),
        ("We open at eight.", ["lacks 'nine to six'"]),
        ("From nine to six, or at Midnight.", ["holds 'midnight'"]),
        (" ", ["is empty"]),
    ],
)
def test_faults_name_what_is_missing_and_what_must_not_be_there(answer: str, faults: list[str]) -> None:
    assert Probe("When?", ("nine to six",), ("midnight",)).faults(answer) == faults
