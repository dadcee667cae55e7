"""What reads a draw in no operation that torch shows: sizes, Python's callbacks, tensors that change places; exact all the same."""

from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.util import torch_item
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing import escapes, provenance
from pplgrad.testing.in_pyro import assert_same, exact_gradient, expected_gradient, worst
from pplgrad.testing.programs import Case
from tests.pyro.test_provenance import found_of, reads_of


def one(z):
    """Return one whole number that is z + 1, in a row."""
    return (z.long() + 1).reshape(1)


def with_one(z):
    return torch.stack([z, torch.ones(())])


def packed(z):
    return pack_padded_sequence(torch.ones(1, 3, 1), one(z), batch_first=True)


def applied(z):
    seen = []

    def keep(x):
        seen.append(x)
        return x

    z.clone().apply_(keep)
    return torch.tensor(seen[0])


def swapped(z):
    buffer = torch.zeros(()) + 0.0
    torch.utils.swap_tensors(buffer, z * 1.0)
    return buffer


UNSEEN = {
    "tensor_split": lambda z: torch.tensor_split(torch.arange(4.0), one(z))[1].sum(),
    "the method tensor_split": lambda z: torch.arange(4.0).tensor_split(one(z))[0].numel(),
    "map_": lambda z: torch.zeros(1).map_(z.reshape(1), lambda old, new: new)[0],
    "apply_": applied,
    "swap_tensors": swapped,
}
SIZED = {
    "to_sparse": lambda z: with_one(z).to_sparse().indices().shape[1],
    "the values of to_sparse": lambda z: torch.ones(len(with_one(z).to_sparse().values())).sum(),
    "to_sparse_csr": lambda z: with_one(z)[None].to_sparse_csr().col_indices().shape[0],
    "coalesce": lambda z: len(
        torch.sparse_coo_tensor(with_one(z).long()[None], torch.ones(2), (2,)).coalesce().values()
    ),
    "sparse_coo_tensor": lambda z: torch.sparse_coo_tensor(z.long().reshape(1, 1), torch.ones(1)).shape[0],
    "pack_padded_sequence": lambda z: packed(z).data.shape[0],
    "pad_packed_sequence": lambda z: pad_packed_sequence(packed(z), batch_first=True)[0].shape[1],
    "the lengths of pad_packed_sequence": lambda z: pad_packed_sequence(packed(z), batch_first=True)[1].sum(),
}
CHECKED = {"torch_item": lambda z: 1.0 if torch_item(z > 0.5) else 0.0}
WAYS = UNSEEN | SIZED | CHECKED


def reading(way):
    """Return a program of two draws, one of which has a part in the data's density in that way."""

    def model():
        z1 = pyro.sample("z1", dist.Bernoulli(0.4))
        z2 = pyro.sample("z2", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(2.0 * way(z1), 1.0), obs=torch.tensor(1.4))
        pyro.sample("y", dist.Normal(z2, 1.0), obs=torch.tensor(1.4))

    def guide():
        a = pyro.param("a", torch.tensor([0.3, -0.4]))
        pyro.sample("z1", dist.Bernoulli(logits=a[0]))
        pyro.sample("z2", dist.Bernoulli(logits=a[1]))

    return Case("reading", {"a": np.array([0.3, -0.4])}, {"z1": ((), 2), "z2": ((), 2)}, lambda host: (model, guide))


def estimated(case):
    return expected_gradient(case, lambda: TraceGrad_ELBO(estimators={"*": ScoreFunction()}), 1)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", WAYS)
def test_exact(name):
    case = reading(WAYS[name])
    assert_same(estimated(case), exact_gradient(case))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", ["tensor_split", "swap_tensors", "map_", "to_sparse", "torch_item"])
