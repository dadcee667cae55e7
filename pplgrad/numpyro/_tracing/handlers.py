"""The effect handlers around a program: their effect on each site, and the properties of a site that its estimator receives."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, Objective
from pplgrad.core.site_info import SiteInfo
from pplgrad.engine.checks import refuse_model_estimator
from pplgrad.errors import ProgramError
from pplgrad.estimators.mixtures import MixturePath
from pplgrad.estimators.relaxed import Relaxation
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._compat import hand_out_changes, is_handed_out, is_scan, replay_branches, unmasked
from pplgrad.numpyro._compat_jax import mark, reused, tag
from pplgrad.numpyro._distributions import categories, elements, family, is_count, is_relaxable, is_reparameterized
from pplgrad.numpyro._logits import with_stable_logits
from pplgrad.numpyro._mixtures import components, mixture
from pplgrad.numpyro._tracing.control_flow import FlowMessenger
from pplgrad.numpyro._tracing.relaxations import Extended, extended_in_model, is_extended, relaxed, stacked

Resolve = Callable[[str, Any, FlowMessenger], Estimator]
"""From a site's name, its message, and the messenger that says in which bodies of control flow it stands to its estimator."""

Intervene = Callable[[str, Any, jax.Array, FlowMessenger], None]
"""Changes a latent site's message (the value that the program goes on with, and its density), given its name, a key, and the messenger that
says in which bodies of control flow it stands, and which step runs."""


class OffZero(FlowMessenger):
    """Stands around a program whose densities are differentiated: mends what the host gets wrong at log odds of zero."""

    def copy(self) -> OffZero:
        return OffZero()

    def process_site(self, msg: Any) -> None:
        stabilize_logits(msg)


def stabilize_logits(msg: Any) -> None:
    """Give a sample site a density with the right derivative at log odds of zero; one handed out of a body has it already."""
    if msg["type"] == "sample" and not is_handed_out(msg):
        msg["fn"] = with_stable_logits(msg["fn"])


class SiteMessenger(FlowMessenger):
    """Sees every site: binds estimators (in the guide), makes their draws constant, and tags all latent values."""

    def __init__(
        self,
        resolve: Resolve | None,
        estimators: dict[str, Estimator],
        key: jax.Array,
        intervene: Intervene | None = None,
        extended: set[str] | None = None,
        arguments: tuple[tuple, Mapping[str, Any]] = ((), {}),
        drawn: Collection[str] = (),
    ) -> None:
        super().__init__()
        # What the guide draws, where this one stands in the model.
        self._drawn = drawn
        self._arguments = arguments
        self._key = key
        # Sites whose densities are extended to weights: noted in the guide, obeyed in the model.
        self.extended: set[str] = set() if extended is None else extended
        self._resolve = resolve
        self._estimators = estimators
        self._intervene = intervene

    def copy(self) -> SiteMessenger:
        return SiteMessenger(
            self._resolve, self._estimators, self._key, self._intervene, self.extended, self._arguments, self._drawn
        )

    def enter_bodies(self, msg: Any, inner: FlowMessenger) -> None:
        if self._resolve is None:
            replay_branches(msg)
        elif self._intervene is not None and is_scan(msg):
            inner.count_steps(msg)

    def process_site(self, msg: Any) -> None:
        stabilize_logits(msg)
        if msg["type"] == "sample" and is_handed_out(msg) and isinstance(unmasked(msg["fn"]), Extended):
            msg["fn"] = stacked(msg["fn"])
        elif msg["type"] == "sample" and self._resolve is None:
            name = self.name_of(msg["name"])
            if name in self.extended:
                msg["fn"] = extended_in_model(name, msg["fn"], self.inside)
        if not self.inside:
            return
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            if subsample_size is not None and subsample_size != size:
                raise ProgramError(
                    f"Plate '{msg['name']}' is subsampled inside a scan, where guide and model would draw different "
                    "elements; draw the minibatch outside the scan and pass it in as data."
                )
        elif msg["type"] == "sample" and not msg["is_observed"] and self._resolve is None:
            outside = self.name_of(msg["name"])
            if outside != msg["name"]:
                raise ProgramError(
                    f"Site '{outside}' is drawn in the body of a scan or cond that the model runs under "
                    "handlers.scope, where NumPyro cannot replay the guide's value; put the scope inside the body."
                )

    @property
    def changes_draws(self) -> bool:  # type: ignore[override]
        return self._resolve is not None

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow" and self.changes_draws:
            hand_out_changes(msg)
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        name = self.name_of(msg["name"])
        if self.is_stacked(msg):
            return
        if self._resolve is not None:
            if name not in self._estimators:
                self._estimators[name] = self._resolve(name, msg, self)
            if name not in self.extended or not is_handed_out(msg):
                make_constant(msg, self._estimators[name])
            if not is_handed_out(msg):
                self._change(name, msg)
        elif name not in self._drawn:
            msg["value"] = mark(name, msg["value"])
            return
        msg["value"] = tag(name, msg["value"])

    def _change(self, name: str, msg: Any) -> None:
        """Relax a draw, give that of a mixture its gradient, or let it be changed from outside."""
        estimator, value, fn = self._estimators[name], msg["value"], msg["fn"]
        # A value that was put there came without a key of its own.
        key = msg["kwargs"].get("rng_key")
        key = site_key(self._key, name) if key is None else key
        if isinstance(estimator, Relaxation):
            msg["value"], msg["fn"] = relaxed(name, fn, value, estimator.at(*self._arguments), key)
        elif isinstance(estimator, MixturePath):
            # NumPyro hands on which component has drawn the value, which its density does not read.
            msg["value"], msg["intermediates"] = estimator.moved(OPS, mixture(fn, value)), []
        if self._intervene is not None:
            self._intervene(name, msg, key, self)
        if is_extended(msg["fn"]):
            self.extended.add(name)
        if self.inside and msg["value"] is not value:
            self.changed[msg["name"]] = msg["value"], None if msg["fn"] is fn else msg["fn"]


