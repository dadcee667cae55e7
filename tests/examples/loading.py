"""The parts of the stories, which live outside of any package, for their tests."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """Return a module of examples/, whose neighbours it may import."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return import_module(name)


def program(name: str, backend: str, data: object, **options: object) -> tuple[ModuleType, dict, tuple]:
    """Return a script of models/, its options with some changed, and its program for a library."""
    script = example("_story").model_script(name)
    options = {**script.OPTIONS, **options}
    return script, options, getattr(script, f"{backend}_program")(options, data, 0)


def loss_and_gradients(
    backend: str, program: tuple, data: np.ndarray, params: dict, known: dict, **options: object
) -> tuple:
    """Return an estimate of the loss and its gradient by parameter, with some latent sites known: the guide does not draw them."""
    model, guide = program
    if backend == "pyro":
        import pyro
        import torch

        from pplgrad.pyro import TraceGrad_ELBO

        pyro.clear_param_store()
        for name, value in params.items():
            pyro.get_param_store()[name] = torch.tensor(value)
        fixed = {name: torch.tensor(value) for name, value in known.items()}
        # Conditioned first, so that what is hidden draws nothing.
        model, guide = pyro.condition(model, fixed), pyro.poutine.block(pyro.condition(guide, fixed), hide=list(known))
        loss = TraceGrad_ELBO(**options).loss_and_grads(model, guide, torch.tensor(data))
        grads = {name: x.grad for name, x in pyro.get_param_store().named_parameters()}
        return loss, {name: np.zeros_like(params[name]) if g is None else g.numpy() for name, g in grads.items()}
    import jax
    import jax.numpy as jnp
    from numpyro import handlers

    from pplgrad.numpyro import TraceGrad_ELBO

    model = handlers.condition(model, data={name: jnp.asarray(value) for name, value in known.items()})
    guide, elbo = handlers.block(guide, hide=list(known)), TraceGrad_ELBO(**options)
    estimate = jax.jit(jax.value_and_grad(lambda p, x: elbo.loss(jax.random.key(0), p, model, guide, x)))
    loss, grads = estimate({name: jnp.asarray(value) for name, value in params.items()}, jnp.asarray(data))
    return float(loss), {name: np.asarray(g) for name, g in grads.items()}
