"""The contestants of single estimators, by names that say all: who runs which estimator how.

`Pyro DisARM()`, `Pyro DisARM() compiled`, `Pyro DisARM(), validation off`, `NumPyro DisARM()`; `PyTorch by hand, DisARM()` and
`JAX by hand, DisARM()` for the six that are written by hand; and the limit, `Pyro Trace_ELBO for DisARM()`: the host's own ELBO with as many
vectorized particles as the estimator's step has evaluations of the program. `default` stands for what a site without a choice gets: an
average and a network; `Pyro Trace_ELBO with a network for default` is the host's step that trains the same network beside it.
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
JOINT, NETWORK = ", joint optimizer", "Trace_ELBO with a network for "
ROLES = {
    "Pyro": "Pyro {}",
    "Pyro's limit": f"Pyro {LIMIT}{{}}",
    "Pyro, validation off": f"Pyro {{}}{OFF}",
    "Pyro's limit, validation off": f"Pyro {LIMIT}{{}}{OFF}",
    "Pyro's limit with a network": f"Pyro {NETWORK}{{}}",
    "Pyro's limit with a network, validation off": f"Pyro {NETWORK}{{}}{OFF}",
    "Pyro compiled": f"Pyro {{}}{COMPILED}",
    "Pyro compiled, joint optimizer": f"Pyro {{}}{COMPILED}{JOINT}",
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
        plain = LIMIT not in text and NETWORK not in text
        if name == form.format(text) and (text == "default" or text.endswith(")")) and plain:
            return text, what
    return None


def cells(texts: dict[str, Work]) -> list[tuple[Work, tuple[str, ...]]]:
    """Return who takes turns on an estimator's work; the hand-written versions where there is one."""
    from benchmarks.by_hand_estimators_jax import BY_HAND as by_hand

    def takes_part(what: str, text: str) -> bool:
        return (text in by_hand) if "hand" in what else (text == "default" or "network" not in what)

    every = [tuple(form.format(text) for what, form in ROLES.items() if takes_part(what, text)) for text in texts]
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
    """A step in Pyro: with an estimator, or `limit`: the host's, with as many particles as that has evaluations.

    With `network` the host's step trains the default baseline's network too.
    """

    text: str
    limit: bool
    network: bool
    compiled: bool
    joint: bool
    validated: bool

    @classmethod
    def of(cls, name: str) -> _Pyro:
        text = name.removesuffix(OFF)
        alone = text.removesuffix(JOINT)
        short = alone.removesuffix(COMPILED).removeprefix(LIMIT).removeprefix(NETWORK)
        network = text.startswith(NETWORK)
        limit = network or text.startswith(LIMIT)
        return cls(short, limit, network, alone.endswith(COMPILED), text.endswith(JOINT), not name.endswith(OFF))

    def build(self, work: Work, data: Arrays, seed: int) -> Ready:
        import pyro
        from pyro.infer import SVI, Trace_ELBO
        from pyro.optim import Adam

        from pplgrad.lab.measure import evaluations
        from pplgrad.pyro import TraceGrad_ELBO, config_estimators, joint_optimizer

        pyro.enable_validation(self.validated)
        model, plain, args = pyro_program(work, data, seed)
        guide = _chosen(config_estimators, self.text, plain)
        # Vectorized for one particle too, so that the evaluations of a step run as one.
        given = {**particles(work), "vectorize_particles": True, "max_plate_nesting": work.plates}
        elbo: Any = TraceGrad_ELBO(**{**given, **_objective(self.text, work)}, compile=self.compiled)
        count = evaluations(elbo, elbo.describe(model, guide, *args))
        pyro.clear_param_store()
        if self.limit:
            kind = _with_a_network(Trace_ELBO) if self.network else Trace_ELBO
            guide, elbo = plain, kind(**{**given, "num_particles": count, "vectorize_particles": count > 1})
        adam = Adam(ADAM)
        svi = SVI(model, guide, joint_optimizer(adam) if self.joint else adam, elbo)
        return Ready(lambda: svi.step(*args), note=f"evaluations: {count}")


def _with_a_network(kind: Any) -> Any:
    """Return a host's ELBO whose step also trains a network of the default baseline's size, on the same inputs.

    It shows what such a network costs at least. What the network predicts is not subtracted: the host has no place for it.
    """
    import pyro
    import torch

    class WithNetwork(kind):  # type: ignore[misc]
        network: torch.nn.Module | None = None

        def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
            if self.network is None:
                layers = torch.nn.Linear(args[0].shape[-1], 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
                self.network = torch.nn.Sequential(*layers).to(args[0].dtype)
            predicted = pyro.module("network", self.network)(args[0])[..., 0]
            ((1.0 - predicted) ** 2).sum().backward()
            return super().loss_and_grads(model, guide, *args, **kwargs)

    return WithNetwork


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
