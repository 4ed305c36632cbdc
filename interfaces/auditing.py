"""`nightschool audit`: why an answer came out as it did, what an adapter learnt from, and whether all ids re-derive."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .printing import AdapterId, AsJson, Home, Limit, ReplyId, assistant, latest, none_found, show, show_found, when

if TYPE_CHECKING:
    from ..evolve.lineage import Event
    from ..memory.types import Feedback, Interaction, Satisfaction
    from ..sdk import Assistant

audit = typer.Typer(no_args_is_help=True, help="Why an answer came out as it did, and what an adapter learnt from.")

ELSEWHERE = "the base, or answered elsewhere"  # an import and an app's own record name no adapter either


@audit.command("answers")
def audit_answers(
    home: Home = None, user: Annotated[str | None, typer.Option("--user", help="Of this user alone.")] = None,
    limit: Limit = 20, as_json: AsJson = False,
) -> None:  # fmt: skip
    """The latest answers, newest first, with the ids by which the others know them."""
    with assistant(home) as nightschool:
        found = latest(nightschool.store.newest(limit + 1, user_id=user), limit)
        none = _no_answers(nightschool, user) if not found else ""
    lines = [line for i in found for line in _answer_lines(i)]
    show_found([asdict(i) for i in found], as_json, lines, none)


def _answer_lines(i: Interaction) -> list[str]:
    head = f"{i.id}  {when(i.created_utc)}  {i.user_id}  {i.adapter_id or ELSEWHERE}"
    return [head, f"  {_short(i.text)}", f"  → {_short(i.reply)}"]


def _no_answers(nightschool: Assistant, user: str | None) -> str:
    if user is None:
        return "nothing was answered yet"
    return none_found(f"nothing was answered to user {user!r}", nightschool, user)


def _short(text: str) -> str:
    return textwrap.shorten(text, 100, placeholder=" …")


@audit.command()
def why(reply: ReplyId, home: Home = None, as_json: AsJson = False) -> None:
    """Why that answer: what it was asked and shown, which adapter spoke, what that one learnt from."""
    from ..evolve import lineage as lines_of

    with assistant(home) as nightschool:
        store = nightschool.store
        found = lines_of.why(store, nightschool.registry, store.id_of(reply))
    i = found.interaction
    lines = [f"asked:    {i.text}", f"answered: {i.reply}", f"when:     {when(i.created_utc)}, session {i.session_id}"]
    lines += [f"user:     {i.user_id}" + (f", agent {i.agent_id}" if i.agent_id else "")]
    lines += [f"said:     {_given(feedback)}" for feedback in found.feedback]
    lines += [f"judged:   {_satisfaction(found.satisfaction)}"]
    lines += [f"shown:    {m.get('text', '(forgotten)')}  ({m['id']})" for m in found.memories]
    none = f"{i.adapter_id}, which is not in this home" if i.adapter_id else f"none: {ELSEWHERE}"
    lines += _lineage_lines(found.lineage) if found.lineage else [f"adapter:  {none}"]
    show(found.to_json(), as_json, lines)


def _given(feedback: Feedback) -> str:
    rating = None if feedback.rating is None else f"{feedback.rating:+g}"
    named = (("rating", rating), ("instead", feedback.correction), ("comment", feedback.comment))
    parts = [f"{name} {value}" for name, value in named if value is not None]
    return f"{', '.join([*([feedback.event] if feedback.event else []), *parts])}  ({when(feedback.created_utc)})"


def _satisfaction(satisfaction: Satisfaction) -> str:
    found = [f"{s.name.replace('_', ' ')} {s.value:+.2f}" for s in satisfaction.signals]
    sure = f"score {satisfaction.score:+.2f}, confidence {satisfaction.confidence:.2f}"
    return f"{sure} ({', '.join(found) or 'nothing shows it'})"


@audit.command()
def lineage(adapter: AdapterId, home: Home = None, as_json: AsJson = False) -> None:
    """Where an adapter comes from: its parents, its verdict, the conversations that taught it."""
    from ..evolve import lineage as lines_of

    with assistant(home) as nightschool:
        found = lines_of.lineage(nightschool.store, nightschool.registry, adapter)
    lines = _lineage_lines(found)
    lines += [f"  user {s.user_id}, session {s.session_id}: {', '.join(s.interaction_ids)}" for s in found.sources]
    show(found.to_json(), as_json, lines)


def _lineage_lines(found: Any) -> list[str]:
    adapter, users = found.adapter, {s.user_id for s in found.sources}
    lines = [f"adapter:  {adapter.id} ({adapter.phase}, {when(adapter.created_utc)}, on base {adapter.base_id})"]
    lines += [f"parent:   {p.id} ({p.phase})" for p in found.parents]
    turns = sum(len(s.interaction_ids) for s in found.sources)
    lines += [
        f"learnt:   snapshot {adapter.snapshot_id}: {turns} turns, {len(found.sources)} sessions, {len(users)} users"
    ]
    if found.held_out:
        turns, users = sum(len(s.interaction_ids) for s in found.held_out), {s.user_id for s in found.held_out}
        lines += [f"held out: {turns} turns of {len(users)} users, to judge it on"]
    lines += [f"forgotten since: {len(found.forgotten)} turns"] if found.forgotten else []
    lines += [f"tainted:  {found.tainted}"] if found.tainted else []
    return lines + [f"judged:   {reason}" for reason in (found.verdict.reasons if found.verdict else ["never"])]


@audit.command("events")
def audit_events(home: Home = None, limit: Limit = 20, as_json: AsJson = False) -> None:
    """What served when, and why: nights, switches and what was forgotten (never whose), newest first."""
    from ..evolve import lineage as lines_of

    with assistant(home) as nightschool:
        found = [_by_now(nightschool, e) for e in latest(lines_of.events(nightschool.registry)[::-1], limit)]
    lines = [f"{when(e.created_utc)}  {e.kind:<9}  {e.id or 'the base'}  {e.what}" for e in found]
    show_found([asdict(e) for e in found], as_json, lines, "nothing was learnt, switched or forgotten yet")


def _by_now(nightschool: Assistant, event: Event) -> Event:
    """The same, told as ended if it is a night that runs no more."""
    from .doctor import outcome_by_now

    if event.kind != "night" or event.id is None or event.what != "running":
        return event
    cycle = nightschool.registry.cycle(event.id)
    return replace(event, what=outcome_by_now(cycle, nightschool.settings.home, nightschool.store.database))


@audit.command("verify")
def audit_verify(home: Home = None, as_json: AsJson = False) -> None:
    """Re-derive the ids of memory, adapters and what they were trained on. Exits 1 if anything disagrees."""
    from ..evolve import lineage as lines_of
    from .doctor import unrecorded

    with assistant(home) as nightschool:
        found = [*lines_of.verify(nightschool.store, nightschool.registry), *unrecorded(nightschool.registry)]
    show(found, as_json, found or ["sound: every id re-derives"])
    if found:
        raise typer.Exit(1)
