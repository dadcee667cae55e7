"""What is tried with a random program: estimators, objectives, numbers of particles, and ways to compare."""

from __future__ import annotations

import importlib
import shlex
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

import pplgrad
from pplgrad.core.estimator import Estimator
from pplgrad.errors import PplgradError
from pplgrad.testing.fuzz.generate import random_program
from pplgrad.testing.fuzz.hosts import Skipped
from pplgrad.testing.fuzz.program import Program

ESTIMATORS = (
    "ScoreFunction()",
    "ScoreFunction(LeaveOneOut())",
    "ScoreFunction(samples=2)",
    "LocalExpectation()",
    "DisARM()",
    "MuProp()",
    "DoubleCV(2, scale=1.0, learn=False)",
    "RODEO(2, learn=False)",
    "MeasureValued()",
    "UnorderedSet(2)",
    "SumAndSample(2)",
    "StickBreakingDisARM()",
    "TreeDisARM()",
    "Mirrored()",
    "mixed",
)
"""Estimators of the discrete sites, as source; "mixed" draws one of them for each site."""

SUMMED = ["Enumerate()", "Enumerate()", "ScoreFunction()", "DisARM()", "LocalExpectation()"]
"""What "summed" draws from for each site: sums over some of them, beside other estimators."""

EVERYWHERE = ("StickBreakingDisARM(differentiate='all')", "ScoreFunction(samples=2, differentiate='all')")
"""Estimators that differentiate the costs at all draws."""

NOISY = ("ARM()", "ARMS(2)", "CARMS(3)", "REBAR(0.5, 0.8, learn=False)")
"""Estimators whose own noise is continuous: z-tests."""

OBJECTIVES = ("ELBO()", "ELBO(kl_weight=0.5)", "Expectation()", "Expectation(entropy=0.3)")
BOUNDS = ("IWAE(plates=())", "Renyi(alpha=0.5, plates=())")
BOUND_ESTIMATORS = ("ScoreFunction()", "VIMCO()", "OVIS()", "LocalExpectation()")

WAYS = {"pyro": ("exact", "kept", "z", "compiled"), "numpyro": ("exact", "z", "unfused", "eager")}
_FUNCTIONS = {
    "exact": "exactly",
    "kept": "kept",
    "z": "statistically",
    "compiled": "compiled",
    "unfused": "unfused",
    "eager": "eagerly",
}
EXACT_TO, Z_TO = 1e-8, 6.0


@dataclass(frozen=True)
class Trial:
    """One comparison. `way` is one of `WAYS`; `flavours` asks for features of the program (see `random_program`)."""

    seed: int
    library: str
    estimator: str = "ScoreFunction()"
    objective: str = "ELBO()"
    particles: int = 1
    vectorized: bool = False
    way: str = "exact"
    flavours: tuple[str, ...] | None = None

    @property
    def command(self) -> str:
        """The command that does it again."""
        words = ["python", "-m", "pplgrad.testing.fuzz", "--seed", str(self.seed), "--library", self.library]
        words += ["--estimator", self.estimator, "--objective", self.objective, "--particles", str(self.particles)]
        words += ["--vectorized"] if self.vectorized else []
        words += ["--way", self.way]
        words += ["--flavours", ",".join(self.flavours)] if self.flavours is not None else []
        return shlex.join(words)


@dataclass(frozen=True)
class Verdict:
    """What came of a trial: "right", "refused", "wrong", "crashed" (an error that is not one of pplgrad's), or "skipped"."""

    kind: str
    detail: str = ""


def estimator_of(text: str) -> Estimator:
    """Return the estimator that a source names."""
    return eval(text, vars(pplgrad))  # noqa: S307


def estimators_of(text: str, program: Program, library: str) -> dict[str, Estimator]:
    """Return the estimators of a program's discrete sites (and of one whose support moves)."""
    names = program.latents(library)
    rng = np.random.default_rng(program.seed)
    plain = [e for e in ESTIMATORS if e not in ("mixed", "ScoreFunction(LeaveOneOut())")]
    choices = {"mixed": plain, "summed": SUMMED}.get(text, [text])
    return {name: estimator_of(text if choices == [text] else str(rng.choice(choices))) for name in names}


