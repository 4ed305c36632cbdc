import os
from math import inf
from pathlib import Path
from typing import Any

import pytest
from nightschool.errors import SettingsError
from nightschool.evolve.gate import criteria
from nightschool.settings import (
    SECTIONS,
    GateSettings,
    MemorySettings,
    NightSettings,
    ServingSettings,
    Settings,
    load_settings,
    make_home,
    with_values,
)
from sqlalchemy import make_url


def test_defaults_hold_without_file_and_environment(tmp_path: Path) -> None:
    settings = load_settings(tmp_path, {})
    assert settings == Settings(home=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path / 'nightschool.db'}"
    assert settings.index_url == str(tmp_path / "index")


def test_home_that_is_none_is_named(tmp_path: Path) -> None:
    no_utf_8 = os.fsdecode(b"/tmp/\xff\xfe")
    for wrong in ("", 5, b"home", "~nobody-of-this-name/home", no_utf_8, Path(no_utf_8)):
        with pytest.raises(SettingsError, match="home") as refused:
            load_settings(wrong, {})  # type: ignore[arg-type]
        assert str(refused.value).isascii()
    with pytest.raises(SettingsError, match=r"home is 'x'; give a pathlib\.Path"):
        Settings(home="x")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "a\0b"):
        with pytest.raises(SettingsError, match="is no folder and cannot be made"):
            make_home(home)


def test_home_in_a_folder_that_is_no_utf_8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(SettingsError, match=r"home is '.*udcff.home'; give a path that is UTF-8"):
        load_settings("home", {})


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("~nobody-of-this-name/x", "Could not determine home directory"),
        (os.fsdecode(b"\xff"), "give a path that is UTF-8"),
        ("file://", "give the path of a folder"),
    ],
)
def test_index_in_no_folder_is_refused_when_the_settings_are_read(tmp_path: Path, url: str, why: str) -> None:
    with pytest.raises(SettingsError, match=rf"memory\.index_url .*{why}"):
        load_settings(tmp_path, {"NIGHTSCHOOL_MEMORY_INDEX_URL": url})


def test_settings_that_are_a_link_to_nothing_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(SettingsError, match=r"settings\.toml cannot be read: No such file"):
        load_settings(tmp_path, {})
    (tmp_path / "elsewhere.toml").write_text("[night]\nseed = 7\n")
    assert load_settings(tmp_path, {}).night.seed == 7


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").mkdir()
    with pytest.raises(SettingsError, match=r"settings\.toml cannot be read: Is a directory"):
        load_settings(tmp_path, {})


def test_number_that_is_given_as_text_is_named() -> None:
    with pytest.raises(SettingsError, match=r"serving\.max_tokens is '96'; it is 1 or more"):
        ServingSettings(max_tokens="96")  # type: ignore[arg-type]


def test_home_stays_where_it_was_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings("mine", env={"NIGHTSCHOOL_MEMORY_INDEX_URL": "vectors"})
    assert settings.home == tmp_path / "mine" and settings.index_url == str(tmp_path / "mine" / "vectors")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("sqlite:///memory.db", "sqlite:///{home}/memory.db"),
        ("sqlite+pysqlite:///a%20b/c%3Fd.db?timeout=5", "sqlite+pysqlite:///{home}/a%20b/c%3Fd.db?timeout=5"),
        ("sqlite:///~/memory.db", "sqlite:///{user}/memory.db"),
        ("sqlite:///~nobody-here.db", "sqlite:///{home}/~nobody-here.db"),
        ("sqlite:////var/lib/memory.db", "sqlite:////var/lib/memory.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///file:memory.db?uri=true", "sqlite:///file:memory.db?uri=true"),
        ("postgresql+psycopg://ann@host/memory", "postgresql+psycopg://ann@host/memory"),
    ],
)
def test_database_is_the_same_wherever_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, named: str
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    settings = load_settings(tmp_path, {"NIGHTSCHOOL_DATABASE_URL": url})
    assert settings.database_url == named.format(home=tmp_path, user="/home/ann")


@pytest.mark.parametrize("name", ["a?b", "c#d%20e", "x?mode=ro&uri=true", "ü é"])
def test_database_is_in_the_home_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    assert make_url(Settings(home=tmp_path / name).database_url).database == str(tmp_path / name / "nightschool.db")


def test_environment_wins_over_file_and_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("[night]\nbudget_minutes = 5\nseed = 7\n")
    settings = load_settings(tmp_path, {"NIGHTSCHOOL_NIGHT_SEED": "9"})
    assert (settings.night.budget_minutes, settings.night.seed) == (5.0, 9)


