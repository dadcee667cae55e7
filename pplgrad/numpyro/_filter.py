"""A particle filter through a program's `scan`: guide and model run step by step, and their particles are resampled in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.primitives import Messenger

from pplgrad.configuration import EstimatorMapping, collect_mappings, refuse_unmatched
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.program import Program
from pplgrad.engine.checks import refuse_mismatch, refuse_model_estimator
from pplgrad.engine.filter_checks import (
    are_scored,
    impossible_bound,
    no_loop,
    no_steps,
    refuse_after,
    refuse_held,
    refuse_lengths,
    refuse_other_steps,
    refuse_subsampled,
)
from pplgrad.engine.particle_filter import ParticleFilter, Step
from pplgrad.errors import ProgramError
from pplgrad.numpyro._array_ops import OPS, attach, concrete, ours
from pplgrad.numpyro._compat import handlers_inside, host_checks, is_handed_out, is_scan, unmasked
from pplgrad.numpyro._compat_jax import as_function, is_literal, reused
from pplgrad.numpyro._tracing.control_flow import FlowMessenger
from pplgrad.numpyro._tracing.handlers import Resolve, make_constant, stabilize_logits

LOOP = "scan"


@dataclass(frozen=True)
class Loop:
    """A scan that a program has come to: its body, and what it starts with."""

    body: Callable
    init: Any
    xs: Any
    length: int
    reverse: bool


@dataclass
class Seen:
    """What tracing the program shows beside arrays."""

    estimators: dict[str, Estimator] = field(default_factory=dict)
    mappings: list[EstimatorMapping] = field(default_factory=list)
    observed: list[str] = field(default_factory=list)
    bodies: dict[str, set[str]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    """The state of baselines that the guide's wrapper has registered, which nothing here changes."""
    length: int = 0
    step: Any = None
    """The jaxpr of a step of one particle, and how its outputs are built."""


class _Reached(BaseException):
    """Ends the run of a program at its scan. No program catches it by `except Exception`."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop


class _Watching(Messenger):
    """Stands outermost around a program or a body of it: binds estimators, makes draws constant, and refuses what is not filtered."""

    def __init__(self, objective: FIVO, seen: Seen, resolve: Resolve | None) -> None:
        """`resolve` chooses a guide's estimators; the model has none."""
        super().__init__()
        self._objective, self._seen, self._resolve = objective, seen, resolve

    def process_message(self, msg: Any) -> None:
        stabilize_logits(msg)
        if msg["type"] == "sample" and self._resolve is None:
            refuse_model_estimator(msg)
        _refuse_site(msg, self._objective)

    def postprocess_message(self, msg: Any) -> None:
        if self._resolve is None or msg["type"] != "sample" or msg["is_observed"]:
            return
        if is_handed_out(msg):
            raise ProgramError(
                f"Site '{msg['name']}' is drawn inside cond or an inner scan, where {self._objective!r} does not weigh it; draw it in the body of "
                "the scan itself."
            )
        estimator = self._seen.estimators[msg["name"]] = self._resolve(msg["name"], msg, None)  # type: ignore[arg-type]
        make_constant(msg, estimator)


def _refuse_site(msg: Any, objective: FIVO) -> None:
    """Refuse a plate of a minibatch, and state."""
    if msg["type"] == "plate":
        size, drawn = msg["args"]
        refuse_subsampled(msg["name"], size, size if drawn is None else drawn, objective)
    if msg["type"] == "mutable" and "pplgrad" not in msg:
        raise ProgramError(
            f"The program keeps mutable state ('{msg['name']}'), and {objective!r} runs its steps for several particles at once; use "
            "parameters, or another objective."
        )


