"""A model run with a guide's draws, with the sites that only the model has summed out where they ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from numpyro.handlers import replay, seed, substitute, trace

from pplgrad.core.program import Program
from pplgrad.engine.checks import refuse_mismatch
from pplgrad.errors import ConfigurationError, ProgramError
from pplgrad.numpyro._compat import host_checks
from pplgrad.numpyro._distributions import is_reparameterized
from pplgrad.numpyro._tracing.control_flow import Flow
from pplgrad.numpyro._tracing.handlers import ModelInferMessenger, SiteMessenger, SummingMessenger
from pplgrad.numpyro._tracing.relaxations import refuse_others

Trace = dict[str, Any]
Flows = dict[str, Flow]


class Drawn(NamedTuple):
    """What a guide drew: its trace, its sites in control flow, and the sites whose densities are extended to weights."""

    trace: Trace
    flows: Flows
    extended: set[str]


class Against(NamedTuple):
    """What a model shows against a guide's draws: its trace, its sites in control flow, and those that ask for their divergence in closed form."""

    trace: Trace
    flows: Flows
    divergences: set[str]


def model_trace(program: Program, key: jax.Array, params: dict, drawn: Drawn, check: bool = True) -> Against:
    """Run the model with a guide's draws.

    The host's checks are made if `check`. With sites to sum the model runs twice: with one value of each, which tells how many dimensions
    plates take, and with all.
    """
    guide, extended = drawn.trace, drawn.extended
    draws = {name: site for name, site in guide.items() if site["type"] not in ("param", "mutable")}
    names = sample_sites(guide).keys()
    messenger = SiteMessenger(None, {}, key, None, extended, drawn=names)
    innermost = ModelInferMessenger()
    with messenger:
        found = trace(_against(program, key, params, draws, innermost)).get_trace(*program.args, **program.kwargs)
    summed = frozenset(name for name, site in sample_sites(found).items() if _is_to_be_summed(site, guide))
    others = {name: site for name, site in found.items() if name not in summed}
    refuse_others(sample_sites(guide), sample_sites(found))
    refuse_mismatch(sample_sites(guide), sample_sites(others), lambda site: is_reparameterized(site["fn"]))
    for name in sample_sites(others).keys() & messenger.flows.keys() - names:
        if not others[name]["is_observed"]:
            raise ProgramError(
                f"Site '{name}' is drawn by the model alone, in the body of a scan or cond, where its draws are not followed; draw it in the "
                "guide as well, or observe it."
            )
    if check:
        host_checks(others, _without_time(drawn, messenger.flows))
    if not summed:
        return Against(found, messenger.flows, innermost.divergences)
    sites = _marginal_sites(min(summed))
    plan = sites.enumeration(found, messenger.flows, summed, guide)

    def run(plan: Any) -> dict[str, Any]:
        left = {name: site for name, site in draws.items() if not plan.in_scan(name)}
        model = _against(program, key, params, left, ModelInferMessenger(summed))
        with sites.naming(summed), SummingMessenger(key, extended, plan), sites.enumerating(plan):
            return trace(model).get_trace(*program.args, **program.kwargs)

    return Against(sites.enumerated(plan, run, guide), messenger.flows, innermost.divergences)


def _against(program: Program, key: jax.Array, params: dict, draws: dict, innermost: ModelInferMessenger) -> Callable:
    def model(*args: Any, **kwargs: Any) -> Any:
        with innermost:
            return program.model(*args, **kwargs)

    return substitute(replay(seed(model, key), draws), data=params)


def _without_time(drawn: Drawn, flows: Flows) -> Trace:
    """Return a guide's trace without the plates that stand for the time of a scan in the model, which NumPyro would miss there."""
    stands_in: dict[str, list[str]] = {}
    for name, site in sample_sites(drawn.trace).items():
        for frame in site["cond_indep_stack"]:
            stands_in.setdefault(frame.name, []).append(name)
    in_model_alone = {name for name, flow in flows.items() if flow.scanned} - drawn.flows.keys()
    times = {plate for plate, names in stands_in.items() if in_model_alone.issuperset(names)}
    return {name: site for name, site in drawn.trace.items() if name not in times}


def sample_sites(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sample sites of a trace."""
    return {name: site for name, site in found.items() if site["type"] == "sample"}


def _is_to_be_summed(site: Any, guide: Mapping[str, Any]) -> bool:
    drawn = site["name"] in guide and guide[site["name"]]["type"] == "sample"
    return not (site["is_observed"] or drawn) and site["infer"].get("enumerate") == "parallel"


def _marginal_sites(name: str) -> Any:
    """Return the module that sums out, which needs an extra."""
    try:
        import funsor  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"Site '{name}' of the model is to be summed out (infer={{'enumerate': 'parallel'}}), which needs funsor: pip install "
            "'pplgrad[enum]'; or draw it in the guide."
        ) from error
    from pplgrad.numpyro._tracing import marginal_sites

    return marginal_sites
