"""Memory → Snapshot: what one night learns from and is judged on, frozen and named by its content.

`freeze` reads the store, `build` decides on values alone, and `to_rows` and `from_rows` carry a snapshot to SQL and
back by reference. The invariants: the same memory gives the same id at any time, since age is reckoned from the latest
interaction and not from the clock; what is stored holds no text, so what was forgotten is in no snapshot any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from math import inf, log
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..content import content_id
from ..errors import NotFound, StoreError
from ..memory.conversations import Owner, answered_since, owner_of
from ..memory.signals import censor_id
from ..memory.topics import DAY
from ..memory.types import Feedback, Interaction, Memory
from ..serving.base import load_tokenizer
from ..settings import DatasetSettings, Settings
from .answers import (
    DISPUTED,
    ONLY_MASKED,
    UNREAD,
    Answer,
    ClusterOf,
    Exclusions,
    Gathered,
    Reading,
    Vectors,
    fold,
    gather,
    hold_out,
    recurrences,
)
from .contrasts import Contrast, Order, bounded, find_contrasts, find_rephrased, fold_contrasts
from .curation import BOUNDED, CURATION, Reasons, Said, as_taught, curate
from .expansion import Author, Expansion
from .lessons import length_rule
from .prompts import Prompts, Words, words_of
from .reception import read, reader_at_hand
from .types import Example, Judged, Pair, Snapshot, Thumb, without_nothing
from .weights import balanced, example_weight, limit_marked, limit_share, limit_sum, normalise, thumb_weight

if TYPE_CHECKING:
    from ..memory.store import MemoryStore

Row = TypeVar("Row")
Weighed = TypeVar("Weighed", Example, Pair, Thumb)
PARTS: dict[str, type] = {"examples": Example, "pairs": Pair, "thumbs": Thumb, "held_out": Judged}
TEXT = {"prompt", "completion", "chosen", "rejected"}  # of rows; what is not text is kept in SQL
WEIGHT_DIGITS = 6  # the last bits of a logarithm shall change no id


def freeze(store: MemoryStore, settings: Settings, *, now: float, author: Author | None = None) -> Snapshot:
    """The snapshot of all that is remembered up to `now`; an `author` drafts synthetic pairs, if settings want some."""
    groups = store.topic_groups()
    # who asks something new meanwhile founds a topic that is in no group yet
    found = store.interactions()
    interactions = [replace(i, topic_id=groups.get(i.topic_id, i.topic_id)) if i.topic_id else i for i in found]
    memories = store.memories({m for i in interactions for m in i.memory_ids})
    vectors = store.request_vectors([i.id for i in interactions])
    feedback = store.feedback()
    known = Prompts(up_to(now, interactions), memories)
    # what training has no room for is not judged on, either
    fits = length_rule(load_tokenizer(settings.serving.base), settings.night.max_tokens)
    reason = Reasons(known, settings.dataset.min_topic_users, fits)
    parts = split(known, feedback, vectors, settings, reason)
    reading = read(store, known, feedback, vectors, settings.censor, parts.teaches)
    expansion = _expansion(store, author, reading, settings, now)
    given = (interactions, feedback, memories, vectors, settings)
    return build(*given, now=now, reading=reading, expansion=expansion, reason=reason, parts=parts)


def up_to(now: float, interactions: Sequence[Interaction]) -> list[Interaction]:
    """Those dated by `now`, and of no session what was said after one that is not: its prompt has that one in it."""
    first: dict[Owner, int] = {}
    for i in interactions:
        if i.created_utc > now:
            first[owner_of(i)] = min(i.position, first.get(owner_of(i), i.position))
    return [i for i in interactions if i.position < first.get(owner_of(i), inf)]


@dataclass(frozen=True)
class Split:
    """Who is held out, decided without a reader's guesses, and what is surely known of how answers were met."""

    cluster_of: ClusterOf
    held: frozenset[str]
    sure: tuple[Answer, ...]

    def teaches(self, interaction: Interaction) -> bool:
        return self.cluster_of(interaction) not in self.held


def split(
    prompts: Prompts,
    feedback: Mapping[str, Sequence[Feedback]],
    vectors: Vectors,
    settings: Settings,
    reason: Reasons,
) -> Split:
    untold = Exclusions()  # `build` finds them again, less what a reader labels
    gathered = gather(prompts, feedback, vectors, settings, untold, UNREAD)
    sure = curate(gathered, reason, untold).answers
    return Split(*hold_out(sure, settings), tuple(sure))