class _UntilScan(Messenger):
    """Stands innermost of the library's handlers, and ends the run of a program at its first scan with a site."""

    def __init__(self, side: str, objective: FIVO, params: dict) -> None:
        super().__init__()
        self._side, self._objective, self._params = side, objective, params

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "control_flow" or not is_scan(msg):
            return
        body, init, xs, length, reverse = msg["args"]
        count = int(length if length is not None else jax.tree.leaves(xs)[0].shape[0])
        if count and not _has_sites(body, init, xs, self._params):
            return
        between = [x for x in handlers_inside(self) if not isinstance(x, (FlowMessenger, trace))]
        if between or msg["kwargs"]["substitute_stack"]:
            what = type(between[0]).__name__ if between else "a handler that sets values"
            raise ProgramError(
                f"The scan of the {self._side} stands inside of {what}, which {self._objective!r} does not carry into its steps; put it inside the body "
                "(data are passed in as xs, and observed with obs=...)."
            )
        if not count:
            raise no_steps(self._side, self._objective)
        raise _Reached(Loop(body, init, xs, count, bool(reverse)))


def _has_sites(body: Callable, init: Any, xs: Any, params: dict) -> bool:
    """Return whether the body of a scan draws or observes anything; nothing is computed."""
    row = jax.tree.map(lambda x: jnp.asarray(x)[0], xs)
    with block(), trace() as sites, substitute(data=params), seed(rng_seed=0):
        jax.eval_shape(body, jax.tree.map(jnp.asarray, init), row)
    return any(site["type"] == "sample" for site in sites.values())


