"""Draws of a gradient at fixed parameters, for the measurement and comparison of estimators."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pplgrad.configuration import unwatched
from pplgrad.core.objectives import Objective
from pplgrad.core.program import Program
from pplgrad.diagnostics.checking import NO_PARAMETERS, RARE, UNITS
from pplgrad.errors import ProgramError
from pplgrad.pyro._baselines import is_baseline_param
from pplgrad.pyro._compat import unconstrained
from pplgrad.pyro._distributions import finite_parts, unmasked
from pplgrad.pyro._optim import split_optimizer
from pplgrad.pyro._rerun.enumeration import Fixed, exact_gradient, latents, log_q_and_objective, traces_at

_LOOKS = 8
"""Runs from which the parameters, and those that each site reads, are known."""


class Gradients:
    """Draws of an ELBO's gradient at the parameters in the param store, as flat vectors.

    Each draw is g = (∂L/∂θ_1, ..., ∂L/∂θ_n), one estimate of the gradient of the loss L (the negative objective, in nats) with respect to
    the unconstrained parameters θ, all of them in one vector. `blocks` maps each parameter's name to its coordinates in g. `sites` maps
    each latent site to the coordinates of the parameters that its density reads.

    The object is a context manager that leaves everything as it was. Inside it, parameters that the program registers and state that
    baselines keep are in the param store. On leaving, values, gradients and the random generator are put back.

    Args:
        program: the `Program`: model, guide and their arguments.
        seed: seed of the random generator inside the context. Default: 0.

    Shapes:
        A draw has shape (1, parameters), in double precision. The gradient is in nats per unit of the unconstrained parameters.

    Raises:
        ProgramError: the program has no parameters.

    Example:
        >>> import numpy as np, pyro, pyro.distributions as dist, torch
        >>> from pplgrad.core.program import Program
        >>> from pplgrad.pyro import TraceGrad_ELBO
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
        >>> with Gradients(Program(model, guide, (), {})) as gradients:
        ...     draws = np.concatenate(list(gradients.draws(TraceGrad_ELBO())(10, 0)))
        ...     names = list(gradients.blocks), list(gradients.sites())
        >>> draws.shape, names
        ((10, 1), (['a'], ['z']))
    """

    def __init__(self, program: Program, seed: int = 0) -> None:
        self.program = program
        self._seed = seed
        self.leaves: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Gradients:
        self._store = pyro.get_param_store()
        self._names = set(unconstrained())
        self._before: dict[str, tuple] = {}
        for name, leaf in unconstrained().items():
            self._keep(name, leaf)
        self._fork = torch.random.fork_rng()
        self._fork.__enter__()
        try:
            torch.manual_seed(self._seed)
            for _ in range(_LOOKS):
                with torch.no_grad(), poutine.trace(param_only=True) as seen:
                    trace = poutine.trace(self.program.guide).get_trace(*self.program.args, **self.program.kwargs)
                    poutine.replay(self.program.model, trace=trace)(*self.program.args, **self.program.kwargs)
                for name, node in seen.trace.nodes.items():
                    if node["type"] == "param" and not is_baseline_param(name):
                        self._remember(name, node["value"].unconstrained())
            if not self.leaves:
                raise ProgramError(NO_PARAMETERS)
        except BaseException:
            self._restore()
            raise
        return self

    def _remember(self, name: str, leaf: torch.Tensor) -> None:
        if leaf.requires_grad and name not in self.leaves:
            # A module's parameters outlive the store, and are put back too.
            self._keep(name, leaf)
            self.leaves[name] = leaf

    def _keep(self, name: str, leaf: torch.Tensor) -> None:
        """Remember a parameter's value and gradient; what is added to a gradient in place would be added to the user's."""
        if name not in self._before:
            self._before[name] = (leaf, leaf.detach().clone(), leaf.grad)
            leaf.grad = None

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        self._fork.__exit__(None, None, None)
        for name in [name for name in unconstrained() if name not in self._names]:
            del self._store[name]
        for leaf, value, gradient in self._before.values():
            with torch.no_grad():
                if not torch.equal(leaf, value):
                    leaf.copy_(value)
            leaf.grad = gradient

    @property
    def blocks(self) -> dict[str, np.ndarray]:
        """The coordinates of each parameter in the flat vector."""
        result, start = {}, 0
        for name, leaf in self.leaves.items():
            result[name] = np.arange(start, start + leaf.numel())
            start += leaf.numel()
        return result

    def sites(self) -> dict[str, np.ndarray]:
        """Return, for each latent site of the guide, the coordinates of the parameters that its density reads."""
        total = sum(leaf.numel() for leaf in self.leaves.values())
        found: dict[str, np.ndarray] = {}
        for _ in range(_LOOKS):
            with torch.no_grad():
                drawn = poutine.trace(self.program.guide).get_trace(*self.program.args, **self.program.kwargs)
            trace = poutine.trace(Fixed(latents(drawn))(self.program.guide)).get_trace(
                *self.program.args, **self.program.kwargs
            )
            for name in latents(trace):
                site = trace.nodes[name]
                if poutine.util.site_is_subsample(site):
                    continue
                read = np.zeros(total, bool)
                log_prob = unmasked(site["fn"]).log_prob(site["value"]).sum()
                if log_prob.requires_grad:
                    # Sites may share a part of the program, such as the network of an encoder.
                    slopes = torch.autograd.grad(
                        log_prob, list(self.leaves.values()), retain_graph=True, allow_unused=True
                    )
                    read = self.flat(slopes) != 0
                found[name] = found.get(name, np.zeros(total, bool)) | read
        return {name: np.flatnonzero(read) for name, read in found.items()}

    def flat(self, gradients: Any) -> np.ndarray:
        """Return gradients with respect to the leaves, None for zero, as one vector."""
        pairs = zip(gradients, self.leaves.values(), strict=True)
        parts = [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]
        return torch.cat([part.detach().reshape(-1) for part in parts]).cpu().double().numpy()

    def draws(self, elbo: Any, chunk: int = 1) -> Callable[[int, int], Iterator[np.ndarray]]:
        """Return a function from a number of draws and a seed to draws of an ELBO's gradient.

        Args:
            elbo: an ELBO with `loss_and_grads`, which is called once for each draw.
            chunk: without effect: each chunk has one draw.

        Returns:
            A function of (count, seed) that yields `count` arrays of shape (1, parameters).
        """
        mine = copy.copy(elbo)

        def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
            torch.manual_seed(seed)
            for _ in range(count):
                for leaf in self.leaves.values():
                    leaf.grad = None
                with unwatched():
                    mine.loss_and_grads(
                        self.program.model, self.program.guide, *self.program.args, **self.program.kwargs
                    )
                yield self.flat([leaf.grad for leaf in self.leaves.values()])[None]

        return chunks

    def peak_bytes(self, elbo: Any, chunk: int = 1) -> int:
        """Return the peak memory, in bytes, of the tensors that one gradient computation makes, without parameters and data."""
        draw = self.draws(elbo)
        with Memory() as memory:
            next(draw(1, 0))
        return memory.peak

    def warm_up(self, elbo: Any, steps: int, learning_rate: float = 1e-2) -> None:
        """Run training steps that hold the program's parameters, so that the estimator learns what it learns."""
        rates = split_optimizer(SGD({"lr": 0.0}), Adam({"lr": learning_rate}))
        svi = SVI(self.program.model, self.program.guide, rates, elbo)
        with unwatched():
            for _ in range(steps):
                svi.step(*self.program.args, **self.program.kwargs)

    def learned(self) -> dict[str, torch.Tensor]:
        """Remove from the param store what estimators have put there since the context began, and return it."""
        found = {}
        for name, leaf in unconstrained().items():
            if is_baseline_param(name) and name not in self._names:
                found[name] = leaf.detach().clone()
                del self._store[name]
        return found

    def recall(self, learned: Mapping[str, torch.Tensor]) -> None:
        """Replace what estimators keep in the param store by what `learned` has returned."""
        self.learned()
        for name, value in learned.items():
            self._store[name] = value.clone()

    def _drawn(self) -> dict[str, torch.Tensor]:
        """Return what guide and model draw."""
        with torch.no_grad():
            drawn = poutine.trace(self.program.guide).get_trace(*self.program.args, **self.program.kwargs)
            model = poutine.trace(poutine.replay(self.program.model, trace=drawn)).get_trace(
                *self.program.args, **self.program.kwargs
            )
        return {**latents(model), **latents(drawn)}

    def unseen_error(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each coordinate, what a mean of so many draws may be off by without a trace in their variance.

        The first part is rounding of the numbers that cancel in a draw: |∇ Σ log q| Σ|log density|, over the sites without a reparameterized
        sampler, plus |∇ Σ log density|. The second is values of probability p that no draw may have met: |∇ Σ p log q| times the objective.
        """
        leaves = list(self.leaves.values())
        errors = np.zeros((2, sum(leaf.numel() for leaf in leaves)))
        units = UNITS * self.rounding**2
        for _ in range(_LOOKS):
            guide, model = traces_at(self.program, self._drawn())
            sites = [guide.nodes[name] for name in latents(guide) if not guide.nodes[name]["fn"].has_rsample]
            scores = [unmasked(site["fn"]).log_prob(site["value"]).sum() for site in sites]
            rare = [_of_rare_values(unmasked(site["fn"]), RARE / draws) for site in sites]
            mine, others = (
                [x["log_prob_sum"] for x in t.nodes.values() if "log_prob_sum" in x] for t in (guide, model)
            )
            counts = [float(x.detach()) for x in others], [float(x.detach()) for x in mine]
            size, whole = sum(map(abs, sum(counts, []))), abs(sum(counts[0]) - sum(counts[1]))
            for row, numbers, weight in ((0, scores, units * size), (0, [*mine, *others], units), (1, rare, whole)):
                summed: Any = sum(numbers)
                if numbers and summed.requires_grad:
                    slopes = torch.autograd.grad(summed, leaves, retain_graph=True, allow_unused=True)
                    errors[row] += weight * np.abs(self.flat(slopes)) / _LOOKS
        return errors[0], errors[1]

    def whole_score(self, objective: Any, particles: int = 4) -> Callable[[int, int], Iterator[np.ndarray]]:
        """Return draws of a plain unbiased gradient, which shares no code with the estimators.

        It is the score of the joint log density of all latent sites, times the whole objective minus the mean over the other particles.
        """

        def one() -> tuple[torch.Tensor, torch.Tensor]:
            return log_q_and_objective(self.program, self._drawn(), objective)

        def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
            torch.manual_seed(seed)
            for _ in range(count):
                pairs = [one() for _ in range(particles)]
                total = sum(value for _, value in pairs).detach()  # type: ignore[union-attr]
                surrogate = sum(
                    log_q * (value.detach() * particles - total) / (particles - 1) + value for log_q, value in pairs
                )
                loss = -surrogate / particles  # type: ignore[operator]
                yield self.flat(torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True))[None]

        return chunks

    def exact_gradient(self, objective: Objective, particles: int, limit: int) -> np.ndarray:
        """Return the gradient of the enumerated loss, or raise `TooManyOutcomes`."""
        return exact_gradient(self.program, list(self.leaves.values()), self.flat, objective, particles, limit)

    @property
    def rounding(self) -> float:
        """The part of the gradient's norm that may be rounding error."""
        return max((float(torch.finfo(leaf.dtype).eps) for leaf in self.leaves.values()), default=1e-16) ** 0.5


def _of_rare_values(fn: Any, most: float) -> torch.Tensor:
    """Return Σ p log p over the values of a site whose probability is below `most`; its gradient takes the first p for a constant."""
    parts = finite_parts(fn)
    if parts is None:
        return torch.zeros(())
    base, support = parts
    shape = (len(support), *(1 for _ in base.batch_shape), *base.event_shape)
    log_p = base.log_prob(support.reshape(shape))
    p = log_p.detach().exp()
    # A value of probability 0 is never drawn.
    return (p * log_p)[(p > 0) & (p < most)].sum()


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            # What was there before is not of this gradient's making, nor are views of it.
            if isinstance(given, torch.Tensor):
                self._known.add(given.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        where, size = storage._cdata, storage.nbytes()
        if where in self._known:
            return
        self._known.add(where)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, where, size)

    def _forget(self, where: int, size: int) -> None:
        self._known.discard(where)
        self.now -= size
