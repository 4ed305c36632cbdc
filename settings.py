"""Every dial, one frozen dataclass a stage, and the one loader: defaults, then `settings.toml`, then environment.

An unknown key, section or variable is an error, never ignored. `NIGHTSCHOOL_HOME` moves everything;
`NIGHTSCHOOL_<SECTION>_<FIELD>` sets one field (`NIGHTSCHOOL_NIGHT_BUDGET_MINUTES=20`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import SettingsError

PREFIX = "NIGHTSCHOOL_"
MOST_EXPANDED = 0.3


@dataclass(frozen=True)
class MemorySettings:
    # where: empty = inside the home
    database_url: str = ""
    index_url: str = ""  # a folder, or as LanceDB takes it: s3://, gs://, az://, see docs/object-storage.md
    # recall
    recall_limit: int = 5  # memories given to a reply
    recall_threshold: float = 0.35  # a memory scoring less is not given to a reply
    # topics
    topic_cosine: float = 0.65  # a turn joins the nearest narrow topic at or above it; groups adapt to the data


@dataclass(frozen=True)
class CensorSettings:
    min_confidence: float = 0.5  # below it a turn stays unlabelled
    liked_above: float = 0.2  # scores in between teach nothing
    disliked_below: float = -0.2
    # the learned part
    read_turns: int = 5000  # unrated turns that it reads a night, the latest; 0 = off
    refit_from: int = 200  # ratings given here from which it is fitted on them, and not the one that ships


@dataclass(frozen=True)
class DatasetSettings:
    # weights, see evolve/weights.py
    half_life_days: float = 30.0
    weight_cap: float = 3.0
    max_user_share: float = 0.25  # of the weight of a part by one user; binds from 1 / share users on; 1 = off
    max_user_recurrence: float = 0.0  # sessions that one user adds to a topic; a service of many wants 3; 0 = no bound
    # what is curated, see evolve/curation.py
    min_topic_users: int = 1  # before a topic teaches everyone; a service of many users wants 3 or more
    # what goes in
    max_rows: int = 3000  # per part; a seeded, recency-weighted sample beyond it
    min_liked: int = 20  # fewer liked turns: nothing to learn
    same_prompt_cosine: float = 0.92  # "nearly the same prompt" for a contrast pair
    # synthetic pairs, see evolve/expansion.py: what a reader predicts is weaker than what people say, so off
    expand_share: float = 0.0  # of the weight of the pairs, at most 0.3; 0 = off
    # what is held out, by user where there are enough users, else by session
    held_out_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.expand_share <= MOST_EXPANDED:
            raise SettingsError(f"dataset.expand_share is {self.expand_share}; it is 0 (off) to {MOST_EXPANDED}")
        if not self.max_user_recurrence >= 0:
            raise SettingsError(f"dataset.max_user_recurrence is {self.max_user_recurrence}; it is 0 (off) or more")


@dataclass(frozen=True)
class NightSettings:
    budget_minutes: float = 30.0  # the one dial: decides how many rows each phase sees
    seed: int = 0
    # LoRA
    lora_targets: str = "attention+mlp"  # or "attention"
    lora_rank: int = 16
    lora_alpha: int = 32
    max_tokens: int = 512  # prompt and answer; the prompt is cut from the left
    batch_size: int = 8
    few_rows: int = 800  # epochs and rates suit so many examples; trainer.suited makes them gentler for fewer
    # phase 1
    sft_epochs: float = 1.0
    sft_lr: float = 3e-3
    replay_share: float = 0.25  # as a share of the rows of each phase: the base's own text, so that it does not forget
    replay_weight: float = 1.0  # of the KL to the base on them; few examples make it greater, see trainer.suited
    # phase 2
    preference_epochs: float = 2.0
    preference_lr: float = 1e-3
    beta: float = 0.5  # DPO on pairs
    thumb_beta: float = 0.5  # the unpaired loss on thumbs
    sft_term: float = 5.0  # alpha, of phase 1's objective, which is per token where the others are per answer


@dataclass(frozen=True)
class GateSettings:
    bootstrap: int = 1000
    confidence: float = 0.95
    min_clusters: int = 8  # fewer held-out users or sessions: no verdict in favour
    min_rated: int = 20  # fewer held-out liked or disliked answers together: likewise
    max_nll_rise: float = 0.1  # nats per token on liked answers, non-inferiority
    max_probe_rise: float = 0.05  # relative, on the fixed probe text
    max_repetition_rise: float = 0.1  # of the share of word trigrams that an answer says again
    max_sycophancy_rise: float = 0.15  # nats per token by which agreeing with what is wrong gains on correcting it
    probe_answers: int = 16  # prompts answered in full, held out and masked: empty answers, circles, leaks


@dataclass(frozen=True)
class ServingSettings:
    base: str = "seedling"  # or a folder, or a hub id
    engine: str = "local"  # in this process; or "vllm", a server at `url`
    url: str = "http://127.0.0.1:8000"
    vllm_command: str = "vllm"  # or the path of the one in an environment of its own
    timeout_seconds: float = 120.0  # for a reply as a whole; where no other limit is set, for the silence of a server
    parity_tolerance: float = 0.1  # nats per token between engine and trainer; what FP8 and bfloat16 may differ by
    device: str = "auto"
    weights: str = "auto"  # of the local engine: fp8 where checkpoint and card have it; or "fp8", "full"
    threads: int = 0  # 0 = torch's own choice
    max_tokens: int = 96
    temperature: float = 0.0


@dataclass(frozen=True)
class Settings:
    home: Path
    memory: MemorySettings = field(default_factory=MemorySettings)
    censor: CensorSettings = field(default_factory=CensorSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    night: NightSettings = field(default_factory=NightSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)

    @property
    def database_url(self) -> str:
        return self.memory.database_url or f"sqlite:///{self.home / 'nightschool.db'}"

    @property
    def index_url(self) -> str:
        return self.memory.index_url or str(self.home / "index")

    def to_json(self) -> dict[str, Any]:
        """Sections as plain data, for manifests; the home is left out, since results do not depend on it."""
        return {name: asdict(getattr(self, name)) for name in SECTIONS}


SECTIONS: dict[str, type] = {
    "memory": MemorySettings,
    "censor": CensorSettings,
    "dataset": DatasetSettings,
    "night": NightSettings,
    "gate": GateSettings,
    "serving": ServingSettings,
}


def default_home(env: Mapping[str, str] | None = None) -> Path:
    env = os.environ if env is None else env
    return Path(env.get(PREFIX + "HOME") or Path.home() / ".nightschool").expanduser()


def load_settings(home: Path | str | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Defaults, then `<home>/settings.toml`, then environment variables."""
    env = os.environ if env is None else env
    folder = Path(home).expanduser() if home is not None else default_home(env)
    return with_environment(with_file(Settings(home=folder), folder / "settings.toml"), env)


