"""Where learned baselines live in Pyro: their parameters and their state in the param store."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch

from pplgrad.baselines.neural import NeuralBaseline
from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.plates import Read
from pplgrad.core.program import Program
from pplgrad.core.shapes import plate_shape
from pplgrad.core.sites import Run, SiteSpec
from pplgrad.engine.checks import another_network
from pplgrad.engine.layout import Layout
from pplgrad.engine.upstream import UpstreamSites, call_with_sites, default_inputs, with_numbers
from pplgrad.errors import BaselineError, ConfigurationError
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._compat import hidden_state, hide_state, unconstrained
from pplgrad.pyro._reuse.guards import Guard
from pplgrad.pyro._reuse.probes import hooks_of_all_modules
from pplgrad.pyro._tracing.particle_trace import Traces
from pplgrad.pyro._tracing.provenance import Provenance
from pplgrad.pyro._tracing.site_options import SiteBaseline

PREFIX = "pplgrad.baseline."


def is_baseline_param(name: str) -> bool:
    """Return whether a name in the param store is that of a learned baseline's parameter or state.

    Args:
        name: a name in Pyro's param store.

    Returns:
        True if the name begins with "pplgrad.baseline.".

    Example:
        >>> is_baseline_param("pplgrad.baseline.z.0$$$0.weight"), is_baseline_param("encoder$$$weight")
        (True, False)
    """
    return name.startswith(PREFIX)


class Networks:
    """The networks of an ELBO's neural baselines, by site and position in the site's sum of baselines."""

    def __init__(self) -> None:
        self.modules: dict[tuple[str, str], torch.nn.Module] = {}
        self._owners: dict[int, tuple[str, str]] = {}

    def touched(self) -> list[torch.nn.Module]:
        """Return the networks that a user gave, and those of ours that somebody has put something into."""
        return [x for x in self.modules.values() if not isinstance(x, Perceptron) or not x.is_plain()]

    def get(self, site: str, key: str, baseline: NeuralBaseline, x: torch.Tensor) -> torch.nn.Module:
        """Return the network registered in the param store, made at first use."""
        name = f"{PREFIX}{site}.{key}"
        module = self.modules.get((site, key))
        if module is None or (baseline.net is None and not _is_registered(name, module)):
            module = self._made(site, key, baseline, x)
            self.modules[site, key] = module
        self._refuse_another(site, name, baseline, module, x)
        return pyro.module(name, module, update_module_params=True)

    @staticmethod
    def _refuse_another(
        site: str, name: str, baseline: NeuralBaseline, module: torch.nn.Module, x: torch.Tensor
    ) -> None:
        """Refuse parameters in the store that another network has left, and inputs that the network is not made for."""
        store = pyro.get_param_store()
        for parameter, value in module.named_parameters():
            full = f"{name}$$${parameter}"
            if full in store and store[full].shape != value.shape:
                found = store[full].shape
                raise BaselineError(another_network(baseline, site, parameter, found, value.shape, forgetting(site)))
        first = next(iter(module.children()), None) if baseline.net is None else None
        if isinstance(first, torch.nn.Linear) and first.in_features != x.shape[-1]:
            wanted = (first.out_features, x.shape[-1])
            raise BaselineError(
                another_network(baseline, site, "0.weight", first.weight.shape, wanted, forgetting(site))
            )

    def _made(self, site: str, key: str, baseline: NeuralBaseline, x: torch.Tensor) -> torch.nn.Module:
        if baseline.net is None:
            return _perceptron(x, baseline.hidden)
        if not isinstance(baseline.net, torch.nn.Module):
            raise ConfigurationError(
                f"NeuralBaseline(net=...) at site '{site}' takes a torch.nn.Module in Pyro; got "
                f"{type(baseline.net).__name__}."
            )
        # A pattern may give one specification to several sites: the first takes the network, the others a copy.
        owner = self._owners.setdefault(id(baseline.net), (site, key))
        return baseline.net if owner == (site, key) else copy.deepcopy(baseline.net)


def _is_registered(name: str, module: torch.nn.Module) -> bool:
    store = pyro.get_param_store()
    return all(f"{name}$$${parameter}" in store for parameter, _ in module.named_parameters())


def _perceptron(x: torch.Tensor, hidden: Sequence[int]) -> torch.nn.Module:
    sizes = [x.shape[-1], *hidden] if x.shape[-1] else [0]
    layers: list[torch.nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    last = _Number() if not x.shape[-1] else torch.nn.Linear(sizes[-1], 1)
    for parameter in last.parameters():
        torch.nn.init.zeros_(parameter)
    return Perceptron(*layers, last).to(device=x.device, dtype=x.dtype)


class Perceptron(torch.nn.Sequential):
    """The network of a `NeuralBaseline` that names none: nothing of it may change but its parameters, which are in the param store."""

    def is_plain(self) -> bool:
        """Return whether nobody has put anything into the module or its layers that changes what it computes."""
        return all(
            not (x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks or x._buffers)
            and "forward" not in vars(x)
            and type(x) in (Perceptron, torch.nn.Linear, torch.nn.Tanh, _Number)
            for x in (self, *self._modules.values())
            if x is not None
        )


def _outputs(networks: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """Return the outputs (networks, *batch) of networks of one shape at the same inputs (*batch, features)."""
    if not x.shape[-1]:
        numbers = torch.stack([network[0].value for network in networks])
        return numbers.reshape(-1, *(1,) * (x.dim() - 1)).expand(-1, *x.shape[:-1])
    h = x.reshape(-1, x.shape[-1]).expand(len(networks), -1, -1)
    for i, layer in enumerate(networks[0]):
        if isinstance(layer, torch.nn.Linear):
            weight = torch.stack([network[i].weight for network in networks])
            bias = torch.stack([network[i].bias for network in networks])
            h = torch.baddbmm(bias[:, None], h, weight.mT)
        else:
            h = layer(h)
    return h.reshape(len(networks), *x.shape[:-1])


class _Number(torch.nn.Module):
    """One learned number, for a network without inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value.expand(*x.shape[:-1], 1)