def _expansion(
    store: MemoryStore, author: Author | None, reading: Reading, settings: Settings, now: float
) -> Expansion | None:
    reader = reader_at_hand(store) if author and settings.dataset.expand_share else None
    read_tonight = reader is not None and reader.id == reading.reader_id
    return Expansion(store, author, reader, settings, now) if author and reader and read_tonight else None


def build(
    interactions: Sequence[Interaction],
    feedback: Mapping[str, Sequence[Feedback]],
    memories: Mapping[str, Memory],
    vectors: Vectors,
    settings: Settings,
    *,
    now: float,
    reading: Reading = UNREAD,
    expansion: Expansion | None = None,
    reason: Reasons | None = None,
    parts: Split | None = None,
) -> Snapshot:
    """`freeze` on values, but for what `expansion` drafts. `reason` and `parts`, the split, are of just these."""
    prompts = Prompts(up_to(now, interactions), memories)
    reason = reason or Reasons(prompts, settings.dataset.min_topic_users)
    parts = parts or split(prompts, feedback, vectors, settings, reason)
    excluded, teaches = Exclusions(), parts.teaches
    later = (i.id for i in interactions if i.id in feedback and i.id not in prompts.interactions)
    excluded.add("dated later than now, or said after such a turn", later)
    order = _recent_first(prompts, settings.dataset)
    gathered = gather(prompts, feedback, vectors, settings, excluded, reading)
    gathered = curate(gathered, reason, excluded)

    said = Said(prompts)
    ours = [a for a in gathered.answers if teaches(a.interaction)]
    taught = fold(ours, said, settings.censor, excluded)
    corrections = [Contrast(*pair) for pair in gathered.corrected if teaches(pair[0].interaction)]
    again = [pair for pair in gathered.regenerated if teaches(pair[0].interaction)]
    corrections += [Contrast(*pair, "regeneration") for pair in again]
    near = find_contrasts(taught, vectors, settings.dataset.same_prompt_cosine, order)
    found = [*corrections, *find_rephrased(ours, prompts, vectors), *near]
    disputed = {*map(said, ours)} - {*map(said, taught)}
    told = fold_contrasts(_telling(found, said, disputed, excluded), said.contrast)
    contrasts = bounded(told, _rank(order))
    sure = {a.interaction.id for a in parts.sure}
    guesses = (
        a.interaction.id for a in gathered.answers if not teaches(a.interaction) and a.interaction.id not in sure
    )
    excluded.add("held out, and nothing sure is known of it without a reader's guess", guesses)
    shown = {said(a, c.asked) for c in contrasts for a in (c.chosen, c.rejected)}
    judged = _unseen(_held_out(parts, said, settings, excluded), {*map(said, taught), *shown}, said, excluded)
    if expansion:
        open_to = _open(prompts, teaches, {said.prompt(a.interaction) for a in judged}, said)
        made = expansion.contrasts(prompts, open_to, recurrences(prompts, settings.dataset), len(contrasts))
        contrasts += _fit(made, reason)

    limit = settings.dataset.max_rows
    liked, rated, heard = (_first(part, order, limit) for part in ([a for a in taught if a.liked], taught, judged))
    pairs = _first(contrasts, _rank(order), limit)
    given = _ids(taught, judged) | {i for c in contrasts if c.how != "synthetic" for i in c.heads}
    excluded.add("enough pairs of this prompt", {i for c in told for i in c.heads} - given)
    excluded.add("over the budget of rows", given - _ids(liked, rated, heard) - {i for c in pairs for i in c.heads})
    examples, thumbs = _examples(liked, said, settings.dataset), _thumbs(rated, said, settings.dataset)
    preferred = _pairs(pairs, prompts, settings.dataset)
    rows: list[Example | Pair | Thumb] = [*examples, *preferred, *thumbs]
    weightless = _heads(row for row in rows if not row.weight) - _heads(row for row in rows if row.weight)
    excluded.add("too old, or too small a share, to weigh anything", weightless)
    return Snapshot(
        examples=_weighing(examples),
        pairs=_weighing(preferred),
        thumbs=_weighing(thumbs),
        held_out=_judged(heard, said, parts.cluster_of),
        excluded=excluded.report(),
        censor=censor_id(reading.reader_id),
        reader_ids=tuple(sorted(reading.fitted_on)),
    )


def _telling(contrasts: Sequence[Contrast], said: Said, disputed: Set[Words], excluded: Exclusions) -> list[Contrast]:
    """Those whose answers differ in more than what is masked in them, and are not `disputed`."""
    telling: list[Contrast] = []
    for c in contrasts:
        _, chosen, rejected = said.contrast(c.asked, c.chosen, c.rejected)
        if chosen == rejected:
            excluded.add(ONLY_MASKED, c.heads)
        elif disputed.isdisjoint((said(c.chosen), said(c.rejected))):
            telling.append(c)
        else:
            excluded.add(DISPUTED, c.heads)
    return telling


