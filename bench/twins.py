"""Whether the gate promotes what is no better, on adapters that were really trained: twins of what serves.

    make bench NAME=twins ARGS="--seeds 100,101,102,103 --jobs 2 --keep FOLDER"

The days and nights of `bench/learning.py` with its full method. What is promoted is trained once more, from the same
memory with another seed, and on every later night this twin is judged as a candidate would be. It learnt what serves
learnt, so it should be no better, and how many more people it satisfies is told; but it has said nothing, while the
answers that people judge now are those of what serves. Beside it the night's own candidate is told, with how many more
people it satisfies than what serves. What serves was chosen by the gate and a twin was not, so it is rather worse.

The area of `preference` is told over all couples of a liked and a disliked answer, and over those alone in which both
are of what serves or neither is (`same author`). 95 % intervals are the gate's, over people. A twin is judged on
several nights, so nights are no independent draws: shares are told by twin as well. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import learning
import numpy as np
import runs
from nightschool.evolve import gate
from nightschool.evolve.sealing import ensure_loaded
from nightschool.evolve.types import Adapter, Judged, Snapshot, Verdict
from nightschool.serving.local import LocalEngine
from nightschool.settings import GateSettings, NightSettings, ServingSettings, Settings

ARM = "full"
OTHER_SEED = 1000
BETTER, WORSE = 0.08, -0.03  # of the share of satisfied people: much better, and worse
Row = dict[str, Any]


# -- one seed, in a process of its own ---


class Twins(learning.World):
    """A world in which what serves has a twin that does not."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.twin: Adapter | None = None
        self.twin_satisfies = 0.0
        self.since = 0.0  # when what serves began to answer
        self.snapshot: Snapshot | None = None
        self.compared: list[Row] = []

    def night(self) -> Row:
        before, served = self.live, float(np.mean(self.served["satisfied"]))
        row = super().night()
        if before:
            self.compared[-1]["more_satisfied"] = float(np.mean(row["candidate"]["satisfied"])) - served
            self.compared[-1]["twin_more_satisfied"] = self.twin_satisfies - served
        if self.live is not before and self.snapshot:
            settings = self.assistant.settings
            other = replace(settings, night=replace(settings.night, seed=settings.night.seed + OTHER_SEED))
            self.twin, self.since = learning.learn(self.snapshot, self.arm.phases, other)[-1], self.now
            ensure_loaded(self.engine, self.twin, settings.serving.parity_tolerance)
            self.twin_satisfies = float(np.mean(self.exam(self.twin)["satisfied"]))
        return row

    def _judge(self, made: Sequence[Adapter], snapshot: Snapshot) -> Verdict:
        self.snapshot = snapshot
        verdict = super()._judge(made, snapshot)
        if self.live and self.twin:
            self.compared.append(self._compare(self.live, self.twin, made[-1], snapshot) | {"took": verdict.accepted})
        return verdict

    def _compare(self, live: Adapter, twin: Adapter, candidate: Adapter, snapshot: Snapshot) -> Row:
        settings = self.assistant.settings
        ensure_loaded(self.engine, twin, settings.serving.parity_tolerance)
        verdict = gate.judge(twin, live, snapshot, self.engine, settings.gate, known=self.known)
        held = gate.unknown(snapshot.held_out, self.known)
        prompts, answers = [h.prompt for h in held], [h.completion for h in held]
        before, *after = (self.engine.score(prompts, answers, adapter=a.id) for a in (live, twin, candidate))
        rises = [[(x.logprob - y.logprob) / x.tokens for x, y in zip(one, before, strict=True)] for one in after]
        return {
            "of": twin.id,
            "twin": rises[0],
            "candidate": rises[1],
            "liked": [h.liked for h in held],
            "cluster": [h.cluster for h in held],
            "own": [self._is_own(h) for h in held],
            "twin_failed": [m.name for m in verdict.measures if not m.passed],
        }

    def _is_own(self, row: Judged) -> bool:
        """Whether what serves said it."""
        held = self.assistant.store.interaction(row.interaction_ids[0])
        # what comes later in a session is the desk's, which took over
        return row.correction_id is None and held.position == 0 and held.created_utc >= self.since


