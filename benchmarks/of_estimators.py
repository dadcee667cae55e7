"""The contestants of single estimators, by names that say all: who runs which estimator how.

`Pyro DisARM()`, `Pyro DisARM() compiled`, `Pyro DisARM(), validation off`, `NumPyro DisARM()`; `PyTorch by hand, DisARM()` and
`JAX by hand, DisARM()` for the six that are written by hand; and the limit, `Pyro Trace_ELBO for DisARM()`: the host's own ELBO with as many
vectorized particles as the estimator's step has evaluations of the program. `default` stands for what a site without a choice gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.contestants import (
    ADAM,
    NUMPYRO,
    PYRO,
    Contestant,
    Ready,
    jitted,
    numpyro_step,
    particles,
)
from benchmarks.works import Arrays, Work, numpyro_program, pyro_program, start

OFF, COMPILED, LIMIT, BY_HAND = ", validation off", " compiled", "Trace_ELBO for ", " by hand, "
ROLES = {
    "Pyro": "Pyro {}",
    "Pyro's limit": f"Pyro {LIMIT}{{}}",
    "Pyro, validation off": f"Pyro {{}}{OFF}",
    "Pyro's limit, validation off": f"Pyro {LIMIT}{{}}{OFF}",
    "Pyro compiled": f"Pyro {{}}{COMPILED}",
    "NumPyro": "NumPyro {}",
    "PyTorch by hand": f"PyTorch{BY_HAND}{{}}",
    "JAX by hand": f"JAX{BY_HAND}{{}}",
}
"""The contestants of an estimator, by what each is for."""


def role(name: str) -> tuple[str, str] | None:
    """Return the estimator of a contestant and what it is for; None for a contestant of no estimator.

    >>> role("Pyro Trace_ELBO for DisARM(), validation off")
    ('DisARM()', "Pyro's limit, validation off")
    """
    for what, form in reversed(ROLES.items()):
        before, after = form.split("{}")
        text = name.removeprefix(before).removesuffix(after)
        if name == form.format(text) and (text == "default" or text.endswith(")")) and LIMIT not in text:
            return text, what
    return None


def cells(texts: dict[str, Work]) -> list[tuple[Work, tuple[str, ...]]]:
    """Return who takes turns on an estimator's work; the hand-written versions where there is one."""
    from benchmarks.by_hand_estimators_jax import BY_HAND as by_hand

    every = [
        tuple(form.format(text) for what, form in ROLES.items() if "hand" not in what or text in by_hand)
        for text in texts
    ]
    return list(zip(texts.values(), every, strict=True))


def contestant(name: str) -> Contestant:
    """Return the contestant of a name."""
    if BY_HAND in name:
        library, text = name.split(BY_HAND)
        made = {
            "PyTorch": (("torch",), _by_hand_torch),
            "JAX": (("jax", "jax.example_libraries.optimizers"), _by_hand_jax),
        }
        imports, build = made[library]
        return Contestant(library, imports, partial(build, text))
    library, text = name.split(" ", 1)
    if library == "NumPyro":
        return Contestant(library, (*NUMPYRO, "pplgrad.numpyro"), partial(_numpyro, text))
    row = _Pyro.of(text)
    return Contestant(library, (*PYRO, "pplgrad.pyro"), row.build)


def _objective(text: str, work: Work) -> dict[str, Any]:
    """Return the objective that an estimator is made for: the bound, or the weighted one of ten samples."""
    from pplgrad import IWAE

    return {"objective": IWAE(), "num_particles": max(10, work.particles)} if text.startswith(("VIMCO", "OVIS")) else {}


def _chosen(config_estimators: Callable, text: str, guide: Callable) -> Callable:
    """Return the guide with an estimator at all of its latents."""
    from pplgrad.lab.specs import specification

    return config_estimators(guide, {} if text == "default" else specification(text).mapping(("z*",)))


@dataclass(frozen=True)
class _Pyro:
    """A step in Pyro: with an estimator, or `limit`: the host's, with as many particles as that has evaluations."""

    text: str
    limit: bool
    compiled: bool
    validated: bool

    @classmethod
    def of(cls, name: str) -> _Pyro:
        text = name.removesuffix(OFF)
        short = text.removesuffix(COMPILED).removeprefix(LIMIT)
        return cls(short, text.startswith(LIMIT), text.endswith(COMPILED), not name.endswith(OFF))

    def build(self, work: Work, data: Arrays, seed: int) -> Ready:
        import pyro
        from pyro.infer import SVI, Trace_ELBO
        from pyro.optim import Adam

        from pplgrad.lab.measure import evaluations
        from pplgrad.pyro import TraceGrad_ELBO, config_estimators

        pyro.enable_validation(self.validated)
        model, plain, args = pyro_program(work, data, seed)
        guide = _chosen(config_estimators, self.text, plain)
        # Vectorized for one particle too, so that the evaluations of a step run as one.
        given = {**particles(work), "vectorize_particles": True, "max_plate_nesting": work.plates}
        elbo: Any = TraceGrad_ELBO(**{**given, **_objective(self.text, work)}, compile=self.compiled)
        count = evaluations(elbo, elbo.describe(model, guide, *args))
        pyro.clear_param_store()
        if self.limit:
            guide, elbo = plain, Trace_ELBO(**{**given, "num_particles": count, "vectorize_particles": count > 1})
        svi = SVI(model, guide, Adam(ADAM), elbo)
        return Ready(lambda: svi.step(*args), note=f"evaluations: {count}")


def _numpyro(text: str, work: Work, data: Arrays, seed: int) -> Ready:
    import jax

    from pplgrad.lab.measure import evaluations
    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    model, guide, args = numpyro_program(work, data, seed)
    guide = _chosen(config_estimators, text, guide)
    elbo = TraceGrad_ELBO(**{"num_particles": work.particles, **_objective(text, work)})
    described = elbo.describe(jax.random.key(seed), start(work, data, seed), model, guide, *args)
    return numpyro_step(model, guide, args, elbo, False, seed, f"evaluations: {evaluations(elbo, described)}")


def _by_hand_torch(text: str, work: Work, data: Arrays, seed: int) -> Ready:
    from benchmarks import by_hand_estimators_torch as by_hand
    from benchmarks.by_hand_torch import tensors

    params = {name: leaf.requires_grad_() for name, leaf in tensors(start(work, data, seed)).items()}
    return Ready(by_hand.eager_step(text, work, params, tensors(data)))


def _by_hand_jax(text: str, work: Work, data: Arrays, seed: int) -> Ready:
    import jax

    from benchmarks import by_hand_estimators_jax as by_hand
    from benchmarks.by_hand_jax import arrays

    begin, step = by_hand.update(text, work)
    return jitted(step, begin(arrays(start(work, data, seed)), jax.random.key(seed)), arrays(data))
