"""`summed_posterior`: what the sites that were summed out are, given the guide's draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.engine.checks import refuse_mismatch
from pplgrad.engine.marginal_sites import check_posterior, nothing_summed
from pplgrad.errors import ProgramError
from pplgrad.pyro._distributions import is_drawn_from_prior
from pplgrad.pyro._tracing.host_checks import check_programs
from pplgrad.pyro._tracing.marginal_sites import components, trace_against
from pplgrad.pyro._tracing.particle_trace import samples_of, without_shapes
from pplgrad.pyro._tracing.posterior_of_sums import marginals, most_probable, samples, with_known

_KINDS = {"samples": samples, "marginals": marginals, "map": most_probable}


@without_shapes()
def summed_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kind: str = "samples",
    num_samples: int = 1,
    max_plate_nesting: float = math.inf,
    draws: bool = False,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    r"""Return the exact posterior of the sites that are summed out, given draws of the guide.

    Each of `num_samples` draws w of the guide gives, for the summed sites z (those of the model with `infer={"enumerate": "parallel"}`, which the
    guide does not draw), their posterior p(z | w, x) = p(z, w, x) / Σ_z p(z, w, x):

    - "samples": one joint sample z ~ p(z | w, x).
    - "marginals": p(z_i = v | w, x) for each site, element and value v, which is ∂ log Σ_z p(z, w, x) / ∂ε for ε added to log p(z_i = v | ·).
    - "map": the most probable joint value, argmax_z p(z, w, x). In a `pyro.markov` chain this is Viterbi's path.

    A scale (`poutine.scale`, the N/n of a subsampled plate) stands outside of the logarithm in the ELBO, and has no part in the posterior. A mask
    on a site that reads z removes its density. A mask on z itself is ignored, as in the ELBO, so that padding after the end of a
    sequence gets its prediction. But a masked element has no part in the "map" of the others if nothing that counts reads it: sequences of
    different length get the paths that they would have alone.

    A site with `obs_mask` has its own name, and the observed value (in "marginals" the probability 1 of it) where that is known. Pyro drops `infer`
    at such a site: sum it out with `config_enumerate` around the model.

    Args:
        model: the model.
        guide: the guide. It may be wrapped (`config_estimators`), a module, or an autoguide. Draws are those that the guide makes by itself, also
            where an estimator would relax them.
        args: positional arguments of the program.
        kind: "samples" (the default), "marginals" or "map".
        num_samples: number of draws of the guide. Default: 1.
        max_plate_nesting: how many dimensions plates take. Default: infinity, at most 10.
        draws: True adds what the guide drew: its latent sites, and the indices of subsampled plates. Default: False.
        kwargs: keyword arguments of the program.

    Returns:
        A dict from the names of sites to tensors without a gradient. On a CPU `arviz.from_dict({"posterior": found})`, before version 1
        `arviz.from_dict(posterior=found)`, takes it. The program's state is the param store's alone.

    Shapes:
        (1, num_samples, \*plates, \*event): one chain, the draws, and one value of the site. "marginals": (1, num_samples, \*plates, values), in the
        order of the distribution's `enumerate_support`. In a subsampled plate the elements are those of each draw's own minibatch.

    Raises:
        ConfigurationError: `kind` or `num_samples` is none.
        ProgramError: no site is summed out, guide and model do not match, or sites cannot be summed out together (such as a site outside of a
            subsampled plate that data inside read: their scales differ).
        ImpossibleValueError: a density is NaN or infinite, or zero at all values of the summed sites.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model():
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...     pyro.sample("x", dist.Normal(4 * k, 1.0), obs=torch.tensor(4.0))
        >>> def guide():
        ...     pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> summed_posterior(model, guide, kind="map", num_samples=3)["k"]
        tensor([[1., 1., 1.]])
        >>> summed_posterior(model, guide, kind="marginals")["k"].shape
        torch.Size([1, 1, 2])

    References:
        Viterbi (1967), for "map"; Carter and Kohn (1994) and Frühwirth-Schnatter (1994), forward filter and backward sample.
        Obermeyer et al. (2019), tensor variable elimination, for plates.
        Darwiche (2003), marginals as derivatives.
    """
    check_posterior(kind, num_samples)
    found = [_given_one_draw(model, guide, kind, max_plate_nesting, draws, args, kwargs) for _ in range(num_samples)]
    for one in found:
        for name in found[0].keys() ^ one.keys():
            raise ProgramError(
                f"Site '{name}' is there in some draws of the guide only, so that its draws have no common shape; use num_samples=1, several times."
            )
        for name, x in one.items():
            if x.shape != found[0][name].shape:
                raise ProgramError(
                    f"Site '{name}' has the shape {tuple(x.shape)} in one draw of the guide and {tuple(found[0][name].shape)} in another; "
                    "use num_samples=1, several times."
                )
    return {name: torch.stack([one[name] for one in found])[None] for name in found[0]}


@torch.no_grad()
def _given_one_draw(
    model: Callable[..., Any], guide: Callable, kind: str, nesting: float, draws: bool, args: tuple, kwargs: dict
) -> dict[str, torch.Tensor]:
    """Return what is asked for given one draw of the guide."""
    guide_trace = _trace_of(guide, args, kwargs)
    trace = trace_against(model, guide_trace, nesting, args, kwargs)
    refuse_mismatch(dict(samples_of(guide_trace)), dict(samples_of(trace)), is_drawn_from_prior)
    check_programs(trace, guide_trace, nesting)
    found: dict[str, torch.Tensor] = {}
    if draws:
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site):
                found[name] = site["value"].detach()
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and len(site["value"]) < site["fn"].size:
                found[name] = torch.as_tensor(site["value"])
    parts = components(trace)
    if not parts:
        raise nothing_summed()
    for part in parts:
        found.update(with_known(_KINDS[kind](part), part, trace, kind))
    return found


def _trace_of(guide: Callable, args: tuple, kwargs: dict) -> Any:
    effect = poutine.unwrap(guide)
    if not isinstance(effect, Messenger):
        return poutine.trace(guide).get_trace(*args, **kwargs)
    guide(*args, **kwargs)
    return effect.get_traces()[1]
