"""`config_estimators`: a guide with an estimator at each latent site, which also registers learned baselines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpyro
from numpyro.infer import ELBO, SVI

from pplgrad.baselines.neural import NeuralBaseline
from pplgrad.configuration import EstimatorMapping, configured, default_estimator, own_estimator, report_mapping
from pplgrad.core.baseline import parts_of
from pplgrad.core.estimator import Estimator
from pplgrad.core.plates import Plate
from pplgrad.engine.upstream import with_numbers
from pplgrad.estimators.auto import Auto
from pplgrad.monitoring.watch import Watch
from pplgrad.monitoring.without_effect import foreign_elbo, running_methods
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._baselines import MARK, aligned_values, network_inputs
from pplgrad.numpyro._compat import is_handed_out, marked_mutable
from pplgrad.numpyro._distributions import event_elements, values_of_element
from pplgrad.numpyro._networks import network
from pplgrad.numpyro._rerun.monitoring import register_counter
from pplgrad.numpyro._tracing.control_flow import FlowMessenger
from pplgrad.numpyro._tracing.handlers import site_info
from pplgrad.numpyro._tracing.particle_trace import TIME, TIME_DIM

REMEDY = "TraceGrad_ELBO of pplgrad.numpyro"
Guide = TypeVar("Guide", bound=Callable[..., Any])
"""A wrapped guide is called as the guide is, and has its attributes: to a type checker it is of the guide's type."""


def _training_elbo() -> object:
    """Return NumPyro's own ELBO, if `SVI` trains the guide that runs with it."""
    running = list(running_methods())
    if not any(isinstance(item, SVI) and method != "evaluate" for item, method in running):
        return None
    found = foreign_elbo(running, ELBO)
    return None if found is None else found[0]


def _noticing(mapping: EstimatorMapping) -> Callable[[Any], Any] | None:
    """Return the identity that says that a choice has no effect once somebody differentiates it; None where nothing is to be said.

    An ELBO that is called without `SVI` may be differentiated (`jax.grad`) or not. JAX asks for a derivative only where it is.
    """
    found = None if mapping.warned or not mapping.tells else foreign_elbo(running_methods(), ELBO)
    if found is None:
        return None

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def derivative(primals: tuple, tangents: tuple) -> tuple:
        report_mapping(mapping, lambda: found[0], REMEDY)
        return primals[0], tangents[0]

    return same