# -- the held-out part ---


def _held_out(parts: Split, said: Said, settings: Settings, excluded: Exclusions) -> list[Answer]:
    """The answers of the held-out clusters that people showed to like or not, duplicates folded within each.

    A reader's guess counts for nothing here, for or against: what learnt from its guesses would agree with it.
    """
    groups: dict[str, list[Answer]] = {cluster: [] for cluster in sorted(parts.held)}
    for answer in parts.sure:
        if not parts.teaches(answer.interaction):
            groups[parts.cluster_of(answer.interaction)].append(answer)
    return [answer for group in groups.values() for answer in fold(group, said, settings.censor, excluded)]


def _unseen(judged: Sequence[Answer], taught: Set[Words], said: Said, excluded: Exclusions) -> list[Answer]:
    """`judged` without what is taught word for word: knowing it by heart is no proof."""
    excluded.add("held out, but the same answer is taught", _ids([a for a in judged if said(a) in taught]))
    return [a for a in judged if said(a) not in taught]


def _open(prompts: Prompts, teaches: Callable[[Interaction], bool], judged: Set[str], said: Said) -> list[Interaction]:
    """Answered interactions of nobody held out, whose prompt is whole and not among those `judged`, either."""
    ours = (i for i in prompts.interactions.values() if i.reply.strip() and teaches(i))
    whole = (i for i in ours if not (prompts.repeats_forgotten(i) or prompts.missing_turns(i)))
    return [i for i in whole if said.prompt(i) not in judged]


def _fit(contrasts: Sequence[Contrast], reason: Reasons) -> list[Contrast]:
    """Those that the rules of curation let through; nobody gave the others, so none is reported."""
    pairs = [(c.chosen, c.rejected) for c in contrasts]
    kept = curate(Gathered([], pairs, []), reason, Exclusions()).corrected
    return [Contrast(*pair, "synthetic") for pair in kept]


# -- the budget ---


def _rank(order: Order) -> Callable[[Contrast], tuple[bool, bool, float]]:
    """Corrections first, what nobody gave last."""
    return lambda c: (c.how == "synthetic", c.how != "correction", order(c.chosen))


def _recent_first(prompts: Prompts, settings: DatasetSettings) -> Order:
    """A random order of answers in which one half-life of age halves the chance to come first.

    log(−log u) + age · ln 2 / h, smallest first, is weighted sampling without replacement with weights 2^(−age/h)
    (Efraimidis and Spirakis 2006), in logarithms. u is hashed from the interaction's id and the seed.
    """
    latest = max((i.created_utc for i in prompts.interactions.values()), default=0.0)

    def order(answer: Answer) -> float:
        digest = content_id([settings.seed, answer.interaction.id]).removeprefix("b2:")
        u = (int(digest[:13], 16) + 0.5) / 16**13  # 52 bits, never 0 nor 1
        age = (latest - answer.interaction.created_utc) / (settings.half_life_days * DAY)
        return log(-log(u)) + age * log(2)

    return order


def _first(rows: Sequence[Row], order: Callable[[Row], Any], limit: int) -> list[Row]:
    """The `limit` rows that come first in `order`, in the order in which they stood."""
    first = sorted(range(len(rows)), key=lambda i: (order(rows[i]), i))[:limit]
    return [rows[i] for i in sorted(first)]


def _ids(*parts: Sequence[Answer]) -> set[str]:
    return {a.interaction.id for part in parts for a in part}


# -- rows ---


def _weighing(rows: Sequence[Weighed]) -> tuple[Weighed, ...]:
    return tuple(row for row in rows if row.weight)


def _heads(rows: Iterable[Example | Pair | Thumb]) -> set[str]:
    """The interactions whose answers these rows are; none of what nobody gave."""
    hows = ((row, row.how if isinstance(row, Pair) else None) for row in rows)
    return {i for row, how in hows if how != "synthetic" for i in _answered(row.interaction_ids, how)}


def _answered(ids: Sequence[str], how: str | None) -> Sequence[str]:
    """Of the interactions that a row names, those whose answers it has: of most pairs two."""
    return ids[: 1 if how in (None, "correction", "synthetic") else 2]


