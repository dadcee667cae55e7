"""Who is measured: for each contestant, what it imports and how it makes a step of a work.

Wherever an estimator is chosen it is the plain score function without a baseline, since the hosts' ELBOs have none. A step is
`SVI.step` or a jitted `SVI.update`, with Adam; hand-written versions take the same optimizer's step. "gradient only" is the
jitted loss and its gradient, of parameters and a key (with a key in numbers XLA draws while it compiles).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.works import Arrays, Work, numpyro_program, pyro_program, start

RATE = 1e-6
ADAM = {"lr": RATE, "fused": True}  # The hand-written step's too.
"""Adam's rate: small, so that all steps are of one program at one place."""


class Skip(Exception):
    """A contestant cannot take part, for the reason given."""


@dataclass
class Ready:
    """A contestant before its first step: `step` takes one; `trace_s` and `compile_s` are the seconds that each attempt took."""

    step: Callable[[], Any]
    trace_s: list[float] = field(default_factory=list)
    compile_s: list[float] = field(default_factory=list)
    note: str = ""


Build = Callable[[Work, Arrays, int], Ready]


@dataclass(frozen=True)
class Contestant:
    """One row of a table: the library that runs it, what it imports, and how its step is made."""

    library: str
    imports: tuple[str, ...]
    build: Build


PYRO = ("torch", "pyro", "pyro.infer", "pyro.optim")
NUMPYRO = ("jax", "numpyro", "numpyro.infer", "numpyro.optim")
JAX = ("jax", "jax.example_libraries.optimizers")


def contestant(name: str) -> Contestant:
    """Return a contestant by its name; `Pyro DisARM()` is `TraceGrad_ELBO` with that estimator at every site (`of_estimators.py`).

    `NumPyro TraceGrad_ELBO without scan fission` has a pass of its compiler turned off (`passes.py`).
    """
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    if " without " in name:
        from benchmarks.passes import ablated

        return ablated(name)
    from benchmarks import of_estimators

    return of_estimators.contestant(name)


def _pyro(name: str, work: Work, data: Arrays, seed: int) -> Ready:
    import pyro.infer
    from pyro.infer import SVI, config_enumerate
    from pyro.optim import Adam

    model, guide, args = pyro_program(work, data, seed)
    guide = config_enumerate(guide, "parallel") if name == "TraceEnum_ELBO" else guide
    given: dict[str, Any] = {"ignore_jit_warnings": True} if name.startswith("Jit") else {}
    svi = SVI(model, guide, Adam(ADAM), getattr(pyro.infer, name)(**particles(work, name), **given))
    return Ready(lambda: svi.step(*args), note=_enumeration(work) if name == "TraceEnum_ELBO" else "")


def _enumeration(work: Work) -> str:
    """Return what TraceEnum_ELBO does: it leaves sites that are vectors to the score function."""
    return "score function: a vector is not enumerated" if work.kind == "sbn" else "exact, by enumeration"


def particles(work: Work, name: str = "") -> dict[str, Any]:
    if work.particles == 1 and name != "TraceEnum_ELBO":
        return {}
    return {
        "num_particles": work.particles,
        "vectorize_particles": work.particles > 1,
        "max_plate_nesting": work.plates,
    }


def _pyro_pplgrad(compiled: bool, joint: bool, work: Work, data: Arrays, seed: int) -> Ready:
    from pyro.infer import SVI
    from pyro.optim import Adam

    from pplgrad import ScoreFunction
    from pplgrad.pyro import TraceGrad_ELBO, joint_optimizer

    model, guide, args = pyro_program(work, data, seed)
    given: dict[str, Any] = {"compile": True} if compiled else {}
    elbo = TraceGrad_ELBO(**particles(work), estimators={"*": ScoreFunction()}, **given)
    svi = SVI(model, guide, joint_optimizer(Adam(ADAM)) if joint else Adam(ADAM), elbo)
    return Ready(lambda: svi.step(*args))


def _by_hand_torch(compiled: bool, work: Work, data: Arrays, seed: int) -> Ready:
    from benchmarks import by_hand_torch as by_hand

    params = by_hand.tensors(start(work, data, seed))
    for leaf in params.values():
        leaf.requires_grad_()
    make = by_hand.compiled_step if compiled else by_hand.eager_step
    return Ready(make(work, params, by_hand.tensors(data)))


def _storchastic(work: Work, data: Arrays, seed: int) -> Ready:
    from benchmarks import in_storchastic

    return Ready(in_storchastic.step(work, data, seed))


def _by_hand_jax(gradient: bool, work: Work, data: Arrays, seed: int, keys: str = "one") -> Ready:
    import jax

    from benchmarks import by_hand_jax as by_hand

    if keys != "one":
        _refuse_one_key(work)
    params, arrays, key = by_hand.arrays(start(work, data, seed)), by_hand.arrays(data), jax.random.key(seed)
    if gradient:
        return jitted(
            lambda state, data: (state, by_hand.gradient_and_loss(work, state[0], data, state[1])),
            (params, key),
            arrays,
        )
    begin, step = by_hand.update(work, None if keys == "one" else by_hand.with_keys(work, keys))
    return jitted(step, begin(params, key), arrays)


def _refuse_one_key(work: Work) -> None:
    if work.kind not in ("chain", "scan"):
        raise Skip("a belief network and a plate draw all numbers of a site with one key")


