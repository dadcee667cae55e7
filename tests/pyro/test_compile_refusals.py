"""What compiled steps refuse, what they leave unchanged, how often they read a value, and the private parts they rest on."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad import (
    DecayingAverage,
    DisARM,
    ScoreFunction,
)
from pplgrad.errors import CompileError, ConfigurationError, ImpossibleValueError
from pplgrad.pyro import TraceGrad_ELBO, config_estimators
from pplgrad.pyro import _compat as internals
from pplgrad.pyro._compile import aten_recorder, backends
from pplgrad.pyro._compile.aten_recorder import Recorder
from pplgrad.pyro._compile.cuda_graphs import Replays, place_for
from pplgrad.testing.in_pyro import HOST, assert_same, fresh
from pplgrad.testing.programs import CASES
from tests.pyro.test_compile import CHEAP, LEARNED, Holder, compiled, graphs, program, step


def refused():
    """Yield (name, what the program does with its draw) for what cannot be recorded."""
    counter = Holder()
    counter.n = 0

    def branch(z):
        if z > 0:
            pyro.factor("f", z)

    def count(z):
        counter.n += 1

    yield "if", branch
    yield "item", lambda z: z.item()
    yield "list", lambda z: z.tolist()
    yield "view", lambda z: [row := torch.zeros(2), view := row[0], row.add_(z), view.item()]
    yield "copy", lambda z: pyro.factor("f", torch.tensor([z, z]).sum())
    yield "shape", lambda z: pyro.factor("f", torch.ones(2)[torch.stack([z, z]) > 0].sum())
    yield "seed", lambda z: [torch.rand(()), torch.manual_seed(0), pyro.factor("f", torch.rand(()))]
    yield "counter", count


@pytest.mark.parametrize("name", [name for name, _ in refused()])
def test_what_cannot_be_compiled_is_refused_and_named(name):
    after = dict(refused())[name]
    model, guide = program(after=after)
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile=CHEAP)
    with pytest.raises(CompileError) as caught:
        for _ in range(8):
            step(elbo, model, guide)
    message = str(caught.value)
    assert "\n" not in message
    if name != "counter":
        line = int(re.search(r"test_compile_refusals\.py:(\d+)", message).group(1))
        assert abs(line - after.__code__.co_firstlineno) <= 1
    falling = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile={**CHEAP, "fallback": True})
    with pytest.warns(UserWarning, match="go on eagerly"):
        for _ in range(8):
            found = step(falling, model, guide)
    wanted = step(TraceGrad_ELBO(estimators={"*": ScoreFunction()}), model, guide)
    assert_same(found, wanted)
    assert graphs(falling) == 0


def test_branches_that_would_draw_a_dropout_anew_are_refused():
    """One after the other, eager branches share hidden random numbers; a graph cannot."""
    dropout = torch.nn.Dropout(0.5)
    model, _ = program()

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=dropout(pyro.param("a", torch.tensor(0.2)))))

    elbo = TraceGrad_ELBO(estimators={"z": DisARM()}, compile=CHEAP)
    with pytest.raises(CompileError, match="'z'"):
        for _ in range(4):
            step(elbo, model, guide)


def test_handlers_tensors_with_a_history_and_options_are_refused():
    model, guide = program()
    with poutine.scale(scale=2.0), pytest.raises(CompileError, match="ScaleMessenger"):
        step(compiled(model, guide), model, guide)
    grown = torch.tensor(0.7, requires_grad=True).exp()
    model, guide = program(lambda x: x)
    with pytest.raises(CompileError, match="test_compile_refusals.py:.*requires a gradient"):
        elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile=CHEAP, retain_graph=True)
        for _ in range(3):
            elbo.loss_and_grads(model, guide, grown)
    for wrong in ("yes", 1.5, {"sizes": 3}):
        with pytest.raises(ConfigurationError, match="fallback"):
            TraceGrad_ELBO(compile=wrong)
    with pytest.raises(CompileError, match="no such backend|nonsense"):
        compiled(*program(), compile={"backend": "nonsense"})


def test_a_loss_that_is_not_finite_changes_nothing():
    data = [torch.tensor(0.7)]
    model, guide = program(lambda: data[0])
    guide = config_estimators(guide, {"z": ScoreFunction(DecayingAverage())})
    elbo = TraceGrad_ELBO(compile=CHEAP)
    for _ in range(4):
        step(elbo, model, guide)
    before = {name: leaf.detach().clone() for name, leaf in pyro.get_param_store().named_parameters()}
    data[0] = torch.tensor(np.nan)
    with pytest.raises(ImpossibleValueError, match="'x'"):
        step(elbo, model, guide)
    for name, leaf in pyro.get_param_store().named_parameters():
        assert leaf.grad is None and torch.equal(leaf, before[name])
    data[0] = torch.tensor(0.7)
    assert np.isfinite(step(elbo, model, guide)["loss"])


class Reads(TorchDispatchMode):
    """Counts how often a value leaves the tensors, which makes a GPU wait."""

    def __init__(self):
        super().__init__()
        self.count = 0
        outer = self

        class Lists(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                outer.count += func in (torch.Tensor.tolist, torch.Tensor.numpy)
                return func(*args, **(kwargs or {}))

        self.lists = Lists()

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.lists.__exit__(*exc)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        self.count += bool(leaves) and func is not torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


@pytest.mark.grid
@pytest.mark.parametrize("given", [False, CHEAP], ids=["eager", "compiled"])
@pytest.mark.parametrize("estimator", [LEARNED, DisARM()], ids=["learned", "disarm"])
def test_a_step_reads_one_number(given, estimator):
    """The loss, which SVI.step returns, with whatever else must be looked at in the same reading."""
    case = CASES["hierarchy"]
    fresh(case)
    model, guide = case.build(HOST)
    with pyro.validation_enabled(False):
        elbo = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator), compile=given)
        with Reads() as reads:
            for _ in range(4):  # The next one is not watched; it would be if modes of torch came and went.
                elbo.loss_and_grads(model, guide)
            reads.count = 0
            elbo.loss_and_grads(model, guide)
    assert reads.count == 1


def test_kernels_that_cannot_be_started_together_are_started_one_by_one(monkeypatch):
    def refuse(self, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replays, "_capture", refuse)
    calls = []
    replays = Replays(lambda inputs: calls.append(1) or [x + 1 for x in inputs])
    assert [replays([torch.tensor(1.0)])[0].item() for _ in range(3)] == [2.0] * 3 and len(calls) == 3


def test_what_a_cuda_graph_may_hold():
    """No graph that writes into what it reads, or into a view of it; one that writes into what it made may be."""

    def writes(function):
        recorder, x = Recorder(), torch.tensor([1.0, 2.0])
        with recorder:
            out = function(x)
        graph, _ = recorder.graph_of([out])
        assert not graph.meta["on_one_gpu"]
        return any(aten_recorder.writes_into_input(node) for node in graph.graph.nodes)

    assert not writes(lambda x: x + 1) and not writes(lambda x: (x + 1).clamp_(min=0)[0].mul_(2))
    assert (
        writes(lambda x: x.add_(1)) and writes(lambda x: x[0].add_(1) + 1) and writes(lambda x: x.unbind()[1].mul_(2))
    )


def test_copies_keep_their_strides():
    for x in (torch.randn(3, 2).mT, torch.randn(1, 3).expand(4, 3), torch.randn(4, 4)[:, ::2], torch.tensor(1.0)):
        place = place_for(x)
        assert place.stride() == x.stride() and torch.equal(place, x)
        assert place.data_ptr() != x.data_ptr()


def test_private_parts_of_torch_and_pyro():
    """Each function of `_compat.py` by itself: a version of torch or Pyro that changes one fails here."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert [leaf is x for leaf in internals.leaves_of((x * 2 + x.exp()).sum())] == [True]
    assert internals.leaves_of(torch.ones(())) == []
    assert internals.other_handlers() == []
    with poutine.trace(param_only=True), poutine.block(), poutine.mask(mask=False):
        assert internals.other_handlers() == ["MaskMessenger"]
    leaf = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive).unconstrained()
    assert internals.unconstrained()["s"] is leaf and internals.constraints() == {"s": constraints.positive}
    assert leaf is pyro.param("s").unconstrained()
    optimizer = Adam({"lr": 0.1})
    optimizer.set_state({"a": {"state": {}}})
    assert internals.loaded_state(optimizer) == {"a": {"state": {}}}
    plain = internals.settings()
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.settings() != plain
    assert callable(backends._sinking_pass()) and torch._inductor.config.post_grad_custom_pre_pass is None
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (a, 3)),))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    for backend in ("eager", "aot_eager"):
        (tripled,) = backends.compiled_graph(module, [x], backend)([x.detach()])
        assert tripled.tolist() == [3.0, 6.0] and not tripled.requires_grad


@pytest.mark.parametrize("after", [False, True], ids=["before recording", "after recording"])
def test_functions_that_are_called_with_a_gradient_are_called(after):
    model, guide = program()
    elbo = TraceGrad_ELBO(estimators={"*": DisARM()}, compile=CHEAP)
    for _ in range(6 if after else 1):
        elbo.loss_and_grads(model, guide)
    leaf, calls = next(iter(pyro.get_param_store()._params.values())), []
    leaf.register_hook(lambda gradient: gradient * 0 + 0.25)
    leaf.register_post_accumulate_grad_hook(calls.append)
    for count in range(1, 7):
        leaf.grad = None
        elbo.loss_and_grads(model, guide)
        assert (leaf.grad == 0.25).all() and len(calls) == count