class PyroBaselines:
    """`pplgrad.core.estimator.BaselineHost` for one evaluation of the objective.

    `values` holds, for each latent site, its value in every particle that has it, of shape (particles, *batch,
    *event), with the number of its event dimensions.
    """

    def __init__(
        self,
        networks: Networks,
        sites: Mapping[str, SiteSpec],
        ancestors: Mapping[str, Mapping[str, Read]],
        values: Mapping[str, tuple[torch.Tensor, int]],
        indices: Mapping[str, torch.Tensor],
        program: Program,
        like: torch.Tensor,
        provenance: Provenance | None,
        changed: Collection[Callable] = (),
        options: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        vectorized: bool = False,
    ) -> None:
        """`changed` are functions of the user's that read Python state which changed while the program ran.

        `options` are those of each site itself (`infer`), in every run.
        """
        self._changed = changed
        self._options, self._vectorized = options or {}, vectorized
        self._networks = networks
        self._sites = sites
        self._ancestors = ancestors
        self._values = values
        self._indices = indices
        self._program = program
        self._like = like
        self._provenance = provenance
        self.outputs: list[tuple[str, Baseline, torch.Tensor]] = []

    def state(self, site: str, key: str) -> Mapping[str, torch.Tensor]:
        """Return the arrays from before the draw, zeros at first."""
        part = parts_of(self._sites[site].estimator.baseline)[int(key)]
        store = pyro.get_param_store()
        result = {}
        for name, shape in part.state_shapes(self._sites[site].plates).items():
            full = state_name(site, key, name)
            if full in store:
                stored = store[full].detach()
                if tuple(stored.shape) != shape:
                    raise BaselineError(another_network(part, site, name, stored.shape, shape, forgetting(site)))
                result[name] = stored
            else:
                result[name] = self._like.new_zeros(shape)
        return result

    def predict(self, site: str, key: str, baseline: Any) -> torch.Tensor:
        """Return the network's or function's output for this draw."""
        if self._provenance is None:
            return self._predicted(site, key, baseline)
        self._provenance.escaped = 0
        out = self._predicted(site, key, baseline)
        kept = 0
        if function_of(baseline) in self._changed:
            # What left the tensors while the program ran may be in what the function reads.
            kept = self._provenance.escaped_ever
        for name in self._provenance.names(self._provenance.of(out) | self._provenance.escaped | kept):
            if name == site or site in self._ancestors.get(name, {}):
                raise BaselineError(
                    f"{type(baseline).__name__} at site '{site}' was computed from the value of site '{name}', which its "
                    "own draw decides; this would bias the gradient. Use the program's arguments and upstream sites only."
                )
        return out

    def predict_all(self, sites: Sequence[str], key: str, baseline: Any) -> torch.Tensor | None:
        """Return the outputs of the default networks of several sites, which have the same inputs, layer by layer in one product."""
        asks = baseline.net is not None or baseline.inputs is not None
        if self._provenance is not None or asks or hooks_of_all_modules():
            return None
        x = self._inputs(sites[0], baseline)
        if baseline.share == "loop":
            return self._predict_shared(sites, key, baseline, x)
        networks = [self._networks.get(site, key, baseline, x) for site in sites]
        plain = all(isinstance(network, Perceptron) and network.is_plain() for network in networks)
        return _outputs(networks, x) if plain else None

    def _predict_shared(self, sites: Sequence[str], key: str, baseline: Any, x: torch.Tensor) -> torch.Tensor | None:
        """Return the outputs of the one default network of several sites of a loop."""
        if len(set(map(baseline.owner, sites))) > 1:
            return None
        every = torch.stack([with_numbers(OPS, x, baseline.numbers(site)) for site in sites])
        network = self._networks.get(baseline.owner(sites[0]), key, baseline, every)
        plain = isinstance(network, Perceptron) and network.is_plain()
        return network(every)[..., 0] if plain else None

    def check_functions(self) -> None:
        """Refuse functions of the user's that compute a baseline from its site's own draw."""
        for name, spec in self._sites.items():
            for key, part in enumerate(parts_of(getattr(spec.estimator, "baseline", None))):
                if function_of(part) is not None:
                    with torch.no_grad():
                        self.predict(name, str(key), part)

    def check_finite(self, site: str, baseline: Baseline, value: torch.Tensor) -> None:
        """Note whether a value is finite; it is read at the step's end, together with the loss."""
        self.outputs.append((site, baseline, torch.isfinite(value).all()))

    def refuse_infinite(self, flags: Sequence[float]) -> None:
        """Refuse values that were not finite, given what was noted of each."""
        for (site, baseline, _), finite in zip(self.outputs, flags, strict=True):
            if not finite:
                raise BaselineError(
                    f"{type(baseline).__name__} at site '{site}' returned NaN or infinity; check its inputs and its "
                    "learning rate."
                )

    def _predicted(self, site: str, key: str, baseline: Any) -> torch.Tensor:
        if isinstance(baseline, SiteBaseline):
            with self._provenance or nullcontext():
                return self._said_by_site(site, baseline)
        if not isinstance(baseline, NeuralBaseline):
            with self._provenance or nullcontext():
                out = call_with_sites(baseline.function, self._program.args, self._program.kwargs, self._upstream(site))
                return torch.as_tensor(out, dtype=self._like.dtype, device=self._like.device)
        with self._provenance or nullcontext():
            x = with_numbers(OPS, self._inputs(site, baseline), baseline.numbers(site))
        module = self._networks.get(baseline.owner(site), key, baseline, x)
        if self._provenance is not None:
            self._provenance.give(*module.parameters(), *module.buffers())
        with self._provenance or nullcontext():
            out = module(x)
        if out.dim() == x.dim() and out.shape[-1] == 1:
            return out[..., 0]
        if out.dim() == x.dim():
            raise BaselineError(
                f"The network of NeuralBaseline at site '{site}' returned shape {tuple(out.shape)} for inputs of shape "
                f"{tuple(x.shape)}; return one number for each element of the site's plates."
            )
        return out

    def _inputs(self, site: str, baseline: NeuralBaseline) -> torch.Tensor:
        if baseline.inputs is None:
            given = (*self._program.args, *self._program.kwargs.values())
            arrays = [a for a in given if isinstance(a, torch.Tensor) and a.layout is torch.strided and not a.is_nested]
            found = default_inputs(OPS, self._sites[site].plates, self._indices, arrays)
            if found is None:
                return self._like.new_zeros((*(1 for _ in plate_shape(self._sites[site].plates)), 0))
            found = found.detach().to(self._like.dtype)
            if OPS.known_finite(found):
                return found
            return torch.where(torch.isfinite(found), found, 0.0)  # Missing values of the data carry no information.
        raw = call_with_sites(baseline.inputs, self._program.args, self._program.kwargs, self._upstream(site))
        arrays = [a.detach().to(self._like.dtype) for a in (raw if isinstance(raw, (tuple, list)) else [raw])]
        if len(arrays) == 1:
            return arrays[0]
        lead = torch.broadcast_shapes(*(a.shape[:-1] for a in arrays))
        return torch.cat([a.expand(*lead, a.shape[-1]) for a in arrays], -1)

    def _said_by_site(self, site: str, baseline: SiteBaseline) -> torch.Tensor:
        depth = len(plate_shape(self._sites[site].plates))
        found = [
            torch.as_tensor(baseline.value(infer), dtype=self._like.dtype, device=self._like.device)
            for infer in self._options[site]
        ]
        # A number, or what has fewer dimensions than the site, stands for all elements.
        lined_up = [x.reshape((*(1 for _ in range(depth - x.dim())), *x.shape)) for x in found]
        out = found[0] if self._vectorized else torch.stack(lined_up)
        return out.reshape((*out.shape[:1], *_innermost(out.shape[1:], depth)))

    def _upstream(self, site: str) -> UpstreamSites:
        depth = len(plate_shape(self._sites[site].plates))
        aligned = {}
        for name, (value, event_dim) in self._values.items():
            batch = _innermost(value.shape[1 : value.dim() - event_dim], depth)
            batch = (1,) * (depth - len(batch)) + batch
            aligned[name] = value.detach().reshape(value.shape[0], *batch, *value.shape[value.dim() - event_dim :])
        return UpstreamSites(site, aligned, self._ancestors)


