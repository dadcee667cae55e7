"""`training_state` and `load_training_state`: all that a training in Pyro is made of, as one dict that `torch.save` writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import SVI

from pplgrad.core.program import Program
from pplgrad.errors import ConfigurationError, listed
from pplgrad.pyro._compat import constraints, unconstrained
from pplgrad.pyro._elbo import TraceGrad_ELBO
from pplgrad.pyro._resuming import as_before, modules_of, random_state, rehearse, set_random_state
from pplgrad.pyro._reuse.dependency_structure import Uses

_VERSION = 1


def training_state(svi: SVI, modules: Mapping[str, torch.nn.Module] | None = None) -> dict[str, Any]:
    """Return the state of a training: a dict of tensors and plain data, for `torch.save` and `torch.load(..., weights_only=True)`.

    It holds the param store with learned baselines, running averages and what estimators learn; the optimizer's state; the random number
    generators of torch, NumPy and Python; the buffers of modules (statistics of batches); the step of a `Watch`; and how far the program's
    structure was known. It does not hold what the program counts in Python, nor the position in the data.

    Args:
        svi: the `SVI` that trains, with a `TraceGrad_ELBO`.
        modules: further modules by name, such as an encoder that the guide registers by `pyro.module`, whose buffers are kept. Model and
            guide are kept where they are modules. Default: None.

    Returns:
        The state, a copy.

    Raises:
        ConfigurationError: the loss is no `TraceGrad_ELBO`, no step was taken yet, or a site is under `Auto(measure=True)`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> pyro.clear_param_store()
        >>> model = lambda: pyro.sample("z", dist.Bernoulli(0.5))
        >>> guide = lambda: pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
        >>> svi = SVI(model, guide, Adam({"lr": 0.1}), TraceGrad_ELBO(2))
        >>> _ = svi.step()
        >>> sorted(training_state(svi)["params"])
        ['a']
    """
    elbo = _elbo_of(svi, "training_state")
    params = unconstrained()
    if not params:
        raise ConfigurationError("training_state(svi): the param store is empty; take a step before you save.")
    for name, *_ in (key for key, found in elbo._resolved.items() if found.measuring is not None):
        raise ConfigurationError(
            f"training_state(svi): site '{name}' is under Auto(measure=True), whose choice is one of time and would be another one after a "
            "restart; choose once with choose_estimators(...), and give config_estimators what it has chosen."
        )
    watcher = elbo._watcher
    known = _modules(elbo, Program(svi.model, svi.guide, (), {}), modules)
    return {
        "version": _VERSION,
        "params": {name: leaf.detach().clone() for name, leaf in params.items()},
        "constraints": {name: type(found).__name__ for name, found in constraints().items()},
        "optimizer": copy.deepcopy(svi.optim.get_state()),
        "random": random_state(),
        "buffers": {name: {k: x.detach().clone() for k, x in m.named_buffers()} for name, m in known.items()},
        "watched_steps": None if watcher is None else watcher.steps,
        **elbo._known_so_far(svi.model, svi.guide),
    }


def load_training_state(
    svi: SVI,
    state: Mapping[str, Any],
    *args: Any,
    modules: Mapping[str, torch.nn.Module] | None = None,
    **kwargs: Any,
) -> None:
    """Let a new `SVI` go on where `training_state` was taken: its losses are those of the uninterrupted training, bit for bit.

    The program is run a few times at the arguments given, which creates its parameters and finds its structure (or compiles it) anew; then
    everything is put to the state. What the program counts in Python counts these runs too: set such counters afterwards. Bits are the
    same on the same machine with the same versions and number of threads.

    Args:
        svi: an `SVI` made like the one that was saved.
        state: what `training_state` returned.
        args: positional arguments of a step, such as the next batch.
        modules: the modules that `training_state` was given. Default: None.
        kwargs: keyword arguments of a step.

    Raises:
        ConfigurationError: the loss is no `TraceGrad_ELBO`, or the state is of another program: its parameters have other names, shapes
            or constraints. The message names the parameter.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> pyro.clear_param_store()
        >>> model = lambda: pyro.sample("z", dist.Bernoulli(0.5))
        >>> guide = lambda: pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
        >>> make = lambda: SVI(model, guide, Adam({"lr": 0.1}), TraceGrad_ELBO(2))
        >>> svi = make()
        >>> _ = svi.step()
        >>> state, wanted = training_state(svi), [svi.step(), svi.step()]
        >>> pyro.clear_param_store()
        >>> again = make()
        >>> load_training_state(again, state)
        >>> [again.step(), again.step()] == wanted
        True
    """
    elbo = _elbo_of(svi, "load_training_state")
    if not isinstance(state, Mapping) or state.get("version") != _VERSION:
        raise ConfigurationError(
            "load_training_state(svi, state): the state is not one that training_state(svi) returned."
        )
    program, settings = Program(svi.model, svi.guide, args, kwargs), elbo._settings()
    elbo._resume(svi.model, svi.guide, state)
    uses = elbo._structures.waiting(program, settings)
    with as_before(elbo, program, False):
        rehearse(elbo, elbo.loss_and_grads, program, settings, uses or Uses())
    if uses is None:
        # Steps of this kind were not taken before: the next one is the first.
        elbo._structures.forget(program, settings)
    _check_params(state)
    with torch.no_grad():
        for name, leaf in unconstrained().items():
            leaf.copy_(state["params"][name])
        for name, module in _modules(elbo, program, modules).items():
            _load_buffers(name, module, state["buffers"].get(name, {}))
    svi.optim.optim_objs.clear()
    svi.optim.grad_clip.clear()
    svi.optim.set_state(copy.deepcopy(state["optimizer"]))
    if elbo._watcher is not None and state["watched_steps"] is not None:
        elbo._watcher.steps = state["watched_steps"]
    set_random_state(state["random"])


def _elbo_of(svi: SVI, function: str) -> TraceGrad_ELBO:
    elbo = getattr(svi.loss, "__self__", None)
    if not isinstance(elbo, TraceGrad_ELBO):
        raise ConfigurationError(f"{function}(svi): the loss of svi is no TraceGrad_ELBO; give SVI one as loss=....")
    return elbo


def _modules(
    elbo: TraceGrad_ELBO, program: Program, more: Mapping[str, torch.nn.Module] | None
) -> dict[str, torch.nn.Module]:
    return {**modules_of(elbo, program), **{f"modules {name}": x for name, x in (more or {}).items()}}


def _check_params(state: Mapping[str, Any]) -> None:
    """Refuse a state of another program than the one that has registered the parameters in the store."""
    now, saved = unconstrained(), state["params"]
    missing = [name for name in saved if name not in now]
    if missing:
        raise ConfigurationError(
            f"load_training_state(svi, state, ...): the saved training has {listed(missing)}, which a step at these arguments does not "
            "register; run svi.evaluate_loss(...) before, at arguments at which the program registers it."
        )
    added = [name for name in now if name not in saved]
    if added:
        raise ConfigurationError(
            f"load_training_state(svi, state, ...): the program registers {listed(added)}, which the saved training does not have; it is "
            "another program, or one with other estimators. Call pyro.clear_param_store() first, and make model, guide and ELBO as they were."
        )
    kinds = {name: type(found).__name__ for name, found in constraints().items()}
    for name, leaf in now.items():
        if leaf.shape != saved[name].shape or kinds[name] != state["constraints"][name]:
            raise ConfigurationError(
                f"load_training_state(svi, state, ...): parameter '{name}' has shape {tuple(leaf.shape)} and constraint {kinds[name]} now, "
                f"and had shape {tuple(saved[name].shape)} and constraint {state['constraints'][name]}; make the program as it was."
            )


def _load_buffers(name: str, module: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    known = dict(module.named_buffers())
    if known.keys() != saved.keys():
        raise ConfigurationError(
            f"load_training_state(svi, state, ...): the buffers of {name} are {listed(known)} now, and were {listed(saved)}; give both "
            "functions the same modules=..., made as they were."
        )
    for key, x in known.items():
        x.copy_(saved[key])