def attempt(trial: Trial, program: Program | None = None) -> Verdict:
    """Make a trial, of its seed's program or of another one."""
    program = program or random_program(trial.seed, trial.flavours)
    host = importlib.import_module(f"pplgrad.testing.fuzz.in_{trial.library}")
    run: Any = getattr(host, _FUNCTIONS[trial.way])
    moved = any(site.family == "uniform" for site in program.guide)
    if moved and trial.way != "z":
        return Verdict("skipped", "what is uniform has no exact expectation")
    with warnings.catch_warnings(), host.isolated():
        warnings.simplefilter("ignore")
        arguments = (trial.particles, trial.vectorized)
        try:
            estimators = estimators_of(trial.estimator, program, trial.library)
            error = run(program, estimators, estimator_of(trial.objective), *arguments)
        except Skipped as reason:
            return Verdict("skipped", str(reason))
        except PplgradError as refusal:
            return Verdict("refused", str(refusal))
        except Exception as problem:
            if not host.runs_without(program, *arguments):
                return Verdict("skipped", f"the host: {problem}")
            return Verdict("crashed", f"{type(problem).__name__}: {str(problem)[:300]}")
    limit = Z_TO if trial.way in ("z", "compiled") else EXACT_TO
    return Verdict("right" if error <= limit else "wrong", f"{error:.3g}")


def trials(seed: int, libraries: tuple[str, ...] = ("pyro", "numpyro")) -> list[Trial]:
    """Return what is tried with a seed's program: a few of all that could be, by the seed."""
    rng = np.random.default_rng([seed, 7])
    program = random_program(seed)

    def one_of(items: tuple[str, ...]) -> str:
        return str(items[int(rng.integers(len(items)))])

    found: list[Trial] = []
    moved = any(site.family == "uniform" for site in program.guide)
    for library in libraries:
        if moved:
            found += [Trial(seed, library, name, way="z") for name in ("ScoreFunction()", "Reparam()")]
            continue
        found.append(Trial(seed, library, objective=one_of(("ELBO()", *OBJECTIVES))))
        for _ in range(2):
            estimator = one_of(ESTIMATORS)
            particles = 2 if "LeaveOneOut" in estimator or rng.random() < 0.2 else 1
            vectorized = bool(rng.random() < 0.5)
            found.append(Trial(seed, library, estimator, one_of(OBJECTIVES), particles, vectorized))
        if program.outcomes() <= 16 and rng.random() < 0.3:
            found.append(Trial(seed, library, one_of(BOUND_ESTIMATORS), one_of(BOUNDS), 2, bool(rng.random() < 0.5)))
        if library == "pyro" and program.reads_state:
            found.append(Trial(seed, library, way="kept"))
            found.append(Trial(seed, library, one_of(("LocalExpectation()", "DisARM()")), way="kept"))
        if rng.random() < 0.15:
            found.append(Trial(seed, library, one_of(NOISY), way="z", vectorized=bool(rng.random() < 0.5)))
        if rng.random() < 0.25:
            ways = ("compiled",) if library == "pyro" else ("unfused", "eager")
            found.append(Trial(seed, library, one_of(("ScoreFunction()", "LocalExpectation()")), way=one_of(ways)))
        # By the seed itself: another random number would give recorded seeds other trials.
        summed, objective = ("Enumerate()", "summed")[seed % 2], OBJECTIVES[seed // 2 % len(OBJECTIVES)]
        if seed % 3 == 1:
            found.append(Trial(seed, library, summed, objective, vectorized=seed // 3 % 2 == 1))
        elif seed % 3 == 2:
            found.append(Trial(seed, library, EVERYWHERE[seed // 2 % 2], objective, vectorized=seed // 3 % 2 == 1))
    return found