def _weighted(weights: Sequence[float], settings: DatasetSettings, *sides: Sequence[Answer]) -> list[float]:
    """Mean 1 under the cap, with no user's share on a side of the rows above the one that is set, where it can be."""
    shared = normalise(weights, settings.weight_cap)
    for side in sides:
        shared = limit_share(shared, _users(side), settings.max_user_share)
    return [round(w, WEIGHT_DIGITS) for w in normalise(shared, settings.weight_cap)]


def _users(answers: Sequence[Answer]) -> list[str]:
    return [a.interaction.user_id for a in answers]


def _examples(answers: Sequence[Answer], said: Said, settings: DatasetSettings) -> tuple[Example, ...]:
    weights = [example_weight(a.confidence, a.score, a.recurrence) for a in answers]
    return tuple(
        Example(**said.row(a), weight=w, interaction_ids=a.sources, correction_id=a.correction_id)
        for a, w in zip(answers, _weighted(weights, settings, answers), strict=True)
    )


def _thumbs(answers: Sequence[Answer], said: Said, settings: DatasetSettings) -> tuple[Thumb, ...]:
    given = [thumb_weight(a.confidence, a.score, a.recurrence) for a in answers]
    weights = balanced(given, [a.liked for a in answers])
    return tuple(
        Thumb(**said.row(a), liked=a.liked, weight=w, interaction_ids=a.sources, correction_id=a.correction_id)
        for a, w in zip(answers, _weighted(weights, settings, answers), strict=True)
    )


def _shared(contrasts: Sequence[Contrast], settings: DatasetSettings) -> list[float]:
    """Weights of pairs: on either side no user has more than a share of what all weighed before, if they are many."""
    sides, share = ([c.chosen for c in contrasts], [c.rejected for c in contrasts]), settings.max_user_share
    weights = _weighted([c.weight for c in contrasts], settings, *sides, *sides)  # less of one is more of the other
    most = share * sum(weights)
    if share * len({user for side in sides for user in _users(side)}) > 1:
        for side in sides:  # of one who alone disliked anything it would be all
            weights = limit_sum(weights, _users(side), most)
    return weights


def _pairs(contrasts: Sequence[Contrast], prompts: Prompts, settings: DatasetSettings) -> tuple[Pair, ...]:
    weights = _shared(contrasts, settings)
    weights = limit_marked(weights, [c.how == "synthetic" for c in contrasts], settings.expand_share)
    made: list[Pair] = []
    for c, w in zip(contrasts, (round(w, WEIGHT_DIGITS) for w in weights), strict=True):
        answers = {"chosen": c.chosen.completion, "rejected": c.rejected.completion}
        words = as_taught(CURATION, prompts.prompt(c.asked.interaction), answers)
        drafts = tuple(filter(None, (c.chosen.draft_id, c.rejected.draft_id)))
        words |= {"correction_id": c.chosen.correction_id, "draft_ids": drafts}
        made.append(Pair(**words, weight=w, interaction_ids=c.sources, how=c.how))
    return tuple(made)


def _judged(answers: Sequence[Answer], said: Said, cluster_of: ClusterOf) -> tuple[Judged, ...]:
    """Clusters are numbered: who is forgotten shall not be named by a snapshot."""
    numbers: dict[str, str] = {}
    return tuple(
        Judged(
            **said.row(a),
            liked=a.liked,
            cluster=numbers.setdefault(cluster_of(a.interaction), str(len(numbers))),
            interaction_ids=a.sources,
            correction_id=a.correction_id,
        )
        for a in answers
    )


# -- references ---


def to_rows(snapshot: Snapshot) -> list[dict[str, Any]]:
    """What SQL keeps of a snapshot: which interactions and corrections, how weighted; never their text."""
    return [
        {"part": part, "curation": CURATION, **_references(row)} for part in PARTS for row in getattr(snapshot, part)
    ]


def _references(row: Example | Pair | Thumb | Judged) -> dict[str, Any]:
    kept = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in TEXT}
    return without_nothing(kept) | {"interaction_ids": list(row.interaction_ids)}


def taught(snapshot: Snapshot) -> set[Words]:
    """What it teaches or shows as worse, word for word."""
    single = [(row.prompt, row.completion) for row in snapshot.examples]
    single += [(row.prompt, row.completion) for row in snapshot.thumbs]
    paired = [(row.prompt, answer) for row in snapshot.pairs for answer in (row.chosen, row.rejected)]
    return {words_of(*said) for said in (*single, *paired)}


def from_rows(store: MemoryStore, rows: Sequence[Mapping[str, Any]]) -> Snapshot:
    """The snapshot again, its text read from memory; NotFound names what was forgotten since.

    Turns that were answered since are found by the ids that they have now.
    """
    return Remembered(store).again(rows)