class EstimatorMessenger(FlowMessenger):
    """Sets `infer["estimator"]` at the latent sites that a mapping names, and marks every site that passes."""

    def __init__(self, mapping: EstimatorMapping, owner: object, noticing: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.mapping = mapping
        self._noticing = noticing
        self.seen: dict[str, Any] = {}
        self.plates: dict[str, Any] = {}
        self._owner = owner

    def copy(self) -> EstimatorMessenger:
        return EstimatorMessenger(self.mapping, self._owner, self._noticing)

    def postprocess_message(self, msg: Any) -> None:
        super().postprocess_message(msg)
        if msg["type"] == "param" and self._noticing is not None:
            same = self._noticing
            msg["value"] = jax.tree.map(
                lambda x: same(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x, msg["value"]
            )

    def process_site(self, msg: Any) -> None:
        if msg["type"] == "plate":
            self.plates[msg["name"]] = msg
        elif msg["type"] == "sample" and not msg["is_observed"]:
            self._configure(msg)

    def _configure(self, msg: Any) -> None:
        name = self.name_of(msg["name"])
        if not is_handed_out(msg):
            estimator = self.mapping.find(name)
            # The dict may be the user's own, shared between calls: never written to.
            infer = dict(msg["infer"])
            if estimator is not None:
                infer.setdefault("estimator", estimator)
            infer.setdefault("pplgrad", (self._owner, name))
            msg["infer"] = infer
        if msg["infer"].get("pplgrad") == (self._owner, name):
            self.seen[name] = msg


class ConfiguredGuide:
    """A guide with its estimators set; everything but the call is the wrapped guide's."""

    def __init__(self, guide: Callable, mapping: EstimatorMapping) -> None:
        if hasattr(guide, "__name__"):
            functools.update_wrapper(self, guide, updated=())
        self.__wrapped__ = guide
        self._mapping = mapping

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        report_mapping(self._mapping, _training_elbo, REMEDY)
        # One owner a call: the same guide may run twice in a program, under two scopes.
        messenger = EstimatorMessenger(self._mapping, object(), _noticing(self._mapping))
        with messenger:
            value = self.__wrapped__(*args, **kwargs)
        if self._mapping.watcher is not None:
            register_counter()
        # After the body, so that its draws are those of the bare guide.
        networks: Networks = {}
        for name, msg in messenger.seen.items():
            _register(name, msg, messenger, args, kwargs, networks)
        for param, (init, marks) in networks.items():
            numpyro.param(param, init, pplgrad=tuple(marks))
        return value

    def __getattr__(self, name: str) -> Any:
        if name in ("__wrapped__", "_mapping"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"config_estimators({self.__wrapped__!r}, {self._mapping.estimators!r})"


Networks = dict[str, tuple[Callable, list]]
"""How each network's parameters begin, by their name, and which sites' baselines it belongs to."""


def _register(
    name: str, msg: Any, messenger: EstimatorMessenger, args: tuple, kwargs: dict, networks: Networks
) -> None:
    """Register the parameters and the state of one site's baselines, and note its networks: lazily where they depend on the data."""
    estimator = msg["infer"].get("estimator")
    if estimator is None or isinstance(estimator, Auto):
        site = site_info(msg, name, 1)
        default = default_estimator(site, stateful=True)
        if isinstance(estimator, Auto):
            estimator, _ = estimator.choose(site, default)
        else:
            estimator = own_estimator(name, msg["infer"], site.has_rsample) or default
    if not isinstance(estimator, Estimator) or not estimator.keeps_state:
        return
    plates = _plates(msg, messenger)
    token = msg["infer"]["pplgrad"]
    dtype = jnp.result_type(float)
    for key, start in estimator.learned(event_elements(msg["fn"]), values_of_element(msg["fn"])).items():
        numpyro.param(f"{name}{MARK}{key}", jnp.asarray(start, dtype), pplgrad=((token, key),))
    for number, part in enumerate(parts_of(estimator.baseline)):
        mark = (token, str(number))
        if isinstance(part, NeuralBaseline):
            net = network(part.net, part.hidden, name)

            def init(key: jax.Array, part: NeuralBaseline = part, net: Any = net) -> Any:
                values = _values(messenger, plates)
                x = network_inputs(part, plates, _indices(messenger), args, kwargs, values, dtype)
                return net.init(key, with_numbers(OPS, x, part.numbers(name)))

            networks.setdefault(f"{part.owner(name)}{MARK}{number}", (init, []))[1].append(mark)
        shapes = part.state_shapes(plates)
        if shapes:
            state = {key: jnp.zeros(shape, dtype) for key, shape in shapes.items()}
            marked_mutable(f"{name}{MARK}{number}.state", state, mark)


def _plates(msg: Any, messenger: EstimatorMessenger) -> tuple[Plate, ...]:
    batch, plates = tuple(msg["fn"].batch_shape), messenger.plates
    scanned = messenger.is_stacked(msg)
    result = [
        Plate(f.name, f.dim, f.size, plates[f.name]["args"][0] if f.name in plates else f.size)
        for f in msg["cond_indep_stack"]
        if -f.dim <= len(batch) - scanned and batch[f.dim] == f.size
    ]
    if scanned:
        result.append(Plate(TIME, TIME_DIM, batch[0], batch[0], time=True))
    return tuple(result)


def _indices(messenger: EstimatorMessenger) -> dict[str, Any]:
    return {name: msg["value"] for name, msg in messenger.plates.items() if msg["value"].shape[0] != msg["args"][0]}


def _values(messenger: EstimatorMessenger, plates: tuple[Plate, ...]) -> dict[str, Any]:
    values = {name: (msg["value"][None], msg["fn"].event_dim) for name, msg in messenger.seen.items()}
    return aligned_values(values, plates)


@overload
def config_estimators(guide: Mapping[str, Estimator], *, watch: Watch | None = None) -> Callable[[Guide], Guide]: ...
@overload
def config_estimators(
    guide: None = None, estimators: Mapping[str, Estimator] | None = None, *, watch: Watch | None = None
) -> Callable[[Guide], Guide]: ...
@overload
def config_estimators(
    guide: Guide, estimators: Mapping[str, Estimator] | None = None, *, watch: Watch | None = None
) -> Guide: ...
def config_estimators(guide: Any = None, estimators: Any = None, *, watch: Any = None) -> Any:
    """Return the guide with an estimator for each latent site that `estimators` names.

    Precedence, highest first: `TraceGrad_ELBO(estimators=...)`, the site's `infer={"estimator": ...}`, the inner wrapper, the outer
    wrapper. Within a mapping, an exact name is tried before the patterns, and patterns are tried in their order. Sites without a
    configuration get the default. The wrapper estimates nothing itself.

    The wrapper also registers the parameters and the mutable state of learned and averaged baselines, after the guide's body, so that
    `SVI` keeps, saves and trains them. Only a wrapped guide can have such baselines; an empty mapping is sufficient.

    Args:
        guide: the guide, a callable. Without it, or with the mapping in its place, a decorator is returned.
        estimators: mapping from site names and glob patterns to estimators.
        watch: a `Watch`, which measures the gradient at each site while `TraceGrad_ELBO` trains the guide. Default: None.

    Returns:
        The wrapped guide, or a decorator. Attributes of the guide stay reachable.

    Shapes:
        Those of the guide, unchanged.

    Raises:
        ConfigurationError: a value is not an estimator, `guide` is not callable, or `watch` is not a `Watch`. The ELBO reports a key that
            matches no site.

    Example:
        >>> from pplgrad import ScoreFunction
        >>> guide = config_estimators(lambda: None, {"z": ScoreFunction()})
        >>> guide() is None
        True

    References:
        The name follows `config_enumerate`, the corresponding wrapper for enumeration.
    """
    return configured(guide, estimators, watch, ConfiguredGuide)
