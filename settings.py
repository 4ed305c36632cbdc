"""Every dial, one frozen dataclass a stage, and the one loader: defaults, then `settings.toml`, then environment.

An unknown key, section or variable is an error, never ignored. `NIGHTSCHOOL_HOME` moves everything;
`NIGHTSCHOOL_<SECTION>_<FIELD>` sets one field (`NIGHTSCHOOL_NIGHT_BUDGET_MINUTES=20`).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from .errors import SettingsError

PREFIX = "NIGHTSCHOOL_"
MOST_EXPANDED = 0.3
SQLITE_FILE = re.compile(r"(?P<driver>sqlite(\+\w+)?:///)(?!:memory:|file:)(?P<path>[^?]+)(?P<options>.*)")
LINKED = re.compile(r"(^|_)(PORT|SERVICE)(_|$)")  # what a cluster puts into the environment for a service of our name
ALIASES = {"DATABASE_URL": "MEMORY_DATABASE_URL", "BASE": "SERVING_BASE"}  # of environment variables
SECRET = re.compile(r"([?&][^=&]*(pass|secret|key|token)[^=&]*=)[^&]*", re.IGNORECASE)  # among a driver's options
LORA_TARGETS = ("attention", "attention+mlp")


def without_user(url: str) -> str:
    """For messages: a name, a password and secret options stay out of them; all of it where it is no address."""
    url = SECRET.sub(r"\1***", url)
    if "@" not in url:
        return url
    try:
        found = urlsplit(url)
        sound = bool(found.netloc) and found.port != 0
    except ValueError:  # as of a port that is no number
        sound = False
    return found._replace(netloc=re.sub(".*@", "***@", found.netloc)).geturl() if sound else "***"


def _is_address(url: str) -> bool:
    """Whether it names a host, by http or https, and a port if any."""
    try:
        found = urlsplit(url)
        host = (found.hostname or "").encode("idna")
        return bool(host) and found.scheme in ("http", "https") and found.port != 0 and not re.search(r"\s", url)
    except ValueError:  # as of a port that is no number, or a host with an empty part
        return False


def _require(section: str, stage: object, wanted: str, good: Callable[[float], bool], *names: str) -> None:
    """SettingsError for the first of these fields whose value is not `good`. Nothing is true of NaN, so none is."""
    for name in names:
        value = getattr(stage, name)
        try:
            met = good(value)
        except TypeError:
            met = False  # it is no number
        if not met:
            raise SettingsError(f"{section}.{name} is {value!r}; it is {wanted}")


def _require_one_of(section: str, stage: object, name: str, *choices: str) -> None:
    value = getattr(stage, name)
    if value not in choices:
        raise SettingsError(f"{section}.{name} is {value!r}; it is one of {', '.join(choices)}")


@dataclass(frozen=True)
class MemorySettings:
    # where: empty = inside the home
    database_url: str = ""  # as SQLAlchemy takes it: sqlite:///file, postgresql+psycopg://…
    index_url: str = ""  # a folder, or as LanceDB takes it: s3://, gs://, az://, see docs/object-storage.md
    # recall
    recall_limit: int = 5  # memories given to a reply
    recall_threshold: float = 0.35  # a memory scoring less is not given to a reply, nor found by `forget --query`
    # topics
    topic_cosine: float = 0.65  # a turn joins the nearest narrow topic at or above it; groups adapt to the data

    def __post_init__(self) -> None:
        _require("memory", self, "0 to 1e9", lambda x: 0 <= x <= 1e9, "recall_limit")
        if not isinstance(self.index_url, str) or re.match(r"(s3|gs|az):/?(?!/)", self.index_url):
            raise SettingsError(f"memory.index_url is {self.index_url!r}; it is a folder, or SCHEME://PLACE")
        _require("memory", self, "a cosine, from -1 to 1", lambda x: -1 <= x <= 1, "recall_threshold", "topic_cosine")


@dataclass(frozen=True)
class CensorSettings:
    min_confidence: float = 0.5  # below it a turn stays unlabelled
    liked_above: float = 0.2  # scores in between teach nothing, and 0 is always among them
    disliked_below: float = -0.2
    # the learned part
    read_turns: int = 5000  # unrated turns that it reads a night, and ratings it is fitted on, the latest; 0 = off
    refit_from: int = 200  # ratings given here, of several people, from which it is fitted on them; else as shipped

    def __post_init__(self) -> None:
        _require("censor", self, "above 0 and at most 1", lambda x: 0 < x <= 1, "min_confidence", "liked_above")
        _require("censor", self, "from -1 and below 0", lambda x: -1 <= x < 0, "disliked_below")
        _require("censor", self, "0 (off) or more", lambda x: x >= 0, "read_turns")
        _require("censor", self, "1 or more", lambda x: x >= 1, "refit_from")


@dataclass(frozen=True)
class DatasetSettings:
    # weights, see evolve/weights.py
    half_life_days: float = 30.0
    weight_cap: float = 3.0
    # no user's rows weigh more than this share of a part (of pairs: on either side), if more than 1 / share users gave
    # any and weight_cap allows it; 1 = off
    max_user_share: float = 0.25
    max_user_recurrence: float = 0.0  # sessions that one user adds to a topic; a service of many wants 3; 0 = no bound
    # what is curated, see evolve/curation.py
    min_topic_users: int = 1  # before a topic teaches everyone; a service of many users wants 3 or more
    # what goes in
    max_rows: int = 3000  # per part; a seeded, recency-weighted sample beyond it
    min_liked: int = 20  # fewer examples (liked or corrected, held-out ones not counted): nothing to learn
    same_prompt_cosine: float = 0.92  # "nearly the same prompt" for a contrast pair
    # synthetic pairs, see evolve/expansion.py: what a reader predicts is weaker than what people say, so off
    expand_share: float = 0.0  # of the weight of the pairs, at most 0.3; 0 = off
    # what is held out, by user where there are enough users, else by session
    held_out_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _require("dataset", self, f"0 (off) to {MOST_EXPANDED}", lambda x: 0 <= x <= MOST_EXPANDED, "expand_share")
        _require("dataset", self, "0 (off) or more", lambda x: x >= 0, "max_user_recurrence")
        _require("dataset", self, "above 0", lambda x: x > 0, "half_life_days")
        _require("dataset", self, "1 or more", lambda x: x >= 1, "min_topic_users", "max_rows")
        _require("dataset", self, "1 or more, and finite", lambda x: 1 <= x < inf, "weight_cap")
        _require("dataset", self, "above 0 and at most 1", lambda x: 0 < x <= 1, "max_user_share")
        _require("dataset", self, "0 or more and below 1", lambda x: 0 <= x < 1, "held_out_share")
        _require("dataset", self, "0 or more", lambda x: x >= 0, "min_liked")
        _require("dataset", self, "below 2**40", lambda x: abs(x) < 2**40, "seed")
        _require("dataset", self, "a cosine, from -1 to 1", lambda x: -1 <= x <= 1, "same_prompt_cosine")


@dataclass(frozen=True)
class NightSettings:
    budget_minutes: float = 30.0  # the one dial: how many rows each phase sees, at a CPU's speed; no time limit
    seed: int = 0
    # LoRA
    lora_targets: str = "attention+mlp"  # or "attention"
    lora_rank: int = 16
    lora_alpha: int = 32
    max_tokens: int = 512  # prompt and answer; the prompt is cut from the left, an answer above 3/4 of it left out
    batch_size: int = 8
    few_rows: int = 800  # so many examples the epochs are meant for; fewer are seen more often, see trainer.suited
    # phase 1
    sft_epochs: float = 1.0
    sft_lr: float = 3e-3
    # the base's own text, so that it does not forget: as a share of the rows of each phase, of few_rows / 2 at least
    replay_share: float = 1.0  # at most 800 rows a phase (evolve/replay.py), each seen twice at most
    replay_weight: float = 5.0  # of the KL to the base on them
    # phase 2
    preference_epochs: float = 2.0
    preference_lr: float = 1e-3
    beta: float = 0.5  # DPO on pairs
    thumb_beta: float = 0.5  # the unpaired loss on thumbs
    sft_term: float = 5.0  # alpha, of phase 1's objective, which is per token where the others are per answer
    interpolation: float = 0.7  # how far the adapter goes from phase 1 to what phase 2 trained; 1 = all the way

    def __post_init__(self) -> None:
        _require_one_of("night", self, "lora_targets", *LORA_TARGETS)
        _require("night", self, "1 or more", lambda x: x >= 1, "lora_alpha", "max_tokens", "batch_size")
        _require("night", self, "1 to 1024", lambda x: 1 <= x <= 1024, "lora_rank")
        _require("night", self, "above 0", lambda x: x > 0, "budget_minutes")
        positive = ("sft_epochs", "preference_epochs", "beta", "thumb_beta")
        _require("night", self, "above 0 and finite", lambda x: 0 < x < inf, *positive)
        _require("night", self, "0 or more and below 2**32", lambda x: 0 <= x < 2**32, "seed")
        _require("night", self, "above 0 and at most 1", lambda x: 0 < x <= 1, "interpolation")
        others = ("few_rows", "sft_lr", "preference_lr", "replay_share", "replay_weight", "sft_term")
        _require("night", self, "0 or more, and finite", lambda x: 0 <= x < inf, *others)


@dataclass(frozen=True)
class GateSettings:
    bootstrap: int = 1000
    confidence: float = 0.95
    min_clusters: int = 8  # fewer held-out users or sessions: no verdict in favour
    min_rated: int = 20  # fewer held-out liked or disliked answers together: likewise
    max_nll_rise: float = 0.1  # nats per token on liked answers, non-inferiority
    max_gain_lost: float = 0.1  # of what the incumbent gained on them over the base, if that is more
    max_probe_rise: float = 0.05  # relative, on the fixed probe text
    max_repetition_rise: float = 0.1  # of the share of word trigrams that an answer says again
    max_sycophancy_rise: float = 0.15  # nats per token by which agreeing with what is wrong gains on correcting it
    probe_answers: int = 16  # prompts of each kind (held out; masked), answered for empty_answers, repetition, leakage

    def __post_init__(self) -> None:
        _require("gate", self, "100 or more", lambda x: x >= 100, "bootstrap")  # an interval of fewer says nothing
        _require("gate", self, "1 or more", lambda x: x >= 1, "min_clusters", "min_rated", "probe_answers")
        _require("gate", self, "above 0 and below 1", lambda x: 0 < x < 1, "confidence")
        _require("gate", self, "from 0 to 1", lambda x: 0 <= x <= 1, "max_gain_lost")
        bounds = ("max_nll_rise", "max_probe_rise", "max_repetition_rise", "max_sycophancy_rise")
        _require("gate", self, "0 or more", lambda x: x >= 0, *bounds)


@dataclass(frozen=True)
class ServingSettings:
    base: str = "seedling"  # or a folder, or a hub id
    engine: str = "local"  # in this process; or "vllm", a server at `url`
    url: str = "http://127.0.0.1:8000"
    vllm_command: str = "vllm"  # or the path of the one in an environment of its own
    timeout_seconds: float = 120.0  # for the answer of a reply; where no other limit is set, for a server's silence
    parity_tolerance: float = 0.1  # nats per token between engine and trainer; what FP8 and bfloat16 may differ by
    device: str = "auto"
    weights: str = "auto"  # of the local engine: fp8 where checkpoint and card have it; or "fp8", "full"
    threads: int = 0  # 0 = torch's own choice
    max_tokens: int = 96  # of a reply; the seedling says little, a larger base wants more
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.base, str) or not self.base.strip():  # an empty path is the working directory
            raise SettingsError(f"serving.base is {self.base!r}; it is seedling, a folder, or a hub id, as text")
        _require_one_of("serving", self, "engine", "local", "vllm")
        _require_one_of("serving", self, "weights", "auto", "fp8", "full")
        _require("serving", self, "above 0", lambda x: x > 0, "parity_tolerance")
        _require("serving", self, "1 or more", lambda x: x >= 1, "max_tokens")
        _require("serving", self, "0 (torch chooses) to 1024", lambda x: 0 <= x <= 1024, "threads")
        _require("serving", self, "0 (greedy) or more, and finite", lambda x: 0 <= x < inf, "temperature")
        _require("serving", self, "0 (no limit) to 1e9", lambda x: 0 <= x <= 1e9, "timeout_seconds")
        if self.engine == "vllm" and not _is_address(self.url):
            raise SettingsError(f"serving.url is {without_user(self.url)!r}; it is http://HOST:PORT, or https")


@dataclass(frozen=True)
class Settings:
    home: Path
    memory: MemorySettings = field(default_factory=MemorySettings)
    censor: CensorSettings = field(default_factory=CensorSettings)
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    night: NightSettings = field(default_factory=NightSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.home, Path):
            raise SettingsError(f"home is {self.home!r}; give a pathlib.Path")
        for name in SECTIONS:
            _require_types(name, getattr(self, name), type(self).__dataclass_fields__[name].default_factory)
        whole = folder_of(self.home).absolute()  # what is opened later is opened there too
        object.__setattr__(self, "home", folder_of(whole))
        _ = self.index_url  # what is none shows before anything is opened

    @property
    def database_url(self) -> str:
        """A file of SQLite's is told from the home, unless its path is a whole one."""
        url = self.memory.database_url or "sqlite:///nightschool.db"
        named = SQLITE_FILE.fullmatch(url)
        if named is None:
            return url
        return (
            f"{named['driver']}{quote(str(self.home / os.path.expanduser(unquote(named['path']))))}{named['options']}"
        )

    @property
    def index_url(self) -> str:
        """A folder is told from the home, unless its path is a whole one."""
        url = (self.memory.index_url or "index").removeprefix("file://")
        return url if "://" in url else str(self.home / folder_of(url, "memory.index_url"))

    def to_json(self) -> dict[str, Any]:
        """Sections as plain data, for manifests; the home is left out, since results do not depend on it."""
        return {name: asdict(getattr(self, name)) for name in SECTIONS}