class Remembered:
    """What is remembered, read once, to make any number of snapshots again."""

    def __init__(self, store: MemoryStore) -> None:
        self._store, self._interactions = store, list(store.interactions())
        shown = store.memories({m for i in self._interactions for m in i.memory_ids})
        self._prompts = Prompts(self._interactions, shown)
        self._corrections = {f.id: f.correction or "" for given in store.feedback().values() for f in given}

    def again(self, rows: Sequence[Mapping[str, Any]]) -> Snapshot:
        """As `from_rows`."""
        return resolve(rows, self._prompts, self._texts(rows), answered_since(_named(rows), self._interactions))

    def require(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """NotFound names what of these rows was forgotten or answered since."""
        _require_remembered(rows, self._prompts, self._texts(rows))

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        drafted = self._store.drafts({row["interaction_ids"][0] for row in rows if row.get("draft_ids")})
        return self._corrections | {draft.id: draft.text for some in drafted.values() for draft in some}


def require_held(store: MemoryStore, interaction_ids: Iterable[str]) -> None:
    """NotFound if one of these is forgotten."""
    if gone := sorted(set(interaction_ids) - store.held(interaction_ids)):
        _tell_forgotten(gone)


def _named(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return {i for row in rows for i in row["interaction_ids"]}


def resolve(
    rows: Sequence[Mapping[str, Any]], prompts: Prompts, texts: Mapping[str, str], ids_now: Mapping[str, str]
) -> Snapshot:
    """`from_rows` on values; `texts` are corrections by the id of the feedback, and drafts by theirs.

    What is in `ids_now` is looked up by that id, and named by the one that it had: the snapshot's id hashes it.
    """
    found = [{**row, "interaction_ids": [ids_now.get(i, i) for i in row["interaction_ids"]]} for row in rows]
    _require_remembered(found, prompts, texts)
    parts: dict[str, list[Any]] = {part: [] for part in PARTS}
    for row, held in zip(rows, found, strict=True):
        names = {f.name for f in fields(PARTS[row["part"]])} - TEXT - {"draft_ids"}
        kept = {name: row[name] for name in names} | {"interaction_ids": tuple(row["interaction_ids"])}
        kept |= {"draft_ids": tuple(row["draft_ids"])} if row.get("draft_ids") else {}
        parts[row["part"]].append(PARTS[row["part"]](**_text(held, prompts, texts), **kept))
    examples, pairs, thumbs, held_out = (tuple(parts[part]) for part in PARTS)
    return Snapshot(examples, pairs, thumbs, held_out)


def _text(row: Mapping[str, Any], prompts: Prompts, texts: Mapping[str, str]) -> dict[str, Any]:
    """The words of a row, in the version of the curation that it was frozen with."""
    version = row.get("curation", 0)
    if version > CURATION:
        raise StoreError(f"the snapshot was curated by version {version}, this is {CURATION}; upgrade nightschool")
    answered = [prompts.interactions[i] for i in _answered(row["interaction_ids"], row.get("how"))]
    head, last = answered[0], answered[-1]
    asked = last if row.get("how") in ("regeneration", "rephrasing") else head
    text = (texts[row["correction_id"]] if row["correction_id"] else head.reply).strip()
    words = {"completion": text}
    if row.get("draft_ids"):
        words = dict(zip(("chosen", "rejected"), (texts[i] for i in row["draft_ids"]), strict=True))
    elif row["part"] == "pairs":
        words = {"chosen": text, "rejected": last.reply.strip()}
    return as_taught(version, prompts.prompt(asked, whole=version < BOUNDED), words)


def _require_remembered(rows: Sequence[Mapping[str, Any]], prompts: Prompts, texts: Mapping[str, str]) -> None:
    known = prompts.interactions
    heads = {i for row in rows for i in _answered(row["interaction_ids"], row.get("how"))}
    missing = {
        "interaction": _named(rows) - known.keys(),
        "correction": {row["correction_id"] for row in rows if row["correction_id"]} - texts.keys(),
        "draft": {i for row in rows for i in row.get("draft_ids", ())} - texts.keys(),
        "memory": {m for i in heads if i in known for m in prompts.missing_memories(known[i])},
    }
    gone = [f"{kind} {name}" for kind, names in missing.items() for name in sorted(names)]
    if gone:
        _tell_forgotten(gone)


def _tell_forgotten(gone: Sequence[str]) -> NoReturn:
    more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
    raise NotFound(
        f"the snapshot was made of what is forgotten now: {', '.join(gone[:5])}{more};"
        " run `nightschool night` to learn again from what is left"
    )
