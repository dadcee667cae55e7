"""Faults that this library once had, and the trials of random programs that showed them: put back, they must be found again.

`put_back` breaks what mended the fault; where it is None, the mended code has no single place to break.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pplgrad.core import plates
from pplgrad.engine import dependencies, layout
from pplgrad.testing.fuzz.trials import Trial


@dataclass(frozen=True)
class Fault:
    """A fault, and the trials that show it."""

    trials: tuple[Trial, ...]
    put_back: Callable[[Any], None] | None = None


STALE = (
    "namespace",
    "simple_namespace",
    "namespace_argument",
    "large_array",
    "large_argument",
    "growing_modules",
    "growing_sequence",
    "module_names",
    "generator",
    "generator_in_object",
    "deque",
    "array",
    "bytes",
    "memory_view",
    "context_variable",
    "thread_local",
    "function_attribute",
    "environment",
    "metaclass",
    "weak_reference",
    "object_array",
    "global_by_name",
    "bound_method",
    "file",
)
"""Python state whose change was once not seen."""

AROUND = ("legacy", "legacy_float", "new", "by_index", "pickled", "saved", "by_dlpack", "in_thread")
"""Ways around provenance that were once open."""


def a_path_that_leaves_a_plate_and_comes_back(patch: Any) -> None:
    """A site between two that stands outside of the first one's plate is passed through element by element."""
    plain = dependencies.through
    patch.setattr(dependencies, "through", lambda read, site, left: plain(read, site, frozenset()))


def elements_mixed_inside_a_plate(patch: Any) -> None:
    """What reads other elements of its own plate is taken to read its own."""
    patch.setattr(plates.Read, "mixes", lambda self, plate: False)


def only_direct_dependencies(patch: Any) -> None:
    """A cost is charged to the sites that it reads, and not to those which decide what it reads."""
    patch.setattr(layout, "cost_dependencies", lambda sites, costs, closed: [dict(cost.reads) for cost in costs])


def tensors_from_elsewhere_are_constants(patch: Any) -> None:
    """What leaves torch's operations is lost, and a tensor that none of them made is taken to read nothing."""
    from pplgrad.pyro import _running
    from pplgrad.pyro._tracing import escapes, provenance

    patch.setattr(_running, "OtherThreads", lambda: nullcontext(SimpleNamespace(ran=False)))
    patch.setattr(escapes.Leaving, "_left", lambda self, func, args, kwargs, out: None)
    patch.setattr(provenance.Provenance, "_unfollowed", lambda self, tensor: provenance.Known(0, {}, 1))


def a_structure_is_used_for_ever(patch: Any) -> None:
    """No change of Python state is seen, and nothing is watched again."""
    from pplgrad.pyro._reuse import dependency_structure, guards

    patch.setattr(guards.Guard, "of", classmethod(lambda cls, *roots: object.__new__(cls)))
    patch.setattr(guards.Guard, "holds", lambda self: True)
    patch.setattr(guards.Guard, "meets", lambda self, arguments: ())
    patch.setattr(dependency_structure.Structure, "reuse", lambda self: setattr(self, "following", False))
    patch.setattr(dependency_structure, "arguments_kind", lambda value, objects: type(value))


def particles_that_meet_are_not_noticed(patch: Any) -> None:
    """What runs together is taken to stay apart."""
    from pplgrad.pyro._rerun import branches

    patch.setattr(branches, "refuse_interaction", lambda *given: None)


def supports_are_taken_for_fixed(patch: Any) -> None:
    """The score function does not ask whether the support moves."""
    from pplgrad.estimators.score import ScoreFunction

    patch.setattr(ScoreFunction, "needs_fixed_support", False)


def control_flow_is_steered_by_anything(patch: Any) -> None:
    """What is computed from a relaxed value may decide how often a loop runs, and which branch is taken."""
    from pplgrad.numpyro._tracing import relaxation_checks

    patch.setattr(relaxation_checks, "steering", lambda closed, names, costs=None: ({}, {}))


def what_prints_alike_is_the_same(patch: Any) -> None:
    """Operations are compared by the text of their settings."""
    from pplgrad.numpyro._fusion import structural_equality

    patch.setattr(structural_equality.Structure, "is_known", lambda self, equation: True)
    patch.setattr(structural_equality.Structure, "settings", lambda self, value: re.sub("0x[0-9a-f]+", "", str(value)))
    patch.setattr(
        structural_equality.Structure, "_custom", lambda self, equation: self.settings(equation.params), raising=False
    )


def impossible_values_have_a_part(patch: Any) -> None:
    """A program is run at values that a site cannot take, and what it costs there is multiplied by 0."""
    from pplgrad.core import array_ops, draw

    for module in (draw, array_ops):
        patch.setattr(module, "is_possible", lambda xp, log_probs: xp.ones_like(log_probs) > 0)


def _trials(seeds: tuple[int, ...], library: str, flavours: tuple[str, ...], **more: Any) -> tuple[Trial, ...]:
    return tuple(Trial(seed, library, flavours=flavours, **more) for seed in seeds)


LOO = "ScoreFunction(LeaveOneOut())"
FAULTS: dict[str, Fault] = {
    **{
        f"{name} ({library})": Fault(_trials((1, 3), library, ("return",)), put_back)
        for library in ("pyro", "numpyro")
        for name, put_back in (
            ("a plate entered again", a_path_that_leaves_a_plate_and_comes_back),
            ("direct dependencies alone", only_direct_dependencies),
        )
    },
    **{
        f"mixed in a plate ({library})": Fault(_trials((3, 5), library, ("mixing",)), elements_mixed_inside_a_plate)
        for library in ("pyro", "numpyro")
    },
    **{
        f"stale: {kind}": Fault(_trials((2,), "pyro", (f"state:{kind}",), way="kept"), a_structure_is_used_for_ever)
        for kind in STALE
    },
    **{
        f"around: {way}": Fault(
            _trials((3,), "pyro", (f"detour:{way}",)),
            None if way in ("new", "by_index") else tensors_from_elsewhere_are_constants,
        )
        for way in AROUND
    },
    "particles added up": Fault(
        _trials((10,), "pyro", ("whole",), estimator=LOO, particles=2, vectorized=True),
        particles_that_meet_are_not_noticed,
    ),
    "branches added up": Fault(
        _trials((19,), "pyro", ("whole",), estimator="LocalExpectation()", vectorized=True),
        particles_that_meet_are_not_noticed,
    ),
    "printed alike": Fault(_trials((2,), "numpyro", ("opaque",)), what_prints_alike_is_the_same),
    **{
        f"ruled out: {estimator} ({library})": Fault(
            # One shows it in NumPyro, where compiling takes seconds. In Pyro what is NaN is refused besides, and nothing is put back.
            _trials((25,) if library == "numpyro" else (2, 25), library, ("impossible",), estimator=estimator),
            impossible_values_have_a_part if library == "numpyro" else None,
        )
        for library in ("pyro", "numpyro")
        for estimator in ("LocalExpectation()", "MeasureValued()")
    },
    **{
        f"moved support ({library})": Fault(_trials((0, 1), library, ("moved",), way="z"), supports_are_taken_for_fixed)
        for library in ("pyro", "numpyro")
    },
    **{
        f"relaxed, through {way} (numpyro)": Fault(
            _trials((3,), "numpyro", (f"detour:{way}",), estimator="REBAR(0.5, 0.8, learn=False)", way="z"),
            control_flow_is_steered_by_anything,
        )
        for way in ("by_while", "by_switch")
    },
}
"""Every fault by name. Seeds count: a change of what `random_program` draws asks for others."""
