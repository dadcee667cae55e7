"""Graphs whose stacks of numbers are taken apart compute what they did."""

from dataclasses import replace

import pytest
import torch

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._compile import scalarization
from pplgrad.pyro._compile.aten_recorder import Recorder
from pplgrad.pyro._compile.scalarization import scalarize
from pplgrad.testing.in_pyro import HOST, fresh
from pplgrad.testing.programs import CASES
from tests.pyro.compiling import assert_like_eager, taken_apart, train

aten = torch.ops.aten
WEIGHTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def numbers():
    """Return four numbers as tensors that a step would read."""
    return [x.clone() for x in torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]


def apart(function, inputs):
    """Return a function's graph after its stacks were taken apart, with whether they were, and its inputs."""
    with Recorder() as recorder:
        outputs = function(*inputs)
    graph, captured = recorder.graph_of([outputs] if isinstance(outputs, torch.Tensor) else outputs)
    done = scalarize(graph)
    return graph, done, [x.tensor for x in captured]


def assert_same(function, inputs, done=True):
    """Compare values, shapes and dtypes of a function with those of its graph, and return what the graph calls."""
    wanted = function(*inputs)
    graph, found, read = apart(function, inputs)
    assert found == done
    for x, y in zip(graph(*read), [wanted] if isinstance(wanted, torch.Tensor) else wanted, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def stack(*xs, dim=0):
    """Return numbers as a stack of shape (n, 1), as an ELBO of one particle has it, or (1, n)."""
    return torch.stack([x[None] for x in xs], dim)


FOLLOWED = {
    "sum": lambda *xs: stack(*xs).sum(),
    "sum of rows": lambda *xs: stack(*xs).sum(0),
    "sum within": lambda *xs: (stack(*xs) * 2).sum(-1)[2],
    "sum that keeps dimensions": lambda *xs: stack(*xs).sum(0, keepdim=True),
    "sum within that keeps dimensions": lambda *xs: stack(*xs).sum(1, keepdim=True)[1],
    "sum of all with dimensions": lambda *xs: stack(*xs).sum((0, 1), keepdim=True),
    "cumsum": lambda *xs: stack(*xs).cumsum(0)[2],
    "cumsum within": lambda *xs: (stack(*xs).cumsum(1) * 2).sum(),
    "flip": lambda *xs: stack(*xs).flip(0)[0],
    "flip of both": lambda *xs: stack(*xs).flip(0, 1)[1],
    "flip within": lambda *xs: stack(*xs).flip(1)[1],
    "transposed": lambda *xs: stack(*xs).T[0, 1],
    "permuted": lambda *xs: stack(*xs)[None].permute(1, 2, 0)[3],
    "along the second dimension": lambda *xs: stack(*xs, dim=1).cumsum(-1)[:, 2],
    "select within": lambda *xs: stack(*xs).select(1, 0)[-1],
    "squeezed": lambda *xs: stack(*xs).squeeze(1)[1],
    "squeezed where rows are": lambda *xs: stack(*xs).squeeze(0)[1],
    "unsqueezed": lambda *xs: stack(*xs).unsqueeze(0).unsqueeze(-1).sum((0, 1)),
    "times numbers and rows": lambda *xs: (2.5 * stack(*xs) * xs[0] + stack(*xs).exp()).sum(),
    "times a vector": lambda *xs: (stack(*xs) * xs[0].expand(1)).sum(),
    "where": lambda *xs: torch.where(stack(*xs) > 0, stack(*xs), 0.0).sum(),
    "expanded to itself": lambda *xs: stack(*xs).expand(4, 1)[1],
    "taken as another dtype": lambda *xs: stack(*xs).to(torch.float32)[3],
    "reward to go": lambda *xs: (stack(*xs, dim=1) * stack(*xs[::-1]).cumsum(0).flip(0).permute(1, 0)).sum(),
    "two stacks": lambda *xs: [(stack(*xs) + stack(*xs[::-1])).sum(), stack(*xs).cumsum(0)[1]],
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name):
    called = assert_same(FOLLOWED[name], numbers())
    assert aten.stack.default not in called
    assert not {aten.cumsum.default, aten.flip.default, aten.permute.default} & {*called}


KEPT = {
    "times a matrix": lambda *xs: (2 * stack(*xs, dim=1) * torch.arange(8.0, dtype=torch.float64).reshape(2, 4)).sum(1),
    "beside a column": lambda *xs: (2 * stack(*xs, dim=1) + xs[1].expand(3, 1)).sum(1),
    "a product": lambda *xs: WEIGHTS @ (2 * stack(*xs)),
    "a product after a sum": lambda *xs: WEIGHTS @ stack(*xs).cumsum(0).flip(0),
    "expanded": lambda *xs: stack(*xs).cumsum(0).expand(4, 3) * 2,
    "viewed": lambda *xs: (stack(*xs) + 1).reshape(2, 2).sum(0),
    "stacked again": lambda *xs: torch.stack([stack(*xs) * 2, stack(*xs)]),
    "integers, whose sum is of another dtype": lambda *xs: (stack(*xs) > 0).sum(),
    "truth values added up": lambda *xs: (stack(*xs) > 0).cumsum(0),
    "a sum with a dtype": lambda *xs: (stack(*xs) * 2).sum(0, dtype=torch.float32),
    "two dtypes": lambda *xs: torch.stack(xs).to(torch.float32).mul(2) * xs[0],
    "rows that meet in two dimensions": lambda *xs: (stack(*xs) * 2) * (stack(*xs, dim=1) + 1),
    "drawn from": lambda *xs: torch.stack(xs).sigmoid().mul(0).bernoulli(),
    "returned": lambda *xs: [stack(*xs) * 2, stack(*xs)],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_needs_the_stack(name):
    assert aten.stack.default in assert_same(KEPT[name], numbers())


def test_draws_are_the_same_in_the_same_order():
    def function(*xs):
        first = torch.bernoulli(torch.stack(xs).sigmoid())
        rows = torch.stack([torch.bernoulli(x.sigmoid()) for x in xs])
        return [rows.cumsum(0)[2], first, torch.rand(3)]

    torch.manual_seed(0)
    graph, done, read = apart(function, numbers())
    assert done
    torch.manual_seed(5)
    wanted = function(*numbers())
    torch.manual_seed(5)
    assert all(torch.equal(x, y) for x, y in zip(graph(*read), wanted, strict=True))


def gradient_of_elements(length, used):
    """Return a function whose gradient to a vector is made of gradients to its elements."""

    def function(vector):
        vector = vector.detach().requires_grad_()
        loss = sum(((i + 1) * vector[i] ** 2 for i in used), torch.zeros((), dtype=torch.float64))
        return torch.autograd.grad(loss, vector)[0]

    return function


@pytest.mark.parametrize(
    ("length", "used", "done"),
    [
        (3, (0, 1, 2, 1, -1), True),
        (3, (0, 2), True),
        (5, (4, 1, 0), True),
        (7, (1, 2, 3), False),
        (scalarization._LONGEST + 1, range(scalarization._LONGEST + 1), False),
    ],
)
def test_gradients_of_elements(length, used, done):
    vector = torch.randn(length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    called = assert_same(gradient_of_elements(length, used), [vector], done)
    assert (aten.select_backward.default in called) != done


def test_rows_of_zeros_reach_other_operations():
    def function(vector):
        found = gradient_of_elements(4, (0, 1, 3))(vector)
        return [found * 2, found.cumsum(0), found + vector]

    assert_same(function, [numbers()[0] * torch.arange(1.0, 5.0, dtype=torch.float64)])


def test_graphs_that_stay_as_they_are():
    def writes(*xs):
        rows = torch.stack(xs)
        rows[0] = 0
        return rows.cumsum(0)[1]

    assert aten.cumsum.default in assert_same(writes, numbers(), False)
    assert aten.cumsum.default in assert_same(lambda x: x.cumsum(0), [WEIGHTS], False)
    # Stacks of arrays: what is done to all of them at once is better done so.
    assert aten.sum.dim_IntList in assert_same(lambda *xs: torch.stack(xs).sum(0), [WEIGHTS, WEIGHTS + 1], False)


def not_reversed(apart, node, x):
    return x


def without_the_own_row(apart, node, x):
    return replace(x, rows=(apart.make(aten.zeros_like.default, x.rows[0]), *apart.sums(x.rows)[:-1]))


def without_the_last_row(apart, node, x):
    return apart.make(aten.sum.default, apart.sums(x.rows)[-2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rule"),
    [
        (aten.flip.default, not_reversed),
        (aten.cumsum.default, without_the_own_row),
        (aten.sum.default, without_the_last_row),
    ],
)
def test_a_broken_rule_is_caught(target, rule, monkeypatch):
    monkeypatch.setitem(scalarization._RULES, target, rule)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_like_eager(CASES["chain"], estimators={"*": ScoreFunction()})


def test_a_chain_of_sites_is_computed_with_numbers_alone():
    case = CASES["chain"]
    fresh(case)
    seen = []

    def backend(graph, inputs):
        graph = taken_apart(graph, inputs)
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile={"backend": backend})
    train(elbo, *case.build(HOST))
    assert seen
    assert not {aten.cumsum.default, aten.flip.default, aten.select_backward.default} & {*seen}
    # The loss, and the gradients of the model's and of the guide's parameter.
    assert seen.count(aten.stack.default) == 3
