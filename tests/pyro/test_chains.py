"""Chains of summed sites by products of matrices: the numbers and derivatives of Pyro's contraction, and of brute force, or not at all."""

import itertools
import random
from collections import OrderedDict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.indexing import Vindex
from pyro.ops.rings import LogRing

from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing import chains
from pplgrad.pyro._tracing.chains import Factor, chain_of, log_sum_exp
from pplgrad.testing.in_pyro import assert_same, exact_gradient, expected_gradient
from tests.pyro.marginal import PROGRAMS, SUM

SIZES = {"P": 3, "Q": 2, "R": 2}


def made(dims, sizes, plates=""):
    order = random.sample(dims, len(dims))
    data = torch.randn([sizes[d] for d in order], dtype=torch.float64).mul(3).requires_grad_()
    return Factor(data, "".join(order), frozenset(plates))


def random_chain(seed):
    """Return factors that make a chain in some plates, in any order, and its states; some lack a plate, some stand in one more."""
    torch.manual_seed(seed)
    random.seed(seed)
    steps, values = random.randint(3, 9), random.randint(2, 4)
    states = random.sample("abcdefghij", steps)
    sizes, shared = SIZES | dict.fromkeys(states, values), random.choice(["", "P", "PQ"])
    factors = []

    def add(mine, plates=shared):
        factors.append(made([*mine, *(p for p in plates if p not in shared or random.random() < 0.6)], sizes, plates))

    for t, d in enumerate(states):
        add([states[t - 1], d] if t else [d])
        if random.random() < 0.8:
            add([d], shared + random.choice(["", "R"]))
        if t and random.random() < 0.2:
            add([states[t - 1], d], shared + random.choice(["", "R"]))
    random.shuffle(factors)
    return factors, frozenset(states), sizes


def contracted(factors, states):
    """Return what Pyro's contraction makes of factors, and its dimensions."""
    tree = OrderedDict()
    for f in factors:
        x = f.data[...]
        x._pyro_dims = f.dims
        tree.setdefault(f.plates, []).append(x)
    ((found,),) = contract_tensor_tree(tree, set(states), ring=LogRing()).values()
    return found, found._pyro_dims


def aligned(x, dims, batch, sizes):
    order = [d for d in batch if d in dims]
    own = dict(zip(dims, x.shape, strict=True))
    x = x.permute([dims.index(d) for d in order]).reshape([own.get(d, 1) for d in batch])
    return x.expand([sizes[d] for d in batch])


@pytest.mark.parametrize("seed", range(40))
def test_a_chain_is_what_pyro_makes_of_it(seed):
    factors, states, sizes = random_chain(seed)
    chain = chain_of(factors, states)
    found = chain.sum()
    wanted = aligned(*contracted(factors, states), chain.batch, sizes)
    torch.testing.assert_close(found.expand(wanted.shape), wanted, rtol=1e-12, atol=1e-12)
    weights, data = torch.randn_like(wanted), [f.data for f in factors]
    mine, theirs = (torch.autograd.grad((x * weights).sum(), data) for x in (found, wanted))
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def of(*dims, plates=None, sizes=None):
    sizes = SIZES | dict.fromkeys("abcdefg", 2) | (sizes or {})
    return [made(d, sizes, (plates or {}).get(d, "")) for d in dims]


