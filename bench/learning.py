"""Does it get better, and by what: seven nights with people who have hidden preferences, in eight arms.

    python bench/learning.py [--quick] [--seeds 0,1,2,3,4] [--nights 7] [--jobs 2] [--keep FOLDER]

A closed loop. `bench/simulated.py` says who asks, how they react and who judges. By day the live adapter of the arm
answers, people react, and the store keeps it; by night the arm learns from all that is remembered, from the base, and
the gate decides, in every arm that trains, whether the candidate answers from then on. Before the first day the store
takes in what people at the desk answered on the day before.

  none      the base answers
  memory    the base answers and is shown what memory recalls for the person who asks; nothing is trained
  sft       phase 1 alone, with the epochs of both phases
  dpo       phase 2 alone, from a fresh adapter, with the epochs of both
  equal     both phases, every weight 1
  shuffled  both phases, the weights of each part of the snapshot dealt out anew
  full      the method: both phases, weights by satisfaction and frequency
  hostile   the same where a tenth of the people like what is bad and correct what is good

Arms that train answer without recall, so that what they show is in the weights. All have the same seeds, people,
questions, settings and visits of rows to learn; the same adapter would meet the same reactions. Three things differ
beside what an arm is named for: an arm of one phase sees the base's own text of one; where the base still serves, `sft`
and `dpo` are judged over the base and the others over their phase 1, as the gate would; and `equal` and `shuffled` also
undo the confidence in a row, the balance of likes and dislikes and the limit on one user. Frequency is in the rows as
well as in their weights, since a topic has as many rows as it is asked for.

After each night the judge has everybody ask, in usual words and in words that no day has: for the share of satisfied
people, weighted by how often a topic comes up or not, and for the share of answers with the right fact. Most prompts in
usual words were asked on earlier days, too. The hostile are judged by what they would like if they were not. Drift is
that of the gate, NLL on `evolve/probe.jsonl` against the base. What an arm makes of chance is one adapter a seed, so
the interval that decides is Student's over the seeds; that over people (bootstrap, all seeds pooled) says what these
adapters do.

A night trains at the defaults, from at most 200 rows of a part; what they make of so few was chosen on seeds from 100
up (bench/results/trial-training.md). With --keep, an arm that was run with this base and these settings is not run
again. Prints tables, draws docs/learning.png (of the usual seeds and nights), and prints JSON last: a difference is
[share, low, high over people, low, high over seeds].
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import numpy as np
import runs
import simulated
from nightschool.content import Message
from nightschool.evolve import dataset, dpo, gate, replay, sft
from nightschool.evolve.registry import Registry
from nightschool.evolve.sealing import ensure_loaded
from nightschool.evolve.types import Adapter, Snapshot, Verdict
from nightschool.memory.prompt import with_notes
from nightschool.memory.store import MemoryStore
from nightschool.sdk import Assistant
from nightschool.serving.engine import Engine, Sampling
from nightschool.serving.local import LocalEngine
from nightschool.settings import DatasetSettings, NightSettings, ServingSettings, Settings
from numpy.typing import NDArray
from simulated import Asked

ANSWER = Sampling(max_tokens=48)
DRAWS = 4000
SHARE = "{:.3f} [{:.3f}, {:.3f}]"
DRIFT = "{:+.1%} [{:+.1%}, {:+.1%}]"
PICTURE = Path(__file__).parent.parent / "docs" / "learning.png"
TABLES = (
    ("satisfied, weighted", "satisfied", True),
    ("unweighted", "satisfied", False),
    ("satisfied in unseen words, weighted", "satisfied_unseen", True),
    ("right in unseen words", "right", False),
)
Row = dict[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    people: int = 64
    earlier: int = 400  # conversations before the first day
    daily: int = 128
    exam: int = 3  # questions to each person after a night
    nights: int = 7


SIZES = Sizes()
SEEDS = "0,1,2,3,4"
QUICK = {"seeds": "0", "nights": 4}
DATASET = DatasetSettings(max_rows=200)  # of a part, since every arm trains 35 times


# -- the arms ---

Reweigh = Callable[[Snapshot, int], Snapshot]


def as_weighed(snapshot: Snapshot, seed: int) -> Snapshot:
    return snapshot


def equal(snapshot: Snapshot, seed: int) -> Snapshot:
    return _weighed(snapshot, lambda weights: [1.0] * len(weights))


def shuffled(snapshot: Snapshot, seed: int) -> Snapshot:
    random = Random(seed)
    return _weighed(snapshot, lambda weights: random.sample(weights, len(weights)))


def _weighed(snapshot: Snapshot, change: Callable[[list[float]], list[float]]) -> Snapshot:
    parts = {}
    for part in ("examples", "pairs", "thumbs"):
        rows = getattr(snapshot, part)
        weights = change([row.weight for row in rows])
        parts[part] = tuple(replace(row, weight=w) for row, w in zip(rows, weights, strict=True))
    return replace(snapshot, **parts)


@dataclass(frozen=True)
class Arm:
    phases: tuple[str, ...] = ()
    reweigh: Reweigh = as_weighed
    recalls: bool = False
    hostile: bool = False


BOTH = ("sft", "dpo")
ARMS = {
    "none": Arm(),
    "memory": Arm(recalls=True),
    "sft": Arm(("sft",)),
    "dpo": Arm(("dpo",)),
    "equal": Arm(BOTH, equal),
    "shuffled": Arm(BOTH, shuffled),
    "full": Arm(BOTH),
    "hostile": Arm(BOTH, hostile=True),
}
HALVES = (("none", "memory", "sft", "dpo", "equal"), ("shuffled", "full", "hostile"))  # about equal in work


# -- one arm of one seed ---


def run_arm(name: str, seed: int, sizes: Sizes, engine: Engine, home: Path) -> Row:
    """All nights of an arm, in a home of its own."""
    arm, started = ARMS[name], time.monotonic()
    data, night = replace(DATASET, seed=seed), NightSettings(seed=seed)
    settings = Settings(home, dataset=data, night=night, serving=ServingSettings(threads=1))
    world = World(seed, sizes, arm, engine, settings)
    nights = [world.served]
    for day in range(1, sizes.nights + 1):
        if arm.phases or arm.recalls:
            world.day(day)
            nights.append(world.night() if arm.phases else {**world.exam(), "probe": 0.0})
        else:
            nights.append(nights[0])  # the same base says the same
        print(f"{name} {seed} {day}: {json.dumps(brief(nights[-1]))}", file=sys.stderr, flush=True)
    world.assistant.close()
    return {"nights": nights, "seconds": round(time.monotonic() - started, 1)}


def brief(night: Row) -> Row:
    means = {key: round(float(np.mean(night[key])), 3) for key in ("satisfied", "satisfied_unseen", "right")}
    return means | {k: v for k, v in night.items() if k not in (*means, "said", "candidate")}


class World:
    """The people of one seed with an assistant of their own."""

    def __init__(self, seed: int, sizes: Sizes, arm: Arm, engine: Engine, settings: Settings) -> None:
        self.seed, self.sizes, self.arm, self.engine = seed, sizes, arm, engine
        self.now = simulated.EPOCH
        store = MemoryStore(settings, clock=lambda: self.now)
        registry = Registry.of(store)
        self.assistant = Assistant(settings, store, registry, engine)
        self.live: Adapter | None = None
        self.known: set[tuple[str, str]] = set()  # what the live adapter was taught
        self.people = simulated.people(seed, sizes.people, arm.hostile)
        self.served = {**self.exam(), "probe": 0.0}  # what the judge found in the live adapter
        if arm.phases or arm.recalls:
            self._keep(simulated.earlier(seed, self.people, sizes.earlier))

    # -- the day ---

    def day(self, day: int) -> None:
        self.now = simulated.EPOCH + day * simulated.DAY
        asked = simulated.questions(self.seed, day, self.people, self.sizes.daily)
        replies = self.answers(asked, self.live)
        visits = enumerate(zip(asked, replies, strict=True))
        self._keep([simulated.met(self.seed, day, n, a, reply) for n, (a, reply) in visits])
        self.now += simulated.DAY - 1

    def _keep(self, conversations: Sequence[Any]) -> None:
        if errors := self.assistant.store.record_many(conversations).errors:
            raise next(iter(errors.values()))

    def answers(self, asked: Sequence[Asked], adapter: Adapter | None) -> list[str]:
        """As `Assistant.reply` would answer each in a session of its own, in batches."""
        prompts = [self._prompt(a) for a in asked]
        known = {json.dumps(p): p for p in prompts}
        said = self.engine.generate(list(known.values()), adapter=adapter.id if adapter else None, sampling=ANSWER)
        found = dict(zip(known, said, strict=True))
        return [found[json.dumps(p)] for p in prompts]

    def _prompt(self, asked: Asked) -> list[Message]:
        turn: list[Message] = [{"role": "user", "content": asked.text}]
        if not self.arm.recalls:
            return turn
        found = self.assistant.recall(asked.text, user_id=asked.person.name)
        return with_notes(turn, [recall.memory.text for recall in found])

    # -- the night ---

    def night(self) -> Row:
        """One night as in `pipelines.nightly`, but for what the arm does differently; then the exam."""
        store, settings = self.assistant.store, self.assistant.settings
        started = time.monotonic()
        snapshot = self.arm.reweigh(dataset.freeze(store, settings, now=store.clock()), self.seed)
        made = learn(snapshot, self.arm.phases, settings)
        candidate = made[-1]
        trained = time.monotonic()
        verdict = self._judge(made, snapshot)
        drift = next((m.change for m in verdict.measures if m.name == "probe_nll"), 0.0)
        exam = {**self.exam(candidate), "probe": round(drift, 4)}
        if verdict.accepted:
            self.live, self.served, self.known = candidate, exam, dataset.taught(snapshot)
        return {
            **self.served,
            "accepted": verdict.accepted,
            "failed": ", ".join(m.name for m in verdict.measures if not m.passed),
            "candidate": exam,
            "rows": {part: len(getattr(snapshot, part)) for part in dataset.PARTS},
            "train_s": round(trained - started, 1),
            "judge_s": round(time.monotonic() - trained, 1),
        }

    def _judge(self, made: Sequence[Adapter], snapshot: Snapshot) -> Verdict:
        settings = self.assistant.settings
        for adapter in filter(None, (*made, self.live)):
            ensure_loaded(self.engine, adapter, settings.serving.parity_tolerance)
        return gate.judge(made[-1], self.live, snapshot, self.engine, settings.gate, known=self.known)

    # -- the judge ---

    def exam(self, adapter: Adapter | None = None) -> Row:
        usual, unseen = (simulated.exam(self.seed, self.people, self.sizes.exam, words) for words in (True, False))
        answers = self.answers([*usual, *unseen], adapter)
        half = list(zip(usual, answers[: len(usual)], strict=True))
        other = list(zip(unseen, answers[len(usual) :], strict=True))
        return {
            "satisfied": [not simulated.faults(x, a.person, a.topic) for a, x in half],
            "satisfied_unseen": [not simulated.faults(x, a.person, a.topic) for a, x in other],
            "right": [bool(a.topic.right.search(x)) for a, x in other],
            "words": round(float(np.mean([len(x.split()) for x in answers])), 2),
            "distinct": len(set(answers)),
            "repetition": round(float(np.mean([gate.repetition(x) for x in answers])), 4),
            "said": [[a.text, x] for a, x in half][:16],
        }


# -- learning with some of the phases ---


def learn(snapshot: Snapshot, phases: Sequence[str], settings: Settings) -> list[Adapter]:
    """The adapters that the phases made, the candidate last."""
    settings = replace(settings, night=budgeted(settings.night, snapshot, phases))
    made: list[Adapter] = []
    if "sft" in phases:
        made.append(sft.run(snapshot, settings, folder=building(settings), progress=lambda line: None))
    if "dpo" in phases:
        start = made[-1] if made else fresh(snapshot, settings)
        preferred = dpo.run(snapshot, start, settings, folder=building(settings), progress=lambda line: None)
        made.append(preferred if made else replace(preferred, parent_id=None))  # a fresh adapter is the base
    return made


def building(settings: Settings) -> Path:
    return settings.home / "adapters" / uuid4().hex


def fresh(snapshot: Snapshot, settings: Settings) -> Adapter:
    """An adapter that has learnt nothing: the start of phase 2 where there is no phase 1."""
    from nightschool.evolve.trainer import save, student

    given = {"snapshot_id": snapshot.id, "phase": "sft", "parent_id": None, "details": {}}
    return save(student(settings), building(settings), settings, **given)


def budgeted(night: NightSettings, snapshot: Snapshot, phases: Sequence[str]) -> NightSettings:
    """`night` with as many rows to learn for one phase as it has for both."""
    from nightschool.evolve.trainer import suited

    if len(phases) > 1:
        return night
    real = suited(night, snapshot)
    examples, preferred = len(snapshot.examples), len(snapshot.pairs) + len(snapshot.thumbs)
    first = real.sft_epochs * examples
    second = real.preference_epochs * (preferred + examples)  # it goes on imitating
    return replace(
        night,
        sft_epochs=night.sft_epochs * (1 + second / first),
        preference_epochs=night.preference_epochs * (1 + first / second),
        interpolation=1.0,  # there is no phase 1 to go back to
        budget_minutes=2 * night.budget_minutes,  # of which a phase has its share
    )


def keep_replay() -> None:
    """Draw the base's own text once a process: it depends on (base, count, seed) alone."""
    draw, drawn = replay.sample, {}

    def sample(student: Any, count: int, seed: int, progress: Callable[[str], None]) -> Any:
        key = student.base_id, count, seed
        if key not in drawn:
            drawn[key] = draw(student, count, seed, progress)
        return drawn[key]

    replay.sample = sample


