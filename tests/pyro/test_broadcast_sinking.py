"""Graphs in which nothing is computed twice along an expanded dimension compute what they did."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from pplgrad.pyro._compile import broadcast_sinking
from pplgrad.pyro._compile.broadcast_sinking import sink_broadcasts

aten = torch.ops.aten
DRAWS, ROW, COLUMN, ONE = (
    torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, shape in enumerate([(5, 4, 3), (3,), (4, 1), ()])
)


def wide(x):
    return x.expand(5, 4, 3)


def traced(function, *inputs):
    """Return a function's graph, without writes and with the shapes of its values."""
    return make_fx(torch.func.functionalize(function), tracing_mode="fake")(*inputs)


def elements(graph, target):
    """Return how many elements an operation computes, calls added up."""
    return sum(node.meta["val"].numel() for node in graph.graph.nodes if node.target is target)


def both(function, *inputs):
    """Return a function's graph as it is and with nothing computed twice, and compare what they compute, bit by bit."""
    plain, found = traced(function, *inputs), traced(function, *inputs)
    sink_broadcasts(found.graph)
    found.graph.lint()
    found.recompile()
    torch.manual_seed(0)
    wanted = plain(*inputs)
    torch.manual_seed(0)
    now = found(*inputs)
    assert now.dtype == wanted.dtype and now.shape == wanted.shape
    assert torch.equal(now, wanted)
    for node in found.graph.nodes:
        if node.target in (aten.exp.default, aten.add.Tensor):
            assert node.meta["val"].shape == torch.broadcast_shapes(
                *(x.meta["val"].shape for x in node.all_input_nodes)
            )
    return plain, found


# A function of draws, a row and a column, and how many elements its exponentials have: before, after.
NARROWED = {
    "of an expanded row": (lambda z, r, c: wide(r).exp() * z, 60, 3),
    "of a column": (lambda z, r, c: wide(c).exp() - z, 60, 4),
    "of both": (lambda z, r, c: (wide(r) + wide(c)).exp() * z, 60, 12),
    "in steps": (lambda z, r, c: wide(r.expand(4, 3)).abs().neg().exp().log1p() * z, 60, 3),
    "with the draws": (lambda z, r, c: (wide(r) * z).exp(), 60, 60),
    "of a condition": (lambda z, r, c: torch.where(wide(r) > 0, wide(r).exp(), wide(c)).exp() + z, 120, 15),
    "read expanded too": (lambda z, r, c: wide(r).exp() * z + wide(r).exp().cumsum(0), 120, 63),
    "summed": (lambda z, r, c: wide(r).exp().sum(0) * z, 60, 60),
    "copied and reshaped": (lambda z, r, c: wide(r).exp().clone().view(20, 3)[:5, None] * z, 60, 60),
    "of whole numbers": (lambda z, r, c: wide((r * 3).long()).abs().exp() * z, 60, 3),
    "of another dtype": (lambda z, r, c: (wide(r.float()).exp() + z).exp(), 120, 63),
    "not expanded": (lambda z, r, c: r.exp() * z, 3, 3),
    "expanded to itself": (lambda z, r, c: z.expand(5, 4, 3).exp(), 60, 60),
}


@pytest.mark.parametrize("name", NARROWED)
def test_nothing_is_computed_twice(name):
    function, before, after = NARROWED[name]
    plain, found = both(function, DRAWS, ROW, COLUMN)
    assert (elements(plain, aten.exp.default), elements(found, aten.exp.default)) == (before, after)


def test_random_numbers_stay_as_many():
    both(lambda r: torch.rand_like(wide(r)) < wide(r).sigmoid(), ROW)
    both(lambda r: torch.bernoulli(wide(r).sigmoid()), ROW)


def test_a_number_without_dimensions_decides_on_no_dtype():
    """Beside a float32 array a float64 number is float32, and the same number expanded is not."""
    both(lambda x, one: one.expand(3) * x.float(), ROW, ONE)


def test_writes_into_inputs_stay_at_the_end():
    """What is written there may follow from an input that is written before: the row, or what is its own from then on."""

    def function(row, wide_row, total):
        wide_row.copy_(row.expand(4, 3))
        total.copy_((row.expand(4, 3) * 2).exp() + total)
        row.add_(1.0)
        return total.sum()

    results = []
    for change in (lambda graph: None, sink_broadcasts):
        inputs = [ROW.clone(), torch.zeros(4, 3, dtype=torch.float64), DRAWS[0].clone()]
        graph = traced(function, *inputs)
        change(graph.graph)
        graph.recompile()
        results.append([graph(*inputs), *inputs])
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(wanted, found)
    assert results[0][1][0] == ROW[0] + 1 and results[0][2][0, 0] == ROW[0]


@pytest.mark.parametrize("target", [aten.rrelu.default, aten.add_.Tensor])
def test_what_draws_or_writes_stays_whole(target):
    graph = torch.fx.Graph()
    row, draws = graph.placeholder("row"), graph.placeholder("draws")
    expanded = graph.call_function(aten.expand.default, (row, [5, 4, 3]))
    found = graph.call_function(target, (expanded,) if target is aten.rrelu.default else (expanded, 1.0))
    last = graph.call_function(aten.mul.Tensor, (found, draws))
    graph.output(last)
    for node, shape in ((row, (3,)), *((node, (5, 4, 3)) for node in (draws, expanded, found, last))):
        node.meta["val"] = torch.empty(shape, device="meta")
    sink_broadcasts(graph)
    assert found.args[0] is expanded and last.args == (found, draws)


def forgetful(graph, node, before):
    node.args = map_arg(node.args, lambda x: before.get(x, x))


BROKEN = {
    "shapes are not compared": ("_visit", forgetful),
    "everything is elementwise": ("_is_elementwise", lambda node: node.op == "call_function"),
    "draws and writes are as other operations": ("must_run", lambda node: node.op != "call_function"),
    "numbers count as arrays": ("_has_dimensions", lambda node: hasattr(node, "meta") and "val" in node.meta),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_are_caught(fault, monkeypatch):
    monkeypatch.setattr(broadcast_sinking, *BROKEN[fault])
    with pytest.raises(Exception):  # noqa: B017, PT011  (That it does not run shows the fault too.)
        for function, _, _ in NARROWED.values():
            both(function, DRAWS, ROW, COLUMN)
        test_random_numbers_stay_as_many()
        test_a_number_without_dimensions_decides_on_no_dtype()
        test_what_draws_or_writes_stays_whole(aten.rrelu.default)
