"""The operator's own probes: what answers must hold and must not, as hard conditions of the gate.

`probes.toml` in the home, as many as wanted; letters count alike in upper and lower case:

    [[probe]]
    prompt = "Hello, who are you?"
    must = ["Fern Street Cycles"]
    must_not = ["language model"]

The invariant: a file that cannot be read as meant is an error, so that no condition is dropped in silence.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SettingsError

FILE = "probes.toml"
KEYS = {"prompt", "must", "must_not"}


@dataclass(frozen=True)
class Probe:
    prompt: str
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()

    def faults(self, answer: str) -> list[str]:
        """What is wrong with `answer`; empty if nothing is."""
        said = answer.casefold()
        if not said.strip():
            return ["is empty"]
        missing = [f"lacks {words!r}" for words in self.must if words.casefold() not in said]
        return missing + [f"holds {words!r}" for words in self.must_not if words.casefold() in said]


def load_probes(home: Path) -> tuple[Probe, ...]:
    """Those of `home`; none if it has no file of them. SettingsError for what is not a probe."""
    path = home / FILE
    if not path.exists() and not path.is_symlink():
        return ()
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error
    if unknown := data.keys() - {"probe"}:
        raise SettingsError(f"{path}: unknown {', '.join(sorted(unknown))}; a probe begins with [[probe]]")
    found = data.get("probe", [])
    if not isinstance(found, list) or not all(isinstance(values, dict) for values in found):
        raise SettingsError(f"{path}: probe is no list of tables; write [[probe]] above each")
    return tuple(_probe(values, f"{path}: probe {n}") for n, values in enumerate(found, 1))


def _probe(values: dict[str, Any], where: str) -> Probe:
    if unknown := values.keys() - KEYS:
        raise SettingsError(f"{where}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(KEYS))}")
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError(f"{where}: prompt is {prompt!r}; give the words of a user")
    must, must_not = (_texts(values.get(key, []), f"{where}: {key}") for key in ("must", "must_not"))
    if not must and not must_not:
        raise SettingsError(f"{where}: neither must nor must_not; every answer would pass")
    return Probe(prompt, must, must_not)


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise SettingsError(f"{where} is {value!r}; give a list of texts, none of them blank")
    return tuple(value)