def test_what_sees_them_is_what_makes_it_exact(name, monkeypatch):
    monkeypatch.setattr(escapes.Leaving, "_read_unseen", lambda *_: None)
    monkeypatch.setattr(provenance, "swaps_noted", lambda note: nullcontext())
    monkeypatch.setattr(provenance, "is_size_known", lambda *_: True)
    monkeypatch.setattr(provenance, "is_check", lambda: True)
    case = reading(WAYS[name])
    assert worst(estimated(case), exact_gradient(case)) > 1e-3


LENDING = {
    "expand_as": lambda z: torch.ones(()).expand_as(z),
    "view_as": lambda z: torch.ones(1).view_as(z),
    "reshape_as": lambda z: torch.ones(1).reshape_as(z),
    "type_as": lambda z: torch.ones((), dtype=torch.float32).type_as(z),
    "to": lambda z: torch.ones((), dtype=torch.float32).to(z),
    "broadcast_tensors": lambda z: torch.broadcast_tensors(torch.ones(()), z)[0],
    "new": lambda z: z.new(2).fill_(1.0).sum(),
    "new of a shape": lambda z: z.new(torch.Size([2])).fill_(1.0).sum(),
    "new_zeros": lambda z: z.new_zeros(2).sum(),
    "a shape": lambda z: torch.ones(z.shape),
    "a check": lambda z: (
        torch.ones(()) if dist.Normal(0.0, z + 1.0, validate_args=True).batch_shape == () else torch.ones(())
    ),
}


def density(z):
    return dist.Normal(z, z + 1.0, validate_args=True).log_prob(torch.tensor(0.5))


def normalized(z):
    return torch.nn.functional.batch_norm(torch.stack([z, z + 1]).reshape(2, 1), None, None, training=True)[0, 0]


CELL = torch.nn.GRUCell(1, 1).double()
FOLLOWED = {
    "vmap": lambda z: torch.vmap(lambda x, y: x * y)(z.reshape(1), torch.ones(1))[0],
    "batch_norm": normalized,
    "validated arguments": density,
    "expand_as": lambda z: z.expand_as(torch.ones(2))[0],
    "broadcast_tensors": lambda z: torch.broadcast_tensors(z, torch.ones(2))[0][1],
    "new_tensor": lambda z: z.new_tensor(1.0),  # Charged, as it is made of a number; nothing else is.
    "tensor_split by numbers": lambda z: torch.tensor_split(torch.stack([z, z]), 2)[1][0],
    "split": lambda z: torch.stack([z, z]).split([1, 1])[0][0],
    "sort": lambda z: with_one(z).sort().values[0],
    "topk": lambda z: with_one(z).topk(1).values[0],
    "embedding": lambda z: torch.nn.functional.embedding(z.long(), torch.eye(2))[1],
    "one_hot": lambda z: torch.nn.functional.one_hot(z.long(), 2)[1].double(),
    "einsum": lambda z: torch.einsum("i,i->", with_one(z), torch.ones(2)),
    "cumsum": lambda z: with_one(z).cumsum(0)[1],
    "convolution": lambda z: torch.nn.functional.conv1d(with_one(z)[None, None], torch.ones(1, 1, 2))[0, 0, 0],
    "cross_entropy": lambda z: torch.nn.functional.cross_entropy(torch.ones(1, 2), z.long()[None]),
    "a recurrent cell": lambda z: CELL(z.reshape(1, 1))[0, 0],
}


@pytest.mark.parametrize(
    ("way", "reads"),
    [
        *(pytest.param(way, set(), id=f"lending-{name}") for name, way in LENDING.items()),
        *(pytest.param(way, {"z1"}, id=f"followed-{name}") for name, way in FOLLOWED.items()),
    ],
)
def test_ordinary_functions_are_followed(way, reads, monkeypatch):
    """Nothing counts as read by Python, so that the structure is reused and no other draw is charged."""
    layouts, elbo = found_of(*reads_of(way), monkeypatch, steps=3)
    known = next(iter(elbo._structures._known.values()))
    assert layouts[0]["x"] == reads
    assert known.reusable and known.read_at is None
