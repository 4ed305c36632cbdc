"""What every command shares: where it prints, how, and the options that mean the same everywhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from ..errors import InputError, StoreError
from ..settings import load_settings

if TYPE_CHECKING:
    from ..evolve.types import Measure
    from ..sdk import Assistant
    from ..settings import Settings

T = TypeVar("T")
# what is no terminal has no width that a table must be cut to
WIDE = None if (sys.stdout and sys.stdout.isatty()) or "COLUMNS" in os.environ else 240
out = Console(soft_wrap=True, emoji=False, width=WIDE)
err = Console(stderr=True, soft_wrap=True, emoji=False)
NIGHT_EXIT = {"promoted": 0, "nothing to learn": 3, "rejected": 4, "failed": 1}
ENDED = "ended without a word"  # the outcome of a night that is unfinished and does not run
OURS = ("index", "adapters", "exports")  # what a home holds beside its database and what people write themselves
BEGINNING_S = 2.0  # how long another command may take to make the tables
SET_IN = "\n" + 10 * " "  # before each further line of a text, so that nobody's text looks like a line of ours
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def named(home: str) -> Path:
    """Of an option; an empty one, as of a variable that is not set, would be the folder at hand."""
    if not home:
        raise typer.BadParameter("it is empty; name a folder, or leave it out")
    return Path(home)


HOME_HELP = "Where everything is kept (default: NIGHTSCHOOL_HOME or ~/.nightschool)."
Home = Annotated[Path | None, typer.Option(parser=named, metavar="PATH", help=HOME_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=10**9 - 1, help="At most so many.")]
Session = Annotated[str | None, typer.Option("--session", help="The session; a new one by default.")]
Agent = Annotated[str, typer.Option("--agent", help="Which agent's memory; empty for none of its own.")]
User = Annotated[str, typer.Option("--user", help="Whose memory.")]
ReplyId = Annotated[str, typer.Argument(help="Its id or the first letters of it, see `audit answers`.")]
AdapterId = Annotated[str, typer.Argument(help="Its id, see `adapters list`.")]
BaseName = Annotated[str, typer.Argument(help="A folder, a hub id or owner/name@COMMIT, or seedling.")]
Night = Annotated[
    str | None, typer.Argument(help="Its id, see `audit events`; the latest by default.", metavar="NIGHT")
]


def at(home: Path | None) -> str:
    """The option that names the same home in the next command."""
    return f" --home {shlex.quote(str(home))}" if home else ""


@contextmanager
def assistant(home: Path | None, *, make: bool = False, begin: bool = False) -> Iterator[Assistant]:
    """The memory of a home. Only what brings something in may `make` one: of a home that nobody made, "nothing is
    held" would be a wrong answer to an audit or to who asks to be forgotten. And only `init` may `begin` anew in one
    whose database is empty, or missing where other things of ours are: it may have been lost."""
    from ..sdk import open as open_assistant

    settings = load_settings(home)
    begins = begin or (make and not _was_begun(settings))
    checked = settings if begins else checked_home(settings, patience=BEGINNING_S if make else 0)
    with open_assistant(settings=checked) as opened:
        yield opened


def _was_begun(settings: Settings) -> bool:
    """Whether the folder is there with a database, were it an empty file, or with something else of ours."""
    from ..memory.database import file_of

    file = file_of(settings.database_url)
    return bool(_ours(settings.home)) or (file is not None and is_home(settings))


def _ours(home: Path) -> list[str]:
    return [name for name in OURS if (home / name).exists()]


def checked_home(settings: Settings, patience: float = 0) -> Settings:
    """The same, if their home was made and its database holds our tables, for which it waits `patience` seconds;
    StoreError otherwise."""
    from ..memory.database import file_of, without_password

    init = f"nightschool init{at(settings.home)}"
    if (held := _ours(settings.home)) and not is_home(settings):
        raise StoreError(
            f"no database at {file_of(settings.database_url)}, but {settings.home} holds {', '.join(held)}: name or"
            f" restore the database, or run `{init}` to begin with an empty one"
        )
    if not is_home(settings):
        raise StoreError(f"no home at {settings.home}; run `{init}`")
    if _stays_empty(settings.database_url, patience):
        raise StoreError(
            f"{without_password(settings.database_url)} is empty: nothing can be said of the home {settings.home}; name"
            f" or restore its database, or run `{init}` to begin with an empty one"
        )
    return settings


def _stays_empty(url: str, patience: float) -> bool:
    """Whether it holds no tables of ours, also `patience` seconds later: another command may be making them."""
    from ..memory.database import wait_until
    from ..memory.verification import is_empty

    return not wait_until(lambda: not is_empty(url), patience)


def is_home(settings: Settings) -> bool:
    """Whether the folder is there, and in it or elsewhere the database, if that is a file.

    Of a database on a server the folder has to be there, too: index, adapters and exports are in it.
    """
    from ..memory.database import file_of

    file = file_of(settings.database_url)
    return settings.home.is_dir() and (file is None or file.is_file())


def checked_files(files: Sequence[Path]) -> None:
    """InputError if what is to be read is not there, or is a directory."""
    if missing := [str(f) for f in files if not f.exists()]:
        raise InputError(f"no such file: {', '.join(missing)}")
    if folders := [str(f) for f in files if f.is_dir()]:
        raise InputError(f"a directory and no file: {', '.join(folders)}; name the files in it")


def show(value: Any, as_json: bool, lines: list[str]) -> None:
    if as_json:  # where the output takes not every letter, what is put in its place would be no JSON
        every_letter = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"
        written = json.dumps(value, ensure_ascii=not every_letter, default=str)
        typer.echo(re.sub(r"[\x7f-\x9f]", lambda odd: f"\\u{ord(odd[0]):04x}", written))  # some drive a terminal
    else:
        for line in lines:
            say(line.replace("\n", SET_IN))


def none_found(none: str, nightschool: Assistant, user: str) -> str:
    """`none`, or that the user is unknown: the name may be mistyped."""
    return none if nightschool.store.knows(user) else f"nothing is held of user {user!r}"


def show_done(value: Any, as_json: bool, lines: list[str]) -> None:
    """Of what cannot be undone: that nobody reads it, or that a disk is full, makes it no failure."""
    try:
        show(value, as_json, lines)
        sys.stdout.flush()
    except (AttributeError, OSError, SystemExit):  # the first of a closed output
        with suppress(AttributeError, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail at the end


def show_found(found: list[Any], as_json: bool, lines: list[str], none: str) -> None:
    """What was found; where that is nothing, why, beside JSON too."""
    show(found, as_json, lines or [none])
    if as_json and not found:
        err.print(none, markup=False, highlight=False)


def latest(found: list[T], limit: int) -> list[T]:
    """The first `limit` of what was looked for with one more; standard error tells that there are more."""
    if len(found) > limit:
        err.print(f"the latest {limit} of more; --limit shows more", highlight=False)
    return found[:limit]


def say(text: str, end: str = "\n") -> None:
    """Print what people or the model said as it stands; what would drive the terminal is shown as an odd character."""
    out.print(text.translate(CONTROLS), end=end, markup=False, highlight=False)


def when(utc: float) -> str:
    try:
        return datetime.fromtimestamp(utc, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"{utc:g} s"  # a time that no calendar has


def outcome(measure: Measure) -> str:
    if not measure.decides:
        return "told"
    return "passed" if measure.passed else "FAILED"