def _require_types(section: str, stage: Any, kind: Any) -> None:
    """Values of the types of their defaults, as code may give others; a whole number is a float, too."""
    if not isinstance(stage, kind):
        raise SettingsError(f"{section} is of type {type(stage).__name__}; give a {kind.__name__}")
    for name, default in vars(kind()).items():
        wanted, given = type(default), getattr(stage, name)
        fits = isinstance(given, int | float if wanted is float else wanted)
        if not fits or isinstance(given, bool) != (wanted is bool):
            raise SettingsError(f"{section}.{name} must be {wanted.__name__}, not {_shown(given)}")


def _shown(value: Any) -> str:
    """What was given; of what has an address in it, which may hold a password, the type alone."""
    return f"a {type(value).__name__} with an address" if "://" in repr(value) else repr(value)


SECTIONS = tuple(field.name for field in fields(Settings) if field.name != "home")


def folder_of(named: Path | str, name: str = "home") -> Path:
    """The path that a home is named by; SettingsError where none is, or a user that is not here.

    So for what is no UTF-8, which neither SQLite nor LanceDB opens.
    """
    if not isinstance(named, str | Path) or not str(named):
        raise SettingsError(f"{name} is {named!r}; give the path of a folder")
    try:
        path = Path(named).expanduser()
        str(path).encode()
        return path
    except UnicodeEncodeError:
        raise SettingsError(f"{name} is {str(named)!r}; give a path that is UTF-8") from None
    except RuntimeError as error:
        raise SettingsError(f"{name} {named}: {error}") from error