# -- all seeds ---


def main() -> None:
    args = parse()
    if args.part:
        run_part(args)
        return
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        args.keep = args.keep or Path(scratch)
        args.keep.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda part: spawn(args, *part), [(seed, half) for seed in seeds for half in range(2)]))
        found = {arm: [json.loads(kept(args, arm, seed).read_text()) for seed in seeds] for arm in ARMS}
    results = Results(found)
    results.print()
    if picture := args.picture or (PICTURE if (args.seeds, args.nights) == (SEEDS, SIZES.nights) else None):
        draw(results, picture)
    parts = [row for rows in found.values() for row in rows]
    print(json.dumps({**results.summary(), **runs.circumstances(parts)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seed 0 alone, four nights")
    parser.add_argument("--seeds", default=SEEDS)
    parser.add_argument("--nights", type=int, default=SIZES.nights)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # "seed half", in a process of its own
    args = parser.parse_args()
    return argparse.Namespace(**{**vars(args), **QUICK}) if args.quick else args


def kept(args: argparse.Namespace, arm: str, seed: int) -> Path:
    name = f"{arm}-{seed}-{args.nights}-{runs.state(dataset=DATASET, sizes=SIZES)}"
    return Path(args.keep) / f"{name}.json"


def spawn(args: argparse.Namespace, seed: int, half: int) -> None:
    """Half of the arms of one seed, in a process of their own with one thread."""
    if all(kept(args, arm, seed).exists() for arm in HALVES[half]):
        return
    words = ("--part", f"{seed} {half}", "--keep", str(args.keep), "--nights", str(args.nights))
    runs.child(__file__, words)


def run_part(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    keep_replay()
    seed, half = map(int, args.part.split())
    sizes = replace(SIZES, nights=args.nights)
    for arm in (missing := [arm for arm in HALVES[half] if not kept(args, arm, seed).exists()]):
        with tempfile.TemporaryDirectory() as home:
            found = run_arm(arm, seed, sizes, LocalEngine(ServingSettings(threads=1)), Path(home))
        runs.write_whole(kept(args, arm, seed), found | {"commit": runs.commit()})
    print(json.dumps({"ran": missing}))


# -- what came out ---


class Results:
    """What the judge found by arm, seed and night. Rows of an exam are the same in all: (people, questions each)."""

    def __init__(self, found: Mapping[str, Sequence[Row]]) -> None:
        self.found, self.last = found, len(found["full"][0]["nights"]) - 1
        seeds, rows = len(found["full"]), SIZES.people * SIZES.exam
        people = [f"{seed} {row // SIZES.exam}" for seed in range(seeds) for row in range(rows)]
        self.draws = gate.cluster_draws(people, DRAWS)
        asked = simulated.exam(0, simulated.people(0, SIZES.people, False), SIZES.exam, True)
        self.frequency = np.tile([simulated.FREQUENCY[simulated.TOPICS.index(a.topic)] for a in asked], seeds)
        self.seeds = seeds
        self.details = {arm: self._details(arm) for arm in ARMS}

    def rows(self, arm: str, night: int, key: str = "satisfied") -> Array:
        """Of all seeds, one after the other."""
        return np.concatenate([np.asarray(seed["nights"][night][key], float) for seed in self.found[arm]])

    def share(self, values: Array, weighted: bool = True) -> tuple[float, float, float]:
        """The mean of `values` with its interval over people."""
        weights = self.frequency if weighted else np.ones(len(values))
        drawn = (self.draws @ (weights * values)) / (self.draws @ weights)
        low, high = gate.interval(drawn, 0.95)
        return tuple(round(float(x), 4) for x in (weights @ values / weights.sum(), low, high))  # type: ignore[return-value]

    def over_seeds(self, values: Array) -> tuple[float, float, float]:
        """The weighted mean of `values` with its interval over seeds."""
        by_seed = values.reshape(self.seeds, -1)
        weights = self.frequency.reshape(self.seeds, -1)
        return student((weights * by_seed).sum(1) / weights.sum(1))

    def drift(self, arm: str, night: int) -> tuple[float, float, float]:
        """The mean of the seeds, with an interval over them: the text is the same for all."""
        return student(np.array([seed["nights"][night]["probe"] for seed in self.found[arm]]))

    def mean(self, arm: str, night: int, key: str) -> float:
        return round(float(np.mean([seed["nights"][night][key] for seed in self.found[arm]])), 4)

    def print(self) -> None:
        for what, key, weighted in TABLES:
            self._table(what, lambda arm, n, k=key, w=weighted: SHARE.format(*self.share(self.rows(arm, n, k), w)))
        self._table("drift of the probe's NLL", lambda arm, n: DRIFT.format(*self.drift(arm, n)))
        columns = (
            "unweighted",
            "unseen",
            "right",
            "probe",
            "words",
            "distinct",
            "repetition",
            "promoted",
            "candidates",
        )
        print(f"\nafter night {self.last}\narm | " + " | ".join(columns))
        for arm in ARMS:
            print(f"{arm} | " + " | ".join(str(self.details[arm][column]) for column in columns))
        for name, (difference, *people, low, high) in self.differences().items():
            print(f"{name}: {difference:+.3f} [{low:+.3f}, {high:+.3f}] over seeds, {people} over people")

    def _table(self, what: str, cell: Callable[[str, int], str]) -> None:
        nights = range(self.last + 1)
        print(f"\n{what}\narm | " + " | ".join(f"night {n}" for n in nights))
        for arm in ARMS:
            print(f"{arm} | " + " | ".join(cell(arm, n) for n in nights))

    def _details(self, arm: str) -> Row:
        nights = [night for seed in self.found[arm] for night in seed["nights"][1:]]
        return {
            "unweighted": self.share(self.rows(arm, self.last), weighted=False),
            "unseen": self.share(self.rows(arm, self.last, "satisfied_unseen")),
            "right": self.share(self.rows(arm, self.last, "right"), weighted=False),
            "probe": self.drift(arm, self.last),
            "words": [self.mean(arm, night, "words") for night in (0, self.last)],
            "distinct": [self.mean(arm, night, "distinct") for night in (0, self.last)],
            "repetition": [self.mean(arm, night, "repetition") for night in (0, self.last)],
            "promoted": f"{sum(night.get('accepted', False) for night in nights)} of {len(nights)}",
            "candidates": self.candidates(arm),
            "by_night": [self.share(self.rows(arm, night)) for night in range(self.last + 1)],
            "unweighted_by_night": [
                self.share(self.rows(arm, night), weighted=False) for night in range(self.last + 1)
            ],
            "seconds": [seed["seconds"] for seed in self.found[arm]],
        }

    def candidates(self, arm: str) -> list[float]:
        """Night by night, how what was trained satisfied, promoted or not; empty where nothing is trained."""
        if not ARMS[arm].phases:
            return []
        nights = zip(*(seed["nights"][1:] for seed in self.found[arm]), strict=True)
        found = [np.concatenate([np.asarray(n["candidate"]["satisfied"], float) for n in night]) for night in nights]
        return [self.share(values)[0] for values in found]

    def differences(self) -> dict[str, list[float]]:
        """After the last night: the difference, its interval over people, and that over seeds and people."""
        others = {"unweighted": "equal", **{arm: arm for arm in ("none", "memory", "sft", "dpo", "shuffled")}}
        pairs = {f"full_minus_{name}": ("full", arm) for name, arm in others.items()}
        pairs["hostile_minus_full"] = ("hostile", "full")
        found = {}
        for name, arms in pairs.items():
            ours, theirs = (self.rows(arm, self.last) for arm in arms)
            found[name] = [*self.share(ours - theirs), *self.over_seeds(ours - theirs)[1:]]
        return found

    def summary(self) -> Row:
        arms = {}
        for arm in ARMS:
            share, *ci = self.share(self.rows(arm, self.last))
            arms[arm] = {
                "satisfied_night0": self.share(self.rows(arm, 0))[0],
                f"satisfied_night{self.last}": share,
                "ci": ci,
                "domain_accuracy": self.details[arm]["right"][0],
                "domain_accuracy_ci": self.details[arm]["right"][1:],
                "probe_nll_change": self.drift(arm, self.last)[0],
                "probe_nll_change_ci": self.drift(arm, self.last)[1:],
            }
        return {"arms": arms, **self.differences(), "details": self.details}


def student(values: Array) -> tuple[float, float, float]:
    """The mean and its 95 % interval by Student's t; without width where there is one value."""
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    reach = float(t.ppf(0.975, n - 1)) * float(values.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return round(mean, 4), round(mean - reach, 4), round(mean + reach, 4)


def draw(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, weighted in zip(figure.subplots(1, 2, sharey=True), (True, False), strict=True):
        for arm in ARMS:
            shares = [results.share(results.rows(arm, n), weighted=weighted) for n in range(results.last + 1)]
            middle, low, high = zip(*shares, strict=True)
            (line,) = axes.plot(middle, marker="o", markersize=3, linewidth=2.5 if arm == "full" else 1.2, label=arm)
            axes.fill_between(range(len(middle)), low, high, alpha=0.08, color=line.get_color())
        axes.set(title="weighted by frequency" if weighted else "every topic alike", xlabel="night")
    figure.axes[0].set(ylabel="share of satisfied users", ylim=(0, None))
    figure.axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