OTHERS = {
    "two sites": of("a", "ab", "b"),
    "a star": of("a", "ab", "ac", "ad"),
    "a circle": of("ab", "bc", "cd", "da"),
    "a circle beside a chain": of("ab", "bc", "de", "ef", "fd"),
    "two chains": of("ab", "bc", "de", "ef"),
    "three at once": of("a", "ab", "abc", "cd"),
    "other sizes": of("a", "ab", "bc", "cd", sizes={"c": 3}),
    "a state in a plate of its own": of("a", "ab", "bcP", "cP", plates={"bcP": "P", "cP": "P"}),
    "a dimension of no plate": of("a", "ab", "bcP"),
    "a factor of no state": of("a", "ab", "bc", "P", plates={"P": "P"}),
    "a state that nothing reads": of("a", "ab", "bc"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain_takes_pyros_contraction(name):
    states = frozenset("abcdefg" if name == "a state that nothing reads" else {d for f in OTHERS[name] for d in f.dims})
    assert chain_of(OTHERS[name], states - set("PQR")) is None


@pytest.mark.parametrize("limit", ["_AT_MOST", "_PER_PRODUCT"])
def test_a_chain_of_many_values_takes_pyros_contraction(limit, monkeypatch):
    factors, states, _ = random_chain(0)
    monkeypatch.setattr(chains, limit, 7)
    assert chain_of(factors, states) is None


def test_impossible_values_have_no_derivative_and_what_is_no_number_stays():
    x = torch.tensor([[0.3, -torch.inf], [-torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    found = log_sum_exp(x, (-1,))
    assert found.tolist() == [pytest.approx(0.3), -torch.inf]
    (gradient,) = torch.autograd.grad(found[0] + 0 * found[1].clamp(min=-1), x)
    assert gradient.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert log_sum_exp(torch.tensor([[0.3, torch.nan]]), (-1,)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_contradict_each_other_do_not_underflow(dtype):
    """States that hardly change, seen at opposite ends in turns: of the terms of a product each is far below what its factors have."""
    stay = torch.tensor([[0.0, -90.0, -200.0], [-90.0, 0.0, -90.0], [-200.0, -90.0, 0.0]], dtype=dtype)
    seen = torch.tensor([[0.0, -300.0, -700.0], [-700.0, -300.0, 0.0]] * 4, dtype=dtype)
    names = "abcdefgh"
    factors = [Factor(row, d, frozenset()) for row, d in zip(seen, names, strict=True)]
    factors += [Factor(stay, d + e, frozenset()) for d, e in itertools.pairwise(names)]
    terms = [
        sum(float(row[i]) for row, i in zip(seen, path, strict=True))
        + sum(float(stay[i, j]) for i, j in itertools.pairwise(path))
        for path in itertools.product(range(3), repeat=8)
    ]
    found = chain_of(factors, frozenset(names)).sum()
    assert float(found) == pytest.approx(float(torch.tensor(terms, dtype=torch.float64).logsumexp(0)), rel=1e-6)


@pytest.mark.parametrize("name", ["chain", "masked chain"])
def test_programs_that_are_chains_are_taken_for_them(name, monkeypatch):
    taken, plain = [], chains.Chain.sum
    monkeypatch.setattr(chains.Chain, "sum", lambda self: taken.append(self.states) or plain(self))
    program = PROGRAMS[name]()
    found = expected_gradient(program.case, lambda: TraceGrad_ELBO(max_plate_nesting=0), 1)
    assert {len(x) for x in taken} == {5}
    assert_same(found, exact_gradient(program.by_hand))


def test_a_long_chain_takes_few_operations():
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counting.count += 1
            return func(*args, **(kwargs or {}))

    def operations(steps):
        names = [chr(200 + i) for i in range(steps)]
        sizes = dict.fromkeys(names, 2)
        factors = [made([d], sizes) for d in names] + [made([*pair], sizes) for pair in itertools.pairwise(names)]
        chain = chain_of(factors, frozenset(names))
        Counting.count = 0
        with Counting():
            chain.sum()
        return Counting.count

    assert operations(256) - operations(32) < 100  # three levels


def transposed(monkeypatch):
    plain = chains._laid_out
    monkeypatch.setattr(
        chains, "_laid_out", lambda f, batch, states: plain(f, batch, states[::-1] if len(states) == 2 else states)
    )


def the_first_state_is_left_out(monkeypatch):
    plain = chains.chain_of

    def chain(factors, summed):
        found = plain(factors, summed)
        return found and chains.Chain(found.batch, found.states, ((), *found.singles[1:]), found.pairs)

    monkeypatch.setattr("pplgrad.pyro._tracing.marginal_sites.chain_of", chain)


def an_odd_product_is_dropped(monkeypatch):
    plain = torch.cat
    monkeypatch.setattr(chains.torch, "cat", lambda parts, *more: plain(parts[:1], *more))


@pytest.mark.parametrize("mutant", [transposed, the_first_state_is_left_out, an_odd_product_is_dropped])
def test_mutant_is_caught(mutant, monkeypatch):
    pyro.clear_param_store()
    x, move = torch.randn(8, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)

    def model():
        k = torch.tensor(0)
        for t in pyro.markov(range(8)):
            k = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(move)[k]), infer=dict(SUM))
            pyro.sample(f"x{t}", dist.Normal(k.double(), 1.0), obs=x[t])

    def loss():
        return TraceGrad_ELBO(max_plate_nesting=0).loss(model, lambda: None)

    wanted = loss()
    with monkeypatch.context() as patch:
        patch.setattr("pplgrad.pyro._tracing.marginal_sites.chain_of", lambda *_: None)
        assert loss() == pytest.approx(wanted, rel=1e-12)
    mutant(monkeypatch)
    assert abs(loss() - wanted) > 1e-6
