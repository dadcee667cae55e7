"""`TraceGrad_ELBO` for NumPyro."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from numpyro.handlers import seed, trace
from numpyro.infer import Trace_ELBO

from pplgrad.configuration import (
    EstimatorMapping,
    Resolved,
    watcher_of,
)
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import ELBO, MultiSample, Objective, ReweightedWakeSleep
from pplgrad.core.plates import Read
from pplgrad.core.program import Program
from pplgrad.engine.checks import (
    checked_objective,
    checked_parallel,
)
from pplgrad.engine.closed_forms import ClosedForms
from pplgrad.engine.description import Description, ShowsSettings, describe
from pplgrad.engine.filter_checks import refuse_options
from pplgrad.engine.records import Record
from pplgrad.engine.surrogate import Estimate, estimate
from pplgrad.errors import ConfigurationError, EstimatorError
from pplgrad.numpyro._array_ops import OPS, JaxOps, ours
from pplgrad.numpyro._compat_jax import is_tracing, reused
from pplgrad.numpyro._diagnostics.measuring import described, measured
from pplgrad.numpyro._evaluation import (
    as_jax,
    by_site,
    checked_sharding,
    laid_out,
    new_state,
    refuse_devices_alone,
    refuse_impossible,
    with_gradient,
)
from pplgrad.numpyro._filter import Filtered, filtered_loss
from pplgrad.numpyro._rerun.monitoring import STEPS, counted, monitor
from pplgrad.numpyro._rerun.wake_sleep import sleep_phase
from pplgrad.numpyro._running import Runner
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace
from pplgrad.numpyro._tracing.proposals import log_normalizer

if TYPE_CHECKING:
    from pplgrad.diagnostics.choosing import Choice


class TraceGrad_ELBO(ShowsSettings, Runner, Trace_ELBO):
    r"""The evidence lower bound (ELBO), with a gradient estimator for each latent site of the guide.

    Estimates ∇ E_q[Σ log p − Σ log q], in nats. A cost is a log density, scaled and masked. Each cost is part of the downstream
    cost of the sites that it depends on, which provenance tracking finds. The score of a site is neither scaled nor masked. Costs are
    reduced to the site's plates, and inside `scan` to the site's step and the steps after it.

    With several particles, a user's own mutable state is the state that the first particle leaves. With `sum_sites=False`, each site's
    entry has the gradient of its own part of the objective, estimated without baselines.

    Args:
        vectorize_particles: True (the default) maps particles by `vmap`, False by `lax.map`. A function of (f, keys) maps them itself.
        estimators: mapping from site names and glob patterns to estimators. It overrides the guide's `infer` and wrappers.
        objective: the objective that is estimated in place of the ELBO, such as `IWAE()`. Default: `ELBO()`.
        higher_order: True makes derivatives of every order correct, for `ScoreFunction`, `LocalExpectation` and `Reparam` (Foerster et
            al., 2018). With False (the default), a second derivative that would be wrong raises.
        closed_form: mapping from site names and glob patterns to "kl" (the closed-form divergence of guide from model replaces the sampled
            densities) or "entropy" (the same for the guide's entropy). It overrides the site's `infer={"closed_form": ...}`.
        max_parallel: the maximal number of rows (particles × alternatives) that run at once (`lax.map` over chunks), where estimators run
            the program at other values. It bounds memory, with the same result. Relaxed branches run at once. Default: None, no maximum.
        branch_sharding: splits the branches of estimators that run the program at other values over devices, under `jit` (one axis, such as
            `NamedSharding(mesh, P("branches"))`), with the same result up to rounding. Default: None, every device runs all branches of
            its data.
        fuse: True (the default) evaluates a traced program in batches before it is compiled under `jit`. Operations that several sites
            share run once on all rows, draws that follow one another become loops, a `scan` is split into its sequential part and the
            rest, the random numbers of few sites are written out, and branches that change one element of a site share what they have in
            common with the draw. The result is the same up to rounding. False compiles the program
            as JAX traced it, to see whether a surprising result comes from the fusion, or to keep the program's operations (profiles).

        The other arguments are those of `numpyro.infer.Trace_ELBO`.

    Shapes:
        Any plates. The loss is in nats.

    Raises:
        ConfigurationError: a specification does not fit.
        EstimatorError: an estimator does not fit its site.
        BaselineError: a baseline does not fit its site.
        ProgramError: guide and model do not match.
        ImpossibleValueError: a cost is NaN or infinite and its value is known, that is, outside `jit`. Inside `jit` the loss is NaN, and
            `diagnose` names the site.

    Example:
        >>> from pplgrad import LeaveOneOut, ScoreFunction
        >>> elbo = TraceGrad_ELBO(num_particles=4, estimators={"z": ScoreFunction(LeaveOneOut())})
        >>> elbo.can_infer_discrete
        True

    References:
        Schulman, Heess, Weber and Abbeel (2015), theorem 1.
        Ranganath, Gerrish and Blei (2014).
        Foerster et al. (2018), for `higher_order`.
    """

    can_infer_discrete = True

    def __init__(
        self,
        num_particles: int = 1,
        vectorize_particles: bool | Callable[..., Any] = True,
        multi_sample_guide: bool = False,
        sum_sites: bool = True,
        *,
        estimators: Mapping[str, Estimator] | None = None,
        objective: Objective = ELBO(),  # noqa: B008
        higher_order: bool = False,
        closed_form: Mapping[str, str] | None = None,
        max_parallel: int | None = None,
        branch_sharding: jax.sharding.Sharding | None = None,
        fuse: bool = True,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,  # type: ignore[arg-type]
            multi_sample_guide=multi_sample_guide,
            sum_sites=sum_sites,
        )
        self.objective = checked_objective(objective, num_particles, higher_order)
        if isinstance(objective, MultiSample) and not sum_sites:
            raise ConfigurationError(
                f"sum_sites=False reports a part of the objective for each site, and {objective!r} is no sum over sites; drop it."
            )
        self.higher_order = higher_order
        self.fuse = fuse
        self._vectorized_particles = 1 if vectorize_particles is False else num_particles
        self.max_parallel = checked_parallel(max_parallel, self._vectorized_particles)
        self.branch_sharding = checked_sharding(branch_sharding, max_parallel)
        self._closed = ClosedForms.of(closed_form, self.objective)
        self._mapping = EstimatorMapping.of(estimators, "TraceGrad_ELBO(estimators=...)")
        self._arguments = {"estimators": self._mapping.estimators or None, "closed_form": self._closed.kinds or None}
        self._resolved: dict[str, Resolved] = {}
        self._stateless: set[str] = set()

    def loss_with_mutable_state(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the loss in nats, whose derivative is the estimate, and the new mutable state (None if there is none)."""
        if self.multi_sample_guide:
            if self.objective != ELBO():
                raise ConfigurationError(
                    f"multi_sample_guide=True computes the evidence lower bound alone; drop it to use {self.objective!r}."
                )
            if STEPS in param_map:
                raise ConfigurationError(
                    "multi_sample_guide=True computes NumPyro's own loss, which has nothing to watch; drop config_estimators(watch=...)."
                )
            self._refuse_scores(rng_key, param_map, Program(model, guide, args, kwargs))
            return super().loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)
        program, param_map = Program(model, guide, args, kwargs), as_jax(param_map)
        if isinstance(self.objective, FIVO):
            return self._filtered(rng_key, param_map, program)
        result, runs = self._evaluate(rng_key, param_map, program)
        self._refuse_unmeasured()
        refuse_devices_alone(result)
        refuse_impossible(result, runs)
        loss, state = (
            with_gradient(result) if self.sum_sites else by_site(runs),
            new_state(runs, result, self.num_particles),
        )
        static = runs[0][1]
        watcher = watcher_of(static.mappings)
        if watcher is not None and STEPS in param_map:
            monitor(
                watcher,
                lambda key, params, record: self._evaluate(key, params, program, record)[0],
                rng_key,
                param_map,
                program,
                static.estimators,
            )
            state = counted(state or {})
        return {"loss": loss, "mutable_state": state}

    def _filtered(self, key: jax.Array, params: dict, program: Program) -> dict[str, Any]:
        """Return the loss and the state, which is unchanged, where the particles are filtered."""
        assert isinstance(self.objective, FIVO)
        refuse_options(
            self.objective,
            {
                "sum_sites=False": not self.sum_sites,
                "vectorize_particles other than True": self.vectorize_particles is not True,
                "max_parallel": self.max_parallel is not None,
                "branch_sharding": self.branch_sharding is not None,
                "closed_form": bool(self._closed.kinds),
                "config_estimators(watch=...)": STEPS in params,
            },
        )
        filtered = Filtered(program, params, self.objective, self._resolve)
        return filtered_loss(key, self.num_particles, filtered, self._mapping)

    def _evaluate(
        self, key: jax.Array, params: dict, program: Program, record: Record | None = None
    ) -> tuple[Estimate, list[tuple[ParticleOutputs, ParticleTrace, dict[str, dict[str, Read]] | None]]]:
        """Run the program; return the objective's value, surrogate and new states, and the runs."""
        program = self._with_one_minibatch(key, program)
        runs, ops = self._runs(key, params, program)
        return self._combined(key, params, program, runs, ops, record), runs

    @ours
    def _combined(
        self, key: jax.Array, params: dict, program: Program, runs: list, ops: JaxOps, record: Record | None
    ) -> Estimate:
        """Return what the objective's estimate is made of, from the runs."""
        parts = [laid_out(static, arrays, reads, self.objective) for arrays, static, reads in runs]
        host = self._host(runs, parts, params, program)
        branches = self._branches(key, params, program, runs, parts)
        learned = log_normalizer(self.objective, params)
        result = estimate(ops, parts, host, branches, self.objective, self.higher_order, record, log_normalizer=learned)
        if isinstance(self.objective, ReweightedWakeSleep) and self.objective.sleeps:
            dreams = jax.random.fold_in(reused(key), 0xD4EA)
            sleep_loss = sleep_phase(self.objective, dreams, params, program)
            result.surrogate = result.surrogate + sleep_loss
        return result

    def diagnose(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Run a step again eagerly, and raise the error that names the site.

        Args:
            rng_key: the key of the step.
            param_map: the parameters of the step.
            model: the model.
            guide: the guide.
            args: positional arguments of the program.
            kwargs: keyword arguments of the program.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist
            >>> def model():
            ...     numpyro.sample("z", dist.Bernoulli(0.5))
            >>> TraceGrad_ELBO().diagnose(jax.random.key(0), {}, model, model)
        """
        self.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)

    def describe(self, *args: Any, **kwargs: Any) -> Description:
        """Describe what this ELBO does at each latent site, and why.

        `describe(model, guide, *args, **kwargs)` is as in Pyro, at the parameters that the program starts with.
        `describe(rng_key, param_map, model, guide, *args, **kwargs)` is as `loss`, at given parameters.

        Args:
            args: the model, the guide, and positional arguments of the program; a key and parameters may go before.
            kwargs: keyword arguments of the program.

        Returns:
            A description with a row for each latent site. `print` shows it as a table.

        Example:
            >>> import numpyro, numpyro.distributions as dist
            >>> program = lambda: numpyro.sample("z", dist.Bernoulli(0.5))
            >>> TraceGrad_ELBO(num_particles=2).describe(program, program).rows[0]["baseline"]
            'LeaveOneOut()'
        """
        rng_key, param_map, program = described(*args, **kwargs)
        program = self._with_one_minibatch(rng_key, program)
        param_map = as_jax(param_map)
        runs, _ = self._runs(rng_key, param_map, program)
        parts = [laid_out(static, arrays, reads, self.objective) for arrays, static, reads in runs]
        host = self._branches(rng_key, param_map, program, runs, parts)[0]
        reasons = {name: found.reason for name, found in self._resolved.items()}
        return describe(OPS, *parts[0], host, runs[0][1].families, reasons, runs[0][1].summed)

    def measure(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Choice:
        """Choose estimators by measurement for the sites under `Auto(measure=True)`. Call it before `svi.init`.

        Estimators that learn something are left out at a site whose `Auto` the guide's wrapper does not know.

        Args:
            rng_key: a key, as for `loss`.
            param_map: the parameters. Where it is empty, the program starts with the parameters of `svi.init`.
            model: the model.
            guide: the guide.
            args: positional arguments of the program.
            kwargs: keyword arguments of the program.

        Returns:
            The `Choice`. `print` shows what was measured.

        Raises:
            ConfigurationError: no site has such an `Auto`, or the call is inside `jit`, where time cannot be measured.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from pplgrad import Auto
            >>> program = lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
            >>> elbo = TraceGrad_ELBO(estimators={"z": Auto(measure=True, seconds=0.2)})
            >>> elbo.measure(jax.random.key(0), {}, program, program).estimators["z"] == elbo._mapping.estimators["z"].measured["z"]
            True
        """
        if is_tracing(rng_key, param_map, args, kwargs):
            raise ConfigurationError(
                "Time cannot be measured inside jit; call elbo.measure(...) outside, before svi.init."
            )
        seed = int(jax.random.randint(rng_key, (), 0, 2**31 - 1))
        return measured(self, Program(model, guide, args, kwargs), param_map or None, seed)

    def with_estimators(self, estimators: Mapping[str, Estimator]) -> TraceGrad_ELBO:
        """Return the same ELBO with another mapping of estimators."""
        other = copy.copy(self)
        other._mapping = EstimatorMapping.of(estimators, "TraceGrad_ELBO(estimators=...)")
        other._resolved, other._stateless = {}, set()
        return other

    def _refuse_unmeasured(self) -> None:
        for name, found in self._resolved.items():
            if found.measuring is not None and name not in found.measuring.measured:
                raise ConfigurationError(
                    f"Auto(measure=True) at site '{name}' has not measured anything yet; call elbo.measure(key, {{}}, model, guide, "
                    "*args) before svi.init (time cannot be measured inside jit)."
                )

    def _refuse_scores(self, rng_key: jax.Array, params: dict, program: Program) -> None:
        """With a guide that proposes several samples at once, only reparameterized sites have a right gradient."""
        from numpyro.handlers import substitute

        def names(key: jax.Array) -> None:
            guide = substitute(seed(program.guide, key), data=params)
            sites = trace(guide).get_trace(*program.args, **program.kwargs)
            for name, site in sites.items():
                if site["type"] == "sample" and not site["is_observed"]:
                    found = self._resolve(name, site)
                    if found.uses_score or found.relaxes:
                        raise EstimatorError(
                            f"{found!r} at site '{name}' cannot be used with multi_sample_guide=True, which carries "
                            "reparameterized sites alone; use "
                            "num_particles for several samples, with multi_sample_guide=False."
                        )

        jax.eval_shape(names, rng_key)