@dataclass(frozen=True)
class Filtered:
    """A program whose particles are filtered, at given parameters."""

    program: Program
    params: dict
    objective: FIVO
    resolve: Resolve
    seen: Seen = field(default_factory=Seen)

    def look(self, key: jax.Array) -> None:
        """Refuse what is not filtered, from whole runs of guide and model, of which nothing is computed."""
        args, kwargs = self.program.args, self.program.kwargs

        def whole(key: jax.Array) -> None:
            with collect_mappings() as mappings:
                guide = trace(substitute(seed(self.program.guide, key), data=self.params)).get_trace(*args, **kwargs)
                model = replay(substitute(seed(self.program.model, key), data=self.params), trace=guide)
                against = trace(model).get_trace(*args, **kwargs)
            for site in (*guide.values(), *against.values()):
                _refuse_site(site, self.objective)
            self.seen.mappings += mappings
            self.seen.kept += [name for name, site in guide.items() if site["type"] == "mutable"]
            sides = {"guide": guide, "model": against}
            drawn = {side: {n: x for n, x in sites.items() if x["type"] == "sample"} for side, sites in sides.items()}
            for side, sites in drawn.items():
                inside = {name for name, site in sites.items() if is_handed_out(site)}
                refuse_after(side, (inside | _after(sites)) - self.seen.bodies[side], self.objective)
            refuse_mismatch(drawn["guide"], drawn["model"], lambda site: False)
            host_checks(against, guide)
            self.seen.observed += [name for sites in drawn.values() for name, x in sites.items() if x["is_observed"]]
            own = {n for n, x in guide.items() if x["type"] == "param"} - {
                n for n, x in against.items() if x["type"] == "param"
            }
            refuse_held(self.objective, own, self.seen.estimators)

        jax.eval_shape(whole, key)

    def before(self, key: jax.Array) -> dict[str, Any]:
        """Run guide and model of one particle as far as their scans; return the first log weight and all that a step reads."""
        objective, seen = self.objective, self.seen
        guide_key, model_key, step_key = jax.random.split(key, 3)
        drawn, guide = self._until_scan("guide", guide_key, {}, self.resolve)
        met, model = self._until_scan("model", model_key, _latents(drawn), None)
        self._refuse_apart(drawn, met, "before the scan")
        refuse_lengths(guide.length, model.length, objective)
        if guide.reverse != model.reverse:
            raise ProgramError(
                f"The scans of guide and model run in opposite directions, and {objective!r} steps through both at once."
            )
        seen.length = guide.length
        rows = (guide.xs, model.xs)
        rows = jax.tree.map(lambda x: jnp.asarray(x)[::-1] if guide.reverse else jnp.asarray(x), rows)
        first = jax.tree.map(lambda x: x[0], rows)
        step = partial(self._step, guide.body, model.body)
        carry = _settled(step, (guide.init, model.init), first, step_key)
        closed, shapes = jax.make_jaxpr(step, return_shape=True)(carry, first, step_key)
        seen.step = closed, jax.tree.structure(shapes)
        increment, score = self._weighed(drawn, met)
        return {"increment": increment, "score": score, "carry": carry, "rows": rows, "consts": closed.consts}

    def _until_scan(self, side: str, key: jax.Array, values: dict, resolve: Resolve | None) -> tuple[dict, Loop]:
        """Run one of the two programs as far as its scan."""
        run = self.program.guide if side == "guide" else self.program.model
        try:
            with (
                _Watching(self.objective, self.seen, resolve),
                trace() as sites,
                substitute(data={**self.params, **values}),
                seed(rng_seed=key),
                _UntilScan(side, self.objective, self.params),
            ):
                run(*self.program.args, **self.program.kwargs)
        except _Reached as reached:
            return sites, reached.loop
        raise no_loop(side, self.objective, LOOP)

    def _step(self, guide: Callable, model: Callable, carry: Any, row: Any, key: jax.Array) -> Any:
        """Run the bodies of guide and model once; return what they carry on, the log weight and the scored draws' log density."""
        guide_key, model_key = jax.random.split(key)
        drawn, own = self._body(guide, carry[0], row[0], guide_key, {}, self.resolve)
        met, other = self._body(model, carry[1], row[1], model_key, _latents(drawn), None)
        self._refuse_apart(drawn, met, "in the scan")
        self.seen.bodies = {"guide": set(drawn), "model": set(met)}
        return (own, other), *self._weighed(drawn, met)

    def _body(
        self, body: Callable, carry: Any, row: Any, key: jax.Array, values: dict, resolve: Resolve | None
    ) -> tuple[dict, Any]:
        with (
            _Watching(self.objective, self.seen, resolve),
            trace() as sites,
            substitute(data={**self.params, **values}),
            seed(rng_seed=key),
        ):
            carry, _ = body(carry, row)
        return sites, carry

    def _refuse_apart(self, drawn: dict, met: dict, where: str) -> None:
        """Refuse latent sites that one of the two programs draws alone."""
        apart = {name for name in _latents(drawn) if drawn[name]["infer"].get("is_auxiliary")}
        refuse_other_steps(set(_latents(drawn)) - apart, _latents(met), where, self.objective)

    def _weighed(self, drawn: dict, met: dict) -> tuple[jax.Array, jax.Array]:
        """Return Σ log p − Σ log q of sites, and the log density of the draws that have a score."""
        increment, score = jnp.zeros(()), jnp.zeros(())
        for site in _samples(met):
            increment = increment + _log_prob(site, site["fn"])
        for site in _samples(drawn):
            scored = not site["is_observed"] and self.seen.estimators[site["name"]].uses_score
            cost = _log_prob(site, site["fn"])
            if scored and self.objective.resampling_gradient == "stop-gradient":
                cost = jax.lax.stop_gradient(cost)
            elif scored:
                score = score + _log_prob({**site, "scale": None}, unmasked(site["fn"]))
            increment = increment - cost
        return increment, score


def _samples(sites: dict) -> list:
    return [site for site in sites.values() if site["type"] == "sample"]


def _latents(sites: dict) -> dict:
    return {site["name"]: site["value"] for site in _samples(sites) if not site["is_observed"]}


def _after(sites: dict) -> set[str]:
    """Return the sites that stand after one that a scan has handed out."""
    names = list(sites)
    last = max((i for i, name in enumerate(names) if is_handed_out(sites[name])), default=len(names))
    return set(names[last + 1 :])


