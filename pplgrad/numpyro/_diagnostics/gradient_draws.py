"""Draws of a gradient at fixed parameters, for the measurement and comparison of estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.optim import SGD, Adam

from pplgrad.configuration import unwatched
from pplgrad.core.objectives import CostWeights, Objective
from pplgrad.diagnostics.checking import NO_PARAMETERS, RARE, UNITS, TooManyOutcomes
from pplgrad.errors import ProgramError
from pplgrad.numpyro._baselines import is_baseline_param
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS
from pplgrad.numpyro._distributions import finite_parts
from pplgrad.numpyro._optim import split_optimizer
from pplgrad.numpyro._rerun.enumeration import (
    Program,
    exact_gradient,
    latents,
    log_densities,
    log_q_and_objective,
    run_traces,
    subsamples,
)

_LOOKS = 8
"""Runs from which the parameters that each site reads are known."""
_CHUNK = 250
_NUMBERS = 4_000_000
"""Draws that one compiled call makes, and the numbers that it may return."""


class Gradients:
    """Draws of an ELBO's gradient at given parameters, as flat vectors.

    Each draw is g = (∂L/∂θ_1, ..., ∂L/∂θ_n), one estimate of the gradient of the loss L (the negative objective, in nats) with respect to
    the unconstrained parameters θ, all of them in one vector. `blocks` maps each parameter's name to its coordinates in g. `sites` maps
    each latent site to the coordinates of the parameters that its density reads.

    Args:
        program: the `Program`: model, guide and their arguments.
        params: the parameters, such as `svi.get_params(state)`. Default: None, those that the program starts with.
        seed: seed of the run that initialises the program. Default: 0.

    Shapes:
        Draws have shape (draws, parameters). The gradient is in nats per unit of the unconstrained parameters.

    Raises:
        ProgramError: the program has no parameters.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist
        >>> from pplgrad.core.program import Program
        >>> from pplgrad.numpyro import TraceGrad_ELBO
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
        >>> gradients = Gradients(Program(model, guide, (), {}))
        >>> np.concatenate(list(gradients.draws(TraceGrad_ELBO())(10, 0))).shape
        (10, 1)
        >>> list(gradients.blocks), list(gradients.sites())
        (['a'], ['z'])
    """

    def __init__(
        self,
        program: Program,
        params: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.program = program
        # `init` does not run the loss, and this one lets discrete sites pass.
        svi = SVI(program.model, program.guide, Adam(1e-3), TraceGraph_ELBO())
        start = None if params is None else dict(params)
        state = svi.init(jax.random.key(seed), *program.args, init_params=start, **program.kwargs)
        self.constrain = svi.constrain_fn
        everything = svi.optim.get_params(state.optim_state)
        self.params = {name: x for name, x in everything.items() if not is_baseline_param(name)}
        if not self.params:
            raise ProgramError(NO_PARAMETERS)
        self.learned = {name: x for name, x in everything.items() if is_baseline_param(name)}
        self.mutable = state.mutable_state or {}
        self._made: dict[tuple[int, int], tuple[Compiled, Any]] = {}

    @property
    def blocks(self) -> dict[str, np.ndarray]:
        """The coordinates of each parameter in the flat vector."""
        result, start = {}, 0
        for name, tree in self.params.items():
            size = sum(int(np.size(x)) for x in jax.tree.leaves(tree))
            result[name] = np.arange(start, start + size)
            start += size
        return result

    @property
    def rounding(self) -> float:
        """The part of the gradient's norm that may be rounding error."""
        leaves = [x for x in jax.tree.leaves(self.params) if jnp.issubdtype(x.dtype, jnp.floating)]
        return max((float(jnp.finfo(x.dtype).eps) for x in leaves), default=1e-16) ** 0.5

    def flat(self, gradient: dict) -> jax.Array:
        """Return a gradient as one vector."""
        leaves = [jnp.ravel(x) for name in self.params for x in jax.tree.leaves(gradient[name])]
        return jnp.concatenate(leaves) if leaves else jnp.zeros(0)

    @property
    def state(self) -> tuple[dict, dict, dict]:
        """The state at which the gradient is taken: parameters, what estimators have learned, and mutable state."""
        return self.params, self.learned, self.mutable

    @cached_property
    def _densities_jacobian(self) -> Callable:
        """The Jacobian of each latent site's log density in the parameters, compiled once for all parameters."""

        def densities(params: dict, state: tuple, key: jax.Array) -> dict[str, jax.Array]:
            known = self._known(params, state)
            drawn, _ = run_traces(self.program, jax.lax.stop_gradient(known), key, {})
            values = {name: site["value"] for name, site in {**latents(drawn), **subsamples(drawn)}.items()}
            again, _ = run_traces(self.program, known, key, jax.lax.stop_gradient(values))
            return {name: unmasked(s["fn"]).log_prob(s["value"]).sum() for name, s in latents(again).items()}

        return self._compiled_or_not(jax.jacrev(densities))

    def sites(self) -> dict[str, np.ndarray]:
        """Return, for each latent site of the guide, the coordinates of the parameters that its density reads."""
        found: dict[str, np.ndarray] = {}
        for key in jax.random.split(jax.random.key(0), _LOOKS):
            for name, gradient in self._densities_jacobian(self.params, self.state, key).items():
                read = np.asarray(self.flat(gradient)) != 0
                found[name] = found.get(name, np.zeros(len(read), bool)) | read
        return {name: np.flatnonzero(read) for name, read in found.items()}

    def _compiled_or_not(self, f: Callable) -> Callable:
        compiled = jax.jit(f)

        def run(*args: Any) -> Any:
            try:
                return compiled(*args)
            except TRACING_ERRORS:
                return f(*args)

        return run

    def _known(self, params: dict, state: tuple[dict, dict, dict] | None = None) -> dict:
        _, learned, mutable = self.state if state is None else state
        return {**self.constrain({**params, **learned}), **mutable}

    def gradient_of(self, elbo: Any) -> Callable[[tuple, jax.Array], jax.Array]:
        """Return the function from this state and a key to one draw of an ELBO's gradient."""
        model, guide, args, kwargs = self.program

        def draw(state: tuple[dict, dict, dict], key: jax.Array) -> jax.Array:
            def loss(params: dict) -> jax.Array:
                with unwatched():
                    return elbo.loss(key, self._known(params, state), model, guide, *args, **kwargs)

            return self.flat(jax.grad(loss)(state[0]))

        return draw

    def draws(self, elbo: Any, chunk: int = _CHUNK) -> Callable[[int, int], Iterator[np.ndarray]]:
        """Return a function from a number of draws and a seed to draws of an ELBO's gradient.

        It is compiled once, where the program can be traced.

        Args:
            elbo: an ELBO of NumPyro.
            chunk: maximal number of draws in one compiled call. Default: 250.

        Returns:
            A function of (count, seed) that yields arrays of shape (draws, parameters), `count` draws together.
        """
        if (id(elbo), chunk) not in self._made:
            # The ELBO is kept, so that no other one takes its place under the same number.
            self._made[id(elbo), chunk] = Compiled(self, self.gradient_of(elbo), chunk), elbo
        return self._made[id(elbo), chunk][0].chunks

    def peak_bytes(self, elbo: Any, chunk: int = _CHUNK) -> int:
        """Return the peak memory, in bytes, of the gradient without parameters and data, as planned by the compiler."""
        self.draws(elbo, chunk)
        return self._made[id(elbo), chunk][0].peak_bytes

    def warm_up(self, elbo: Any, steps: int, learning_rate: float = 1e-2) -> None:
        """Run training steps that hold the program's parameters, so that the estimator learns what it learns."""
        model, guide, args, kwargs = self.program
        svi = SVI(model, guide, split_optimizer(SGD(0.0), Adam(learning_rate)), elbo)
        state = svi.init(jax.random.key(0), *args, init_params=self.constrain(self.params), **kwargs)
        with unwatched():
            state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s, *args, **kwargs), s, None, steps))(
                state
            )
        everything = svi.optim.get_params(state.optim_state)
        self.learned = {name: x for name, x in everything.items() if is_baseline_param(name)}
        self.mutable = state.mutable_state or {}

    def _drawn(self, known: dict, key: jax.Array) -> dict[str, jax.Array]:
        """Return what guide and model draw."""
        drawn, run = run_traces(self.program, known, key, {})
        chosen = {**latents(drawn), **subsamples(drawn), **subsamples(run)}
        return {name: jax.lax.stop_gradient(site["value"]) for name, site in chosen.items()}

    def unseen_error(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each coordinate, what a mean of so many draws may be off by without a trace in their variance.

        The first part is rounding of the numbers that cancel in a draw: |∇ Σ log q| Σ|log density|, over the sites without a reparameterized
        sampler, plus |∇ Σ log density|. The second is values of probability p that no draw may have met: |∇ Σ p log q| times the objective.
        """
        units = UNITS * self.rounding**2

        def draw(state: tuple, key: jax.Array) -> jax.Array:
            def sums(params: dict) -> tuple[jax.Array, ...]:
                known = self._known(params, state)
                values = self._drawn(known, key)
                _, mine, others, drawn = log_densities(self.program, known, values, CostWeights(1.0, 1.0, 1.0))
                sites = [site for site in latents(drawn).values() if not site["fn"].has_rsample]
                scores = [unmasked(site["fn"]).log_prob(site["value"]).sum() for site in sites]
                rare = [_of_rare_values(unmasked(site["fn"]), RARE / draws) for site in sites]
                zero = jnp.zeros(())
                costs = [sum((x.sum() for x in part.values()), start=zero) for part in (others, mine)]
                fixed = [jax.lax.stop_gradient(x.sum()) for x in (*others.values(), *mine.values())]
                size, whole = sum(map(jnp.abs, fixed)), jnp.abs(jax.lax.stop_gradient(costs[0] - costs[1]))
                rounding = units * size * sum(scores, start=zero), units * (costs[0] + costs[1])
                return *rounding, whole * sum(rare, start=zero)

            slopes = [self.flat(jax.grad(lambda params, i=i: sums(params)[i])(state[0])) for i in range(3)]
            return jnp.stack([jnp.abs(slopes[0]) + jnp.abs(slopes[1]), jnp.abs(slopes[2])])

        rounding, rare = np.concatenate(list(Compiled(self, draw).chunks(_LOOKS, 0))).mean(0)
        return rounding, rare

    def whole_score(self, objective: Objective, particles: int = 4) -> Callable[[int, int], Iterator[np.ndarray]]:
        """Return draws of a plain unbiased gradient, which shares no code with the estimators.

        It is the score of the joint log density of all latent sites, times the whole objective minus the mean over the other particles.
        """

        def draw(state: tuple, key: jax.Array) -> jax.Array:
            def one(params: dict, key: jax.Array) -> tuple[jax.Array, jax.Array]:
                known = self._known(params, state)
                return log_q_and_objective(self.program, known, self._drawn(known, key), objective)

            def loss(params: dict) -> jax.Array:
                log_q, value = jax.vmap(one, (None, 0))(params, jax.random.split(key, particles))
                fixed = jax.lax.stop_gradient(value)
                signal = (fixed * particles - fixed.sum()) / (particles - 1)
                return -(log_q * signal + value).mean()

            return self.flat(jax.grad(loss)(state[0]))

        return Compiled(self, draw).chunks

    def exact_gradient(self, objective: Objective, particles: int, limit: int) -> np.ndarray:
        """Return the gradient of the enumerated loss, or raise `TooManyOutcomes`."""
        try:
            found = exact_gradient(self.program, self._known, self.params, objective, particles, limit)
        except TRACING_ERRORS:
            raise TooManyOutcomes(
                "its Python control flow depends on a value, so that outcomes cannot be mapped"
            ) from None
        return np.asarray(self.flat(found), np.float64)


def _of_rare_values(fn: Any, most: float) -> jax.Array:
    """Return Σ p log p over the values of a site whose probability is below `most`; its gradient takes the first p for a constant."""
    parts = finite_parts(fn)
    if parts is None:
        return jnp.zeros(())
    base, support = parts
    shape = (len(support), *(1 for _ in base.batch_shape), *base.event_shape)
    log_p = base.log_prob(support.reshape(shape))
    p = jax.lax.stop_gradient(jnp.exp(log_p))
    # A value of probability 0 is never drawn.
    chosen = (p > 0) & (p < most)
    return jnp.where(chosen, p * jnp.where(chosen, log_p, 0.0), 0.0).sum()


class Compiled:
    """Draws from a function of the state and a key, several in a call; one by one where the program cannot be traced."""

    def __init__(self, host: Gradients, draw: Callable[[tuple, jax.Array], jax.Array], chunk: int = _CHUNK) -> None:
        self._host, self._draw = host, draw
        size = sum(len(indices) for indices in host.blocks.values())
        self._length = max(1, min(chunk, _NUMBERS // max(size, 1)))
        self._compiled: Any = None
        self._keys = 0
        self.peak_bytes = 0

    def chunks(self, count: int, seed: int) -> Iterator[np.ndarray]:
        """Yield draws at the host's state, in pieces."""
        keys = jax.random.split(jax.random.key(seed), count)
        length = min(self._length, count)
        for start in range(0, count, length):
            mine = keys[start : start + length]
            # A last piece of another length would be compiled again.
            padded = jnp.concatenate([mine, keys[: length - len(mine)]]) if len(mine) < length else mine
            run = self._made(padded)
            if run is None:
                yield np.stack([np.asarray(self._draw(self._host.state, key)) for key in mine])
            else:
                yield np.asarray(run(self._host.state, padded))[: len(mine)]

    def _made(self, keys: jax.Array) -> Any:
        if self._keys != len(keys):
            self._keys = len(keys)
            try:
                mapped = jax.jit(lambda state, keys: jax.lax.map(lambda key: self._draw(state, key), keys))
                self._compiled = mapped.lower(self._host.state, keys).compile()
            except TRACING_ERRORS:
                self._compiled = None
                return None
            plan = self._compiled.memory_analysis()
            self.peak_bytes = int(plan.temp_size_in_bytes) if plan is not None else 0
        return self._compiled
