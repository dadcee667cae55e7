"""`python -m pplgrad.testing.fuzz`: many programs with a table of what came of them, or one trial again with its program."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from pplgrad.testing.fuzz.generate import random_program
from pplgrad.testing.fuzz.source import source
from pplgrad.testing.fuzz.trials import Trial, Verdict, attempt, trials

KINDS = ("right", "refused", "wrong", "crashed", "skipped")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pplgrad.testing.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="0:40", help="a range FROM:TO of seeds, or a number of them (default 0:40)")
    parser.add_argument("--library", choices=("pyro", "numpyro"), help="only this library")
    parser.add_argument("--seed", type=int, help="make one trial again, and print its program")
    parser.add_argument("--estimator", default="ScoreFunction()")
    parser.add_argument("--objective", default="ELBO()")
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--vectorized", action="store_true")
    parser.add_argument("--way", default="exact")
    parser.add_argument("--flavours", help="features of the program, with commas")
    return parser.parse_args(given)


def _again(given: argparse.Namespace) -> int:
    flavours = None if given.flavours is None else tuple(filter(None, given.flavours.split(",")))
    trial = Trial(
        given.seed,
        given.library or "pyro",
        given.estimator,
        given.objective,
        given.particles,
        given.vectorized,
        given.way,
        flavours,
    )
    print(source(random_program(trial.seed, flavours), trial.library))
    verdict = attempt(trial)
    print(f"# {verdict.kind}: {verdict.detail}")
    return int(verdict.kind in ("wrong", "crashed"))


def _table(counts: dict[tuple[str, str], Counter]) -> str:
    lines = ["library  estimator                            " + "".join(f"{kind:>9}" for kind in KINDS)]
    for (library, name), found in sorted(counts.items()):
        lines.append(f"{library:<9}{name:<37}" + "".join(f"{found[kind]:>9}" for kind in KINDS))
    total: Counter = sum(counts.values(), Counter())
    lines.append(f"{'all':<46}" + "".join(f"{total[kind]:>9}" for kind in KINDS))
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    """Run the command line; return 1 if something is wrong."""
    arguments = _arguments(given)
    if arguments.seed is not None:
        return _again(arguments)
    first, _, last = arguments.seeds.rpartition(":")
    libraries = (arguments.library,) if arguments.library else ("pyro", "numpyro")
    counts: dict[tuple[str, str], Counter] = {}
    bad: list[tuple[Trial, Verdict]] = []
    start = time.monotonic()
    for seed in range(int(first or 0), int(last)):
        for trial in trials(seed, libraries):
            verdict = attempt(trial)
            name = trial.estimator if trial.way == "exact" else f"{trial.estimator} ({trial.way})"
            counts.setdefault((trial.library, name), Counter())[verdict.kind] += 1
            if verdict.kind in ("wrong", "crashed"):
                bad.append((trial, verdict))
                print(f"{verdict.kind} ({verdict.detail}): {trial.command}", flush=True)
    print(_table(counts))
    print(f"{time.monotonic() - start:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