def _innermost(batch: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return a batch shape without the dimensions of size one between the particles and a site's plates."""
    extra = 0
    while len(batch) - extra > depth and batch[extra] == 1:
        extra += 1
    return tuple(batch[extra:])


def forgetting(site: str) -> str:
    """Return what to do about what is kept for a site and does not fit, in words."""
    return (
        f"delete the names that begin with '{PREFIX}{site}.' from the param store (or call pyro.clear_param_store()), or give the site "
        "another name"
    )


def state_name(site: str, key: str, name: str) -> str:
    """Return the param store's name for an array of a baseline's state."""
    return f"{PREFIX}{site}.{key}.{name}"


def store_states(states: Mapping[tuple[str, str], Mapping[str, torch.Tensor]]) -> None:
    """Write the states after a draw to the param store."""
    store_arrays({state_name(*where, name): x for where, arrays in states.items() for name, x in arrays.items()})


def store_arrays(arrays: Mapping[str, torch.Tensor]) -> None:
    """Write arrays of baselines' states to the param store, in place, so that the store does not grow."""
    store = pyro.get_param_store()
    with torch.no_grad():
        for full, value in arrays.items():
            if full in store:
                store[full].unconstrained().copy_(value)  # type: ignore[attr-defined]
            else:
                store[full] = value.detach().clone()
    if arrays:
        hide_state(arrays)


def stored_arrays() -> dict[str, torch.Tensor]:
    """Return the arrays of baselines' states in the param store, by name."""
    hidden = hidden_state()
    return {name: x.detach().clone() for name, x in unconstrained().items() if name in hidden}


def baselines_of(
    networks: Networks,
    layouts: Sequence[Layout],
    runs: Sequence[Run],
    traced: Sequence[Traces],
    provenance: Provenance | None,
    program: Program,
) -> PyroBaselines | None:
    """Return what baselines with state, networks or functions need in these runs, if a site has one."""
    if not any(site.estimator.keeps_state for layout in layouts for site in layout.sites):
        return None
    vectorized = len(runs) == 1 and runs[0].particles > 1
    sites: dict[str, SiteSpec] = {}
    ancestors: dict[str, dict[str, Read]] = {}
    values: dict[str, tuple[list[torch.Tensor], int]] = {}
    options: dict[str, list[Mapping[str, Any]]] = {}
    for layout, traces in zip(layouts, traced, strict=True):
        for name, upstream in layout.ancestors.items():
            ancestors.setdefault(name, {}).update(upstream)
        for spec in layout.sites:
            sites[spec.name] = spec
            node = traces.guide.nodes[spec.name]
            value = node["value"] if vectorized else node["value"][None]
            values.setdefault(spec.name, ([], node["fn"].event_dim))[0].append(value)
            options.setdefault(spec.name, []).append(node["infer"])
    joined = {
        name: (parts[0] if len(parts) == 1 else torch.cat(parts), event_dim)
        for name, (parts, event_dim) in values.items()
        if len({tuple(part.shape[1:]) for part in parts}) == 1
    }
    indices = runs[0].indices if len(runs) == 1 else {}
    like = runs[0].costs[0].detach()
    changed = [function for traces in traced for function in traces.changed]
    return PyroBaselines(
        networks, sites, ancestors, joined, indices, program, like, provenance, changed, options, vectorized
    )


def function_of(baseline: Any) -> Callable | None:
    """Return the function of the user's that a baseline calls, if it has one."""
    return baseline.inputs if isinstance(baseline, NeuralBaseline) else getattr(baseline, "function", None)


def state_of_functions(estimators: Iterable[Any]) -> dict[Callable, Guard | None]:
    """Return guards of the Python state that the functions of estimators' baselines read."""
    every = (function_of(part) for e in estimators for part in parts_of(getattr(e, "baseline", None)))
    return {function: Guard.of(function) for function in every if function is not None}