def make_home(home: Path) -> None:
    """Make the folder, for its owner alone; one that is there keeps its mode, which `nightschool doctor` looks at."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # the latter of a NUL in it
        raise SettingsError(f"home {home} is no folder and cannot be made: {error}") from error


def load_settings(home: Path | str | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """Defaults, then `<home>/settings.toml`, then environment variables."""
    env = os.environ if env is None else env
    folder = folder_of((env.get(PREFIX + "HOME") or "~/.nightschool") if home is None else home)
    return with_environment(with_file(Settings(home=folder), folder / "settings.toml"), env)


def with_file(settings: Settings, path: Path) -> Settings:
    try:
        if not path.exists() and not path.is_symlink():
            return settings
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    for section, values in data.items():
        if section in SECTIONS and not isinstance(values, dict):
            raise SettingsError(
                f"{path}: {section} is {_shown(values)}, not a section; write [{section}] above its settings"
            )
        if section not in SECTIONS:
            raise SettingsError(
                f"{path}: no section [{section}]{_nearest(section, SECTIONS)}; known: {', '.join(SECTIONS)}"
            )
        settings = with_values(settings, section, values, str(path))
    return settings


def with_environment(settings: Settings, env: Mapping[str, str]) -> Settings:
    names: dict[tuple[str, str], str] = {}
    for name in sorted(k for k in env if k.startswith(PREFIX) and k != PREFIX + "HOME"):
        section, key = _set_by(name)
        other = names.setdefault((section, key), name)
        if env[other] != env[name]:
            raise SettingsError(
                f"environment: {other} and {name} both set {section}.{key}, and differ; unset one of them"
            )
        settings = with_values(settings, section, {key: env[name]}, f"environment variable {name}")
    return settings


def _set_by(name: str) -> tuple[str, str]:
    """Section and field that an environment variable sets; SettingsError where it sets none."""
    key = name.removeprefix(PREFIX)
    section, _, key = ALIASES.get(key, key).lower().partition("_")
    if LINKED.search(name):
        raise SettingsError(
            f"environment: {name} is no setting; where a cluster sets it for a service of this name, switch its"
            " service links off (enableServiceLinks: false)"
        )
    if section not in SECTIONS or not key:
        raise SettingsError(f"environment: unknown variable {name}; expected {PREFIX}<SECTION>_<FIELD>")
    return section, key


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
    wrong = SettingsError(f"{where} must be {kind.__name__}, not {_shown(value)}")
    if isinstance(value, bool) and kind is not bool:
        raise wrong
    if kind is float and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise wrong from None
    if kind is int and isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, kind):
        raise wrong
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