def with_file(settings: Settings, path: Path) -> Settings:
    if not path.exists():
        return settings
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    for section, values in data.items():
        if section not in SECTIONS or not isinstance(values, dict):
            raise SettingsError(
                f"{path}: no section [{section}]{_nearest(section, SECTIONS)}; known: {', '.join(SECTIONS)}"
            )
        settings = with_values(settings, section, values, str(path))
    return settings


def with_environment(settings: Settings, env: Mapping[str, str]) -> Settings:
    aliases = {"DATABASE_URL": "MEMORY_DATABASE_URL", "BASE": "SERVING_BASE"}
    for name in sorted(k for k in env if k.startswith(PREFIX) and k != PREFIX + "HOME"):
        key = name.removeprefix(PREFIX)
        section, _, key = aliases.get(key, key).lower().partition("_")
        if section not in SECTIONS:
            raise SettingsError(f"environment: unknown variable {name}; expected {PREFIX}<SECTION>_<FIELD>")
        settings = with_values(settings, section, {key: env[name]}, f"environment variable {name}")
    return settings


def with_values(settings: Settings, section: str, values: Mapping[str, Any], source: str) -> Settings:
    """`settings` with `values` in one section, each brought to its field's type; SettingsError otherwise."""
    stage = getattr(settings, section)
    known = {f.name: type(getattr(stage, f.name)) for f in fields(stage)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise SettingsError(f"{source}: no setting {section}.{key}{_nearest(key, known)}")
        changes[key] = _coerce(known[key], value, f"{source}: {section}.{key}")
    return replace(settings, **{section: replace(stage, **changes)})


def _coerce(kind: type, value: Any, where: str) -> Any:
    wrong = SettingsError(f"{where} must be {kind.__name__}, not {value!r}")
    if isinstance(value, bool) and kind is not bool:
        raise wrong
    if kind is float and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if kind is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, kind):
        raise wrong
    return value


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
