"""Talking at the terminal."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from ..errors import InputError, NightschoolError
from .printing import Agent, Home, Session, User, assistant, err, say

if TYPE_CHECKING:
    from ..replies import Reply
    from ..sdk import Assistant


def chat(home: Home = None, user: User = "default", agent: Agent = "", session: Session = None) -> None:
    """Talk. /good and /bad rate the last answer, /fix TEXT corrects it, /remember TEXT keeps a note, /quit leaves."""
    from ..memory.conversations import checked_new_owner

    checked_new_owner(user, agent, session or "")
    if session == "":
        raise InputError("--session is empty; name one, or leave it out")
    if sys.stdin is None:  # it was closed, so nothing will be said
        return
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else a byte that is no text takes the lines around it along
    with assistant(home, make=True) as nightschool:
        err.print("loading the base", style="dim")
        _ = nightschool.engine
        last = None
        while (line := _prompt()) not in (None, "/quit"):
            if not line:
                continue
            said, last = last, last if line.startswith("/") else None  # of an answer that failed nothing can be said
            try:
                if line.startswith("/"):
                    _chat_command(nightschool, line, said, user, agent)
                else:
                    last = _answered(nightschool, line, user_id=user, agent_id=agent, session_id=session)
            except NightschoolError as error:  # as an answer that took too long: the session goes on
                what = "not done" if line.startswith("/") else "no answer"
                err.print(f"{what}: {error}", markup=False, highlight=False)
            except KeyboardInterrupt:
                err.print("broken off", style="dim")


def _answered(nightschool: Assistant, line: str, **owner: Any) -> Reply:
    """Say the answer as it comes. Left by an error or Ctrl-C, it ends there."""
    try:
        with nightschool.stream(line, **owner) as answer:
            for piece in answer:
                say(piece, end="")
        return answer.reply
    finally:
        say("")


def _prompt() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _chat_command(nightschool: Assistant, line: str, last: Any, user: str, agent: str) -> None:
    command, _, text = line.partition(" ")
    if command not in ("/good", "/bad", "/fix", "/remember"):
        raise InputError(f"{command!r} is no command; there are /good, /bad, /fix TEXT, /remember TEXT, /quit")
    if command in ("/fix", "/remember") and not text:
        raise InputError(f"{command} is given no text; write it on the same line, as in `{command} TEXT`")
    if command == "/remember":
        nightschool.remember(text, user_id=user, agent_id=agent)
    elif not last:
        raise InputError(f"{command} is of an answer, and none was given just before; ask something first")
    elif command == "/fix":
        nightschool.rate(last, correction=text)
    else:
        nightschool.rate(last, 1 if command == "/good" else -1, comment=text or None)
    err.print("noted", style="dim")