def test_short_names_reach_the_database_and_the_base(tmp_path: Path) -> None:
    env = {"NIGHTSCHOOL_DATABASE_URL": "postgresql+psycopg://x", "NIGHTSCHOOL_BASE": "some/base"}
    settings = load_settings(tmp_path, env)
    assert settings.database_url == "postgresql+psycopg://x"
    assert settings.serving.base == "some/base"


def test_setting_that_two_variables_set_is_refused_unless_they_agree(tmp_path: Path) -> None:
    env = {"NIGHTSCHOOL_BASE": "one/base", "NIGHTSCHOOL_SERVING_BASE": "one/base"}
    assert load_settings(tmp_path, env).serving.base == "one/base"
    with pytest.raises(SettingsError, match=r"NIGHTSCHOOL_BASE and NIGHTSCHOOL_SERVING_BASE both set serving\.base"):
        load_settings(tmp_path, env | {"NIGHTSCHOOL_SERVING_BASE": "another"})
    urls = {
        "NIGHTSCHOOL_DATABASE_URL": "sqlite:///a.db",
        "NIGHTSCHOOL_MEMORY_DATABASE_URL": "postgresql://u:secret@h/d",
    }
    with pytest.raises(SettingsError, match=r"both set memory\.database_url, and differ") as refused:
        load_settings(tmp_path, urls)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["NIGHTSCHOOL_NIGHT", "NIGHTSCHOOL_NIGHT_"])
def test_variable_that_names_a_section_alone_is_told_what_is_expected(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}; expected NIGHTSCHOOL_<SECTION>_<FIELD>"):
        load_settings(tmp_path, {name: "9"})


def test_home_comes_from_the_environment_when_not_given(tmp_path: Path) -> None:
    assert load_settings(None, {"NIGHTSCHOOL_HOME": str(tmp_path / "n")}).home == tmp_path / "n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[nigth]\nseed = 1\n", r"no section \[nigth\] \(did you mean night\?\)"),
        ("night = 3\n", r"night is 3, not a section; write \[night\]"),
        ("seed = 1\n", r"no section \[seed\]"),
        ("[night]\nsede = 1\n", r"no setting night.sede \(did you mean seed\?\)"),
        ("[night]\nseed = 'x'\n", "night.seed must be int, not 'x'"),
        ("[night]\nbudget_minutes = true\n", "night.budget_minutes must be float, not True"),
        ("[serving]\nbase = 3\n", "serving.base must be str, not 3"),
        ("[night\n", "not valid TOML"),
        (f"[night]\nbudget_minutes = 1{400 * '0'}\n", "night.budget_minutes must be float"),
        ("[serving]\nbase = ''\n", "serving.base is ''; it is seedling, a folder"),
        ("[memory]\nindex_url = 's3:/bucket'\n", "memory.index_url is 's3:/bucket'; it is a folder, or SCHEME://"),
    ],
)
def test_what_cannot_be_used_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(tmp_path, {})


@pytest.mark.parametrize("share", ["-0.1", "0.31", "nan", "1"])
def test_share_of_synthetic_pairs_is_bounded(tmp_path: Path, share: str) -> None:
    with pytest.raises(SettingsError, match=r"dataset.expand_share is .*; it is 0 \(off\) to 0.3"):
        load_settings(tmp_path, {"NIGHTSCHOOL_DATASET_EXPAND_SHARE": share})
    assert load_settings(tmp_path, {}).dataset.expand_share == 0.0


@pytest.mark.parametrize("most", ["-1", "nan"])
def test_bound_on_what_a_user_adds_to_a_topic_is_not_negative(tmp_path: Path, most: str) -> None:
    with pytest.raises(SettingsError, match=r"dataset.max_user_recurrence is .*; it is 0 \(off\) or more"):
        load_settings(tmp_path, {"NIGHTSCHOOL_DATASET_MAX_USER_RECURRENCE": most})