def _numpyro(name: str, gradient: bool, work: Work, data: Arrays, seed: int, independent: bool = False) -> Ready:
    import numpyro.infer

    model, guide, args = numpyro_program(work, data, seed)
    if independent:
        from pplgrad.numpyro import independent_keys

        _refuse_one_key(work)
        model, guide = independent_keys(model), independent_keys(guide)
    if name == "TraceGrad_ELBO":
        from pplgrad import ScoreFunction
        from pplgrad.numpyro import TraceGrad_ELBO

        elbo: Any = TraceGrad_ELBO(work.particles, estimators={"*": ScoreFunction()})
    else:
        given: dict[str, Any] = {}
        if name == "TraceEnum_ELBO":
            guide, given = _enumerated(guide), {"max_plate_nesting": work.plates}
        elbo = getattr(numpyro.infer, name)(work.particles, **given)
        # Trace_ELBO has no gradient for discrete sites: it is here for its time.
        elbo.can_infer_discrete = True
    note = {"Trace_ELBO": "no gradient for discrete sites", "TraceEnum_ELBO": _enumeration(work)}.get(name, "")
    if work.kind == "scan" and name in ("TraceGraph_ELBO", "TraceEnum_ELBO"):
        note = "wrong inside scan"  # Its gradient there; and a loss of 1.23 nats on three steps, where 3.33 is exact.
    return numpyro_step(model, guide, args, elbo, gradient, seed, note)


def _enumerated(guide: Callable) -> Callable:
    try:
        import funsor
        from numpyro.contrib.funsor import config_enumerate
    except ImportError:
        raise Skip("funsor is not installed") from None
    funsor.set_backend("jax")  # One for the whole process, which another contestant may have taken for torch.
    return config_enumerate(guide, "parallel")


def numpyro_step(
    model: Callable, guide: Callable, args: tuple, elbo: Any, gradient: bool, seed: int, note: str
) -> Ready:
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    svi = SVI(model, guide, Adam(RATE), elbo)
    state = svi.init(jax.random.key(seed), *args)
    if not gradient:
        return jitted(svi.update, state, *args, note=note)

    def loss_and_gradient(state: Any, *args: Any) -> tuple[Any, Any]:
        params, key = state
        return state, jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, *args))(params)

    return jitted(loss_and_gradient, (svi.get_params(state), state.rng_key), *args, note=note)


REPEATED_BELOW_S = 3.0
"""Compiling is timed three times where it takes less than this."""


def jitted(step: Callable, state: Any, *args: Any, note: str = "") -> Ready:
    """Return a compiled step of the form (state, *args) -> (state, anything), with the times of tracing and of compiling it."""
    import jax

    ready, states = Ready(lambda: None, note=note), [state]
    compiled: Any = None
    while compiled is None or (len(ready.trace_s) < 3 and ready.trace_s[0] + ready.compile_s[0] < REPEATED_BELOW_S):
        jax.clear_caches()
        began = time.perf_counter()
        lowered = jax.jit(lambda state, *args: step(state, *args)).lower(state, *args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        ready.trace_s.append(traced - began)
        ready.compile_s.append(time.perf_counter() - traced)

    def once() -> None:
        states[0], found = compiled(states[0], *args)
        jax.block_until_ready(found)

    ready.step = once
    return ready


def _pplgrad(library: str, build: Build) -> Contestant:
    imports = (*PYRO, "pplgrad.pyro") if library == "Pyro" else (*NUMPYRO, "pplgrad.numpyro")
    return Contestant(library, imports, build)


CONTESTANTS: dict[str, Contestant] = {
    **{
        f"Pyro {name}": Contestant("Pyro", PYRO, partial(_pyro, name))
        for name in ("Trace_ELBO", "TraceGraph_ELBO", "JitTraceGraph_ELBO", "TraceEnum_ELBO")
    },
    "Pyro TraceGrad_ELBO": _pplgrad("Pyro", partial(_pyro_pplgrad, False, False)),
    "Pyro TraceGrad_ELBO compiled": _pplgrad("Pyro", partial(_pyro_pplgrad, True, False)),
    "Pyro TraceGrad_ELBO compiled, joint optimizer": _pplgrad("Pyro", partial(_pyro_pplgrad, True, True)),
    "PyTorch by hand": Contestant("PyTorch", ("torch",), partial(_by_hand_torch, False)),
    "PyTorch by hand compiled": Contestant("PyTorch", ("torch",), partial(_by_hand_torch, True)),
    "Storchastic": Contestant("Storchastic", ("torch", "storch"), _storchastic),
    **{
        f"NumPyro {name}": Contestant("NumPyro", NUMPYRO, partial(_numpyro, name, False))
        for name in ("Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO")
    },
    "NumPyro TraceGrad_ELBO": _pplgrad("NumPyro", partial(_numpyro, "TraceGrad_ELBO", False)),
    "JAX by hand": Contestant("JAX", JAX, partial(_by_hand_jax, False)),
    "JAX by hand, the host's keys": Contestant("JAX", JAX, partial(_by_hand_jax, False, keys="host")),
    "NumPyro TraceGrad_ELBO, independent keys": _pplgrad(
        "NumPyro", partial(_numpyro, "TraceGrad_ELBO", False, independent=True)
    ),
    "JAX by hand, independent keys": Contestant("JAX", JAX, partial(_by_hand_jax, False, keys="independent")),
    **{
        f"NumPyro {name} gradient only": Contestant("NumPyro", NUMPYRO, partial(_numpyro, name, True))
        for name in ("Trace_ELBO", "TraceGraph_ELBO")
    },
    "NumPyro TraceGrad_ELBO gradient only": _pplgrad("NumPyro", partial(_numpyro, "TraceGrad_ELBO", True)),
    "JAX by hand gradient only": Contestant("JAX", ("jax",), partial(_by_hand_jax, True)),
}
"""All contestants of a work by name, in the order of the tables."""