def one(seed: int, nights: int) -> list[Row]:
    import torch

    torch.set_num_threads(1)
    learning.keep_replay()
    data, night = replace(learning.DATASET, seed=seed), NightSettings(seed=seed)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(Path(home), dataset=data, night=night, serving=ServingSettings(threads=1))
        engine, sizes = LocalEngine(settings.serving), replace(learning.SIZES, nights=nights)
        world = Twins(seed, sizes, learning.ARMS[ARM], engine, settings)
        for day in range(1, nights + 1):
            world.day(day)
            row = world.night()
            print(f"{seed} {day}: {json.dumps(learning.brief(row))}", file=sys.stderr, flush=True)
        world.assistant.close()
        return world.compared


# -- all of them ---


def areas(rows: Sequence[Row], who: str, apart: bool) -> list[tuple[float, float, float]]:
    """The area of each night, with its interval."""
    settings, found = GateSettings(), list[tuple[float, float, float]]()
    for row in rows:
        rise, liked, own = (np.array(row[key]) for key in (who, "liked", "own"))
        strata = own if apart else np.zeros(len(own), bool)
        draws = gate.cluster_draws(row["cluster"], settings.bootstrap)
        drawn, point = (pooled(rise, liked, strata, weights) for weights in (draws, np.ones((1, len(own)))))
        found.append((float(point[0]), *gate.interval(drawn, settings.confidence)))
    return found


def pooled(rise: Any, liked: Any, strata: Any, weights: Any) -> Any:
    """The area over couples within a stratum, each counting as often as it is drawn."""
    won = pairs = 0.0
    for kind in np.unique(strata):
        of = strata == kind
        couples = (weights[:, of] * liked[of]).sum(1) * (weights[:, of] * ~liked[of]).sum(1)
        won = won + couples * gate.weighted_auc(rise[of], liked[of], weights[:, of])
        pairs = pairs + couples
    return np.divide(won, pairs, out=np.full(len(weights), 0.5), where=pairs > 0)


def summary(rows: Sequence[Row]) -> Row:
    """How often each form of preference would let through: twins, and candidates by what they are worth."""
    if not rows:
        return {"nights": 0}  # nothing was promoted before the last night
    result: Row = {
        "nights": len(rows),
        "twins": len({r["of"] for r in rows}),
        "own": round(float(np.mean(np.concatenate([r["own"] for r in rows]))), 3),
    }
    worth = np.array([r["more_satisfied"] for r in rows])
    kinds = {"much better": worth >= BETTER, "worse": worth <= WORSE}
    print("couples | twins: mean area | let through | much better let through | worse let through")
    for name, apart in (("all", False), ("same author", True)):
        of_twins, of_candidates = (areas(rows, who, apart) for who in ("twin", "candidate"))
        passed = np.array([low > 0.5 for _, low, _ in of_candidates])
        shares = {kind: round(float(passed[these].mean()), 3) if these.any() else None for kind, these in kinds.items()}
        found = {
            "area": round(float(np.mean([point for point, *_ in of_twins])), 4),
            "twins_let_through": round(float(np.mean([low > 0.5 for _, low, _ in of_twins])), 4),
            **shares,
        }
        print(f"{name} | " + " | ".join(str(value) for value in found.values()))
        result[name] = found
    promoted = [(r["of"], not r["twin_failed"]) for r in rows]
    result["nights_promoted"] = round(float(np.mean([was for _, was in promoted])), 4)
    result["twins_promoted"] = len({of for of, was in promoted if was})
    worths = {r["of"]: r["twin_more_satisfied"] for r in rows}
    result["twin_more_satisfied"] = [round(value, 3) for value in worths.values()]
    result["much_better"], result["worse"] = (int(these.sum()) for these in kinds.values())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="100,101,102,103")
    parser.add_argument("--nights", type=int, default=learning.SIZES.nights)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        print(json.dumps({"compared": one(args.part, args.nights)}))
        return
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda seed: world(args, seed), seeds))
    rows = [row for part in found for row in part["compared"]]
    print(json.dumps({**summary(rows), "seeds": seeds, **runs.circumstances(found)}))


def world(args: argparse.Namespace, seed: int) -> Row:
    name = f"twins-{seed}-{args.nights}-{runs.state(dataset=learning.DATASET, sizes=learning.SIZES)}.json"
    return runs.part(__file__, ("--part", str(seed), "--nights", str(args.nights)), args.keep and args.keep / name)


if __name__ == "__main__":
    main()