class SummingMessenger(SiteMessenger):
    """Sees every site of a model in which sites are summed out as `plan` says: tags the guide's draws, and all values of summed sites."""

    def __init__(self, key: jax.Array, extended: set[str], plan: Any) -> None:
        super().__init__(None, {}, key, None, extended, drawn=plan.drawn_outside)
        self._plan = plan

    def copy(self) -> SummingMessenger:
        return SummingMessenger(self._key, self.extended, self._plan)

    def enter_bodies(self, msg: Any, inner: FlowMessenger) -> None:
        super().enter_bodies(msg, inner)
        if self.inside:
            return
        self._plan.hand_in(msg, inner)

    def postprocess_message(self, msg: Any) -> None:
        # What goes into an enumerated scan was tagged before it: nothing is tagged there.
        if msg["type"] != "sample":
            super().postprocess_message(msg)
            return
        if self._plan.is_summed(msg):
            if not (self.inside or is_handed_out(msg)):
                msg["value"] = tag(msg["name"], msg["value"])
        elif not self._plan.in_scan(self.name_of(msg["name"])):
            super().postprocess_message(msg)


def make_constant(site: Any, estimator: Estimator) -> None:
    """Make a draw constant to differentiation if its estimator uses the score."""
    if estimator.uses_score:
        site["value"] = jax.lax.stop_gradient(site["value"])
        # What a transform cached on the way forward would carry gradient past the constant.
        site["intermediates"] = []


class ModelInferMessenger(FlowMessenger):
    """Stands innermost in the model, where `infer` is still the model's own; `summed` are the sites that it is to enumerate."""

    def __init__(self, summed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self._summed = summed
        # Sites of which NumPyro's `config_kl` asks for the divergence in closed form.
        self.divergences: set[str] = set()

    def copy(self) -> ModelInferMessenger:
        other = ModelInferMessenger(self._summed)
        other.divergences = self.divergences
        return other

    def process_site(self, msg: Any) -> None:
        if msg["type"] == "sample" and not is_handed_out(msg):
            refuse_model_estimator(msg)
            if msg["infer"].get("kl") == "analytic":
                self.divergences.add(self.name_of(msg["name"]))
            if self._summed:
                wanted = self.name_of(msg["name"]) in self._summed and not msg["is_observed"]
                msg["infer"] = {**msg["infer"], "enumerate": "parallel" if wanted else None}


def site_key(key: jax.Array, name: str) -> jax.Array:
    """Return a site's own part of a key."""
    return jax.random.fold_in(reused(key), zlib.crc32(name.encode()))


def site_info(
    msg: Any,
    name: str,
    particles: int,
    where: FlowMessenger | None = None,
    objective: Objective = ELBO(),  # noqa: B008
) -> SiteInfo:
    """Return what an estimator needs to know of a site, from its message."""
    fn = msg["fn"]
    plates = {frame.dim for frame in msg["cond_indep_stack"]}
    # A distribution of the user's own may not say what its support is.
    is_discrete = bool(getattr(fn.support, "is_discrete", False))
    count, conditionals = components(fn) or (None, False)
    return SiteInfo(
        name,
        family(fn),
        is_reparameterized(fn),
        is_discrete,
        particles,
        categories(fn),
        where is not None and where.inside,
        is_relaxable(fn),
        elements(fn, plates),
        objective,
        elements(fn, ()),
        nested=where is not None and where.nested,
        is_count=is_count(fn),
        components=count,
        conditionals=conditionals,
    )