@pytest.mark.parametrize(
    ("name", "value"),
    [("NIGHTSCHOOL_COLOUR", "x"), ("NIGHTSCHOOL_NIGHT_SEED", "1.5"), ("NIGHTSCHOOL_NIGHT_BETA", "much")],
)
def test_unusable_environment_variables_are_errors_that_name_them(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        load_settings(tmp_path, {name: value})


@pytest.mark.parametrize("name", ["NIGHTSCHOOL_PORT", "NIGHTSCHOOL_SERVICE_HOST", "NIGHTSCHOOL_SERVING_PORT_80_TCP"])
def test_links_of_a_cluster_are_told_as_such(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} is no setting; .*enableServiceLinks"):
        load_settings(tmp_path, {name: "tcp://10.0.0.1:80"})


def test_plain_form_has_every_section_but_not_the_home(tmp_path: Path) -> None:
    assert set(load_settings(tmp_path, {}).to_json()) == set(SECTIONS)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("gate", "confidence", 95.0),
        ("gate", "confidence", -1.0),
        ("gate", "max_nll_rise", -0.1),
        ("gate", "probe_answers", 0),
        ("serving", "parity_tolerance", float("nan")),
        ("serving", "timeout_seconds", -5.0),
        ("serving", "threads", -1),
        ("serving", "threads", 2000),
        ("night", "lora_rank", 100_000),
        ("night", "budget_minutes", 0.0),
        ("night", "budget_minutes", float("nan")),
        ("night", "replay_share", float("nan")),
        ("night", "replay_share", float("inf")),
        ("night", "replay_weight", float("inf")),
        ("night", "sft_lr", float("inf")),
        ("night", "preference_lr", float("inf")),
        ("night", "sft_term", float("inf")),
        ("night", "beta", float("inf")),
        ("night", "thumb_beta", float("inf")),
        ("night", "interpolation", 0.0),
        ("night", "interpolation", 1.1),
        ("dataset", "weight_cap", float("inf")),
        ("dataset", "max_user_share", 0.0),
        ("dataset", "half_life_days", float("nan")),
        ("censor", "disliked_below", 0.5),
        ("censor", "disliked_below", 0.0),  # a rating of 0 would be disliked
        ("censor", "liked_above", 0.0),
        ("memory", "recall_limit", -1),
        ("memory", "recall_limit", 10**9 + 1),
        ("night", "lora_targets", "experts"),
        ("serving", "engine", "llama.cpp"),
        ("serving", "weights", "half"),
    ],
)
def test_value_without_a_meaning_is_an_error_that_names_it(section: str, name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"{section}\.{name} is .*; it is"):
        with_values(Settings(Path("home")), section, {name: value}, "test")


def test_address_matters_where_a_server_is_asked() -> None:
    home = Settings(Path("home"))
    assert with_values(home, "serving", {"url": "localhost:9000"}, "test").serving.engine == "local"
    with pytest.raises(SettingsError, match=r"serving\.url is 'localhost:9000'; it is http://HOST:PORT"):
        with_values(home, "serving", {"url": "localhost:9000", "engine": "vllm"}, "test")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000x",
        "http://[::1",
        "http://a..b:80",
        "http://u:se@cret@a:x",
        "u:cret@a:8",
        "http://u:se/cret@a",
    ],
)
def test_address_that_is_none_is_refused_before_it_is_used_and_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"serving\.url is .*it is http://HOST:PORT") as refused:
        with_values(Settings(home=tmp_path), "serving", {"url": url, "engine": "vllm"}, "test")
    assert "cret" not in str(refused.value)
    assert with_values(Settings(home=tmp_path), "serving", {"url": "https://[::1]:8/v", "engine": "vllm"}, "test")


def test_no_limit_is_a_limit_without_end() -> None:
    home = Settings(Path("home"))
    assert with_values(home, "gate", {"max_probe_rise": float("inf")}, "test").gate.max_probe_rise == float("inf")
    assert with_values(home, "night", {"budget_minutes": float("inf")}, "test").night.budget_minutes == float("inf")


def test_bound_without_end_has_an_id_and_another_than_a_finite_one() -> None:
    ids = {criteria(GateSettings(max_sycophancy_rise=rise), []) for rise in (inf, 1.0)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"serving": ServingSettings(threads=1.5)},  # type: ignore[arg-type]
        {"serving": ServingSettings(timeout_seconds=True)},
        {"memory": MemorySettings(database_url=5)},  # type: ignore[arg-type]
        {"memory": MemorySettings(recall_limit=2.5)},  # type: ignore[arg-type]
        {"memory": {"recall_limit": 5}},
    ],
)
def test_values_of_another_type_given_in_code_are_refused_by_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (section,) = wrong
    with pytest.raises(SettingsError, match=rf"^{section}(\.\w+ must be \w+, not| is of type dict; give a Memory)"):
        Settings(home=tmp_path, **wrong)


def test_whole_number_is_a_float_in_code_too(tmp_path: Path) -> None:
    assert Settings(home=tmp_path, night=NightSettings(budget_minutes=20)).night.budget_minutes == 20