def _log_prob(site: Any, fn: Any) -> jax.Array:
    intermediates = site["intermediates"] if fn is site["fn"] else None
    found = fn.log_prob(site["value"], intermediates) if intermediates else fn.log_prob(site["value"])
    return jnp.sum(found if site["scale"] is None else found * site["scale"])


def _settled(step: Callable, carry: Any, row: Any, key: jax.Array) -> Any:
    """Return what the steps start with, in the types that they carry on."""
    carry = jax.tree.map(jnp.asarray, carry)
    after = jax.eval_shape(step, carry, row, key)[0]
    if jax.tree.structure(after) != jax.tree.structure(carry):
        raise ProgramError(
            "The body of a scan carries on something of another structure than it starts with; make both the same."
        )
    for old, new in zip(jax.tree.leaves(carry), jax.tree.leaves(after), strict=True):
        if old.shape != new.shape:
            raise ProgramError(
                f"The body of a scan carries on an array of shape {new.shape} where it starts with {old.shape}; make both the same."
            )
    return jax.tree.map(lambda old, new: old.astype(new.dtype), carry, after)


def step_key(key: jax.Array, number: jax.Array) -> jax.Array:
    """Return a particle's key in a step."""
    return jax.random.fold_in(key, number)


def uniforms(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return the uniform numbers that ancestors are chosen by."""
    return jax.random.uniform(key, shape, dtype)


@ours
def filtered_loss(key: jax.Array, particles: int, filtered: Filtered, mapping: EstimatorMapping) -> dict[str, Any]:
    """Return the loss, whose gradient is the estimate, and the state, which is as it was; `mapping` is the ELBO's own."""
    objective, key = filtered.objective, reused(key)
    keys = jax.random.split(key, particles)
    rows = _Rows(filtered, keys)
    filtered.look(key)
    seen = filtered.seen
    refuse_unmatched(mapping, seen.estimators, seen.observed, "TraceGrad_ELBO(estimators=...)")
    for other in seen.mappings:
        refuse_unmatched(other, seen.estimators, seen.observed, "config_estimators")
    found = ParticleFilter(OPS, objective, particles // objective.combined(particles), objective.combined(particles))
    steps = _run(found, rows, jax.random.fold_in(key, 0x5EED))
    value, surrogate = found.surrogate(steps)
    known = concrete(value)
    if known is not None and not jnp.isfinite(value):
        wrong = ~jnp.isfinite(steps.value).all(axis=1)
        raise impossible_bound([int(i) for i in jnp.nonzero(wrong)[0]])
    value = jnp.where(jnp.isfinite(value), value, jnp.nan)
    message = (
        f"A second derivative was asked for, and the surrogate of {objective!r} is right for first ones alone; use ELBO() with "
        "higher_order=True."
    )
    state = {name: filtered.params[name] for name in seen.kept if name in filtered.params}
    return {"loss": attach(-value, OPS.first_order_only(-surrogate, message)), "mutable_state": state or None}


class _Rows:
    """What the particles have computed before their scans: what depends on a particle's draws, once each, and the rest once."""

    def __init__(self, filtered: Filtered, keys: jax.Array) -> None:
        leaves, structure = jax.tree.flatten(filtered.params)

        def before(key: jax.Array, *leaves: Any) -> Any:
            at = jax.tree.unflatten(structure, leaves)
            return Filtered(filtered.program, at, filtered.objective, filtered.resolve, filtered.seen).before(key)

        closed, shapes = jax.make_jaxpr(before, return_shape=True)(keys[0], *leaves)
        self._structure = jax.tree.structure(shapes)
        depends = _depends_on_first(closed.jaxpr)
        run = as_function(closed)
        own = jax.vmap(lambda k: [x for x, d in zip(run(k, *leaves), depends, strict=True) if d])(keys)
        shared = [x for x, d in zip(run(keys[0], *leaves), depends, strict=True) if not d]
        self._leaves = [own.pop(0) if d else jnp.asarray(shared.pop(0)) for d in depends]
        self._is_own = depends
        self.keys = jax.vmap(lambda k: jax.random.split(k, 3)[2])(keys)
        self.seen = filtered.seen

    def tree(self, leaves: list) -> dict[str, Any]:
        """Return the parts by name: increment, score, carry, rows, consts."""
        return jax.tree.unflatten(self._structure, leaves)

    def at_start(self) -> dict[str, Any]:
        """Return what each particle starts with: increment, score and carry, (particles, ...)."""
        count = len(self.keys)
        every = [
            x if o else jnp.broadcast_to(x, (count, *x.shape)) for x, o in zip(self._leaves, self._is_own, strict=True)
        ]
        found = self.tree(every)
        return {name: found[name] for name in ("increment", "score", "carry")}

    def advance(self, carry: Any, origin: jax.Array, number: jax.Array) -> Any:
        """Run a step for all particles, whose paths began as those at `origin`."""
        parts, owned = self.tree(self._leaves), self.tree(list(self._is_own))
        closed, structure = self.seen.step
        names = ("consts", "rows")
        arrays = [x for name in names for x in jax.tree.leaves(parts[name])]
        owns = [x for name in names for x in jax.tree.leaves(owned[name])]
        consts = len(jax.tree.leaves(parts["consts"]))

        def one(carry: Any, place: jax.Array, key: jax.Array) -> Any:
            pairs = list(zip(arrays, owns, strict=True))
            row = [x[place, number] if own else x[number] for x, own in pairs[consts:]]
            step = as_function(closed, [x[place] if own else x for x, own in pairs[:consts]])
            return jax.tree.unflatten(structure, step(*jax.tree.leaves(carry), *row, step_key(key, number)))

        return jax.vmap(one)(carry, origin, self.keys)


def descended(state: Any, flat: jax.Array) -> Any:
    """Return what the particles carry, (particles, ...), each with that of its ancestor."""
    return jax.tree.map(lambda x: x[flat], state)


def _run(found: ParticleFilter, rows: _Rows, key: jax.Array) -> Step:
    """Run all steps, and return what the surrogate takes of them, stacked."""
    start, shape = rows.at_start(), (found.filters, found.particles)
    first, scored = (jnp.reshape(start[name], shape) for name in ("increment", "score"))
    every = uniforms(key, (rows.seen.length, *found.uniforms), first.dtype)

    def step(state: Any, row: Any) -> Any:
        carry, origin, logs = state
        number, numbers = row
        moved = found.resampled(logs, numbers, number > 0)
        flat = jnp.reshape(found.among_all(moved.ancestors), (-1,))
        carry, origin = descended((carry, origin), flat)
        carry, increment, score = rows.advance(carry, origin, number)
        at_first = jnp.where(number == 0, 1.0, 0.0)
        increment = jnp.reshape(increment, shape) + jnp.where(number == 0, first, jnp.zeros_like(first))
        weighed = found.weighed(moved.logs, increment, are_scored(found.objective, rows.seen.estimators))
        score = jnp.reshape(score, shape) + at_first * scored
        return (carry, origin, weighed.logs), Step(weighed.value, moved.score, score, weighed.without)

    state = start["carry"], jnp.arange(len(rows.keys)), found.start(first)
    _, steps = jax.lax.scan(step, state, (jnp.arange(rows.seen.length), every))
    return steps


def _depends_on_first(jaxpr: Any) -> list[bool]:
    """Return whether each output may depend on the first input."""
    known = {jaxpr.invars[0]}
    for equation in jaxpr.eqns:
        if any(not is_literal(x) and x in known for x in equation.invars):
            known.update(equation.outvars)
    return [not is_literal(x) and x in known for x in jaxpr.outvars]
