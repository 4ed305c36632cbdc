"""`nightschool base` and `nightschool serve`: which base answers, what it takes, and a server for it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import InputError, NightschoolError, ServingError, SettingsError, StoreError
from ..settings import Settings, load_settings, make_home, with_environment, with_values
from .printing import AsJson, BaseName, Home, assistant, at, err, is_home, out, show

bases = typer.Typer(no_args_is_help=True, help="The language model that adapters are trained on.")


@bases.command("list")
def list_(home: Home = None, as_json: AsJson = False) -> None:
    """The base in use, the shipped one, and those of the hub that are already on this machine."""
    used = load_settings(home).serving.base
    found = list(dict.fromkeys([used, "seedling", *_downloaded()]))
    show({"used": used, "bases": found}, as_json, [f"{'*' if base == used else ' '} {base}" for base in found])


def _downloaded() -> list[str]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except (CacheNotFound, ValueError):  # the latter where it is a file
        return []


@bases.command()
def check(base: BaseName, home: Home = None, as_json: AsJson = False) -> None:
    """What a base is and takes: family, FP8 layout, chat template, where LoRA goes, memory. Exits 1 on a problem."""
    from ..serving.checking import check as examine

    settings = load_settings(home)
    report = examine(base, settings.night.lora_rank, settings.serving.engine)
    found = asdict(report)
    lines = [f"{name}: {_worded(value)}" for name, value in found.items() if name != "problems"]
    show(found, as_json, [*lines, *(f"problem: {problem}" for problem in report.problems)])
    if report.problems:
        raise typer.Exit(1)


def _worded(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_worded(one)}" for key, one in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


@bases.command()
def use(base: BaseName, home: Home = None) -> None:
    """Check a base and write it to settings.toml. Adapters of another base stay, and serve again when it does."""
    from ..serving.checking import check as examine

    settings = load_settings(home)
    folder = os.path.expanduser(base)
    chosen = os.path.realpath(folder) if os.path.isdir(folder) else base
    _check_environment(settings, chosen)
    if problems := examine(base, settings.night.lora_rank, settings.serving.engine).problems:
        raise ServingError("; ".join(problems))
    _write(settings.home / "settings.toml", chosen)
    first = "" if is_home(settings) else f"nightschool init{at(home)}, then "
    next_ = f"next: {first}nightschool night{at(home)}, to train for it"
    out.print(f"serving.base = {chosen}\n{_lengths(settings)}\n{next_}", markup=False, highlight=False)


def _lengths(settings: Settings) -> str:
    return (
        f"a reply is cut at serving.max_tokens = {settings.serving.max_tokens}, and prompt and answer are taught up to"
        f" night.max_tokens = {settings.night.max_tokens}; larger bases say more: settings.toml"
    )


def _check_environment(settings: Settings, base: str) -> None:
    """InputError if the environment would win over what is to be written."""
    written = with_values(settings, "serving", {"base": base}, "base use")
    if (wins := with_environment(written, os.environ).serving.base) != base:
        raise InputError(
            f"NIGHTSCHOOL_BASE or NIGHTSCHOOL_SERVING_BASE is {wins!r}, which wins over settings.toml; unset it to use"
            f" {base!r}; nothing was written"
        )


def _write(path: Path, base: str) -> None:
    """Change one value and nothing else of the file, its comments included."""
    import tomlkit

    path = path.resolve()  # of a link what it names is written
    document = tomlkit.parse(path.read_text(encoding="utf-8-sig")) if path.exists() else tomlkit.document()
    document.setdefault("serving", tomlkit.table())["base"] = base
    make_home(path.parent)
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.chmod(path.stat().st_mode if path.exists() else 0o600)  # it may hold a password
    partial.write_text(tomlkit.dumps(document), encoding="utf-8")
    os.replace(partial, path)


class PassingOn(TyperCommand):
    """Keeps what follows `--` for another program; what stands before it is ours, or a usage error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer keeps the type of its context to itself
        end = args.index("--") if "--" in args else len(args)
        super().parse_args(ctx, args[:end])
        ctx.args = args[end + 1 :]
        return args[end + 1 :]


def serve(
    context: typer.Context,
    home: Home = None,
    engine: Annotated[str, typer.Option(help="What serves; vllm is the one server there is.")] = "vllm",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the command.")] = False,
) -> None:
    """Start a vLLM server for the base, at serving.url. What follows `--` goes to vLLM as it is."""
    from ..serving.base import locate
    from ..serving.launch import ENVIRONMENT, vllm_command

    if engine != "vllm":
        raise InputError(f"--engine is {engine!r}; only vllm is a server, `local` answers inside of an application")
    settings = load_settings(home)
    if not settings.home.is_dir():
        raise StoreError(
            f"no home at {settings.home}, where the server would look for adapters; run `nightschool init{at(home)}`"
        )
    command = vllm_command(settings, context.args, _in_service(settings))
    _check_key(command)
    if dry_run:
        typer.echo(" ".join([*(f"{key}={value}" for key, value in ENVIRONMENT.items()), shlex.join(command)]))
        return
    if not shutil.which(command[0]):
        raise ServingError(
            f"{command[0]} is not installed; `pip install vllm` in an environment of its own, and set"
            " NIGHTSCHOOL_SERVING_VLLM_COMMAND to the vllm in its bin"
        )
    locate(settings.serving.base, weights=True)
    os.execvpe(command[0], command, {**os.environ, **ENVIRONMENT})


def _check_key(command: Sequence[str]) -> None:
    """Whoever reaches the server may load adapters, so beyond this machine it asks for a key."""
    host, key = _option(command, "--host"), _option(command, "--api-key") or os.environ.get("VLLM_API_KEY")
    with suppress(ValueError):
        if ip_address(host).is_loopback:
            return
    if host != "localhost" and not key:
        raise SettingsError(
            f"the server would listen at {host}, where others may reach it, and anybody could load adapters; set"
            " VLLM_API_KEY here and where nights and applications run"
        )


def _option(command: Sequence[str], name: str) -> str:
    """What the server takes it to be: the last one counts, in one word or in two, with dashes or underscores."""
    words = [word.partition("=") for word in command]
    given = [n for n, (word, *_) in enumerate(words) if word.replace("_", "-") == name]
    return words[given[-1]][2] or "".join(command[given[-1] + 1 : given[-1] + 2]) if given else ""


def _in_service(settings: Settings) -> list[tuple[int, str]]:
    """Rank and targets of the live adapter and of the one before it, which a change of settings leaves as they are."""
    if not (settings.home / "adapters").exists():
        return []
    try:
        with assistant(settings.home) as n:
            served = list(islice(n.registry.in_service(), 2))
    except NightschoolError as error:
        err.print(f"what serves is not known, so there is room for what the settings train: {error}", markup=False)
        return []
    nights = [a.details["night"] for a in served if "night" in a.details]
    return [(night["lora_rank"], night["lora_targets"]) for night in nights]
