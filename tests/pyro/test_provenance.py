"""Ways around provenance: whatever a value goes through, the cost at the other end is charged to the draw, or to all draws before it."""

import concurrent.futures
import copy
import io
import pickle
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from tqdm import tqdm
from tqdm._monitor import TMonitor

from pplgrad import REBAR, DisARM, Expectation, LocalExpectation, ScoreFunction
from pplgrad.engine.layout import Layout
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing import provenance as provenance_room
from pplgrad.pyro._tracing.indexing import without_numbers
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance
from pplgrad.pyro._tracing.threads import OtherThreads

POOL = concurrent.futures.ThreadPoolExecutor(1)
TABLE = torch.eye(2)


def saved(z):
    torch.save(z, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()))


def in_new_thread(z):
    found = []
    thread = threading.Thread(target=lambda: found.append(float(z)))
    thread.start()
    thread.join()
    return torch.tensor(found[0])


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.as_tensor(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def written(z):
    buffer = torch.zeros(3)
    buffer[1] = z
    return buffer[1]


def shared_memory(z):
    return torch.from_numpy(np.asarray(z))


def running_mean(z):
    """Batch normalisation writes into the moments that it is given, of which its schema says nothing."""
    mean, variance = torch.zeros(1), torch.ones(1)
    torch.nn.functional.batch_norm(torch.stack([z, z + 1]).reshape(2, 1), mean, variance, training=True)
    return mean[0]


WAYS = {
    "itself": lambda z: z,
    "running mean": running_mean,
    "Tensor": lambda z: torch.Tensor([z])[0],
    "FloatTensor": lambda z: torch.FloatTensor([z])[0],
    "LongTensor": lambda z: torch.LongTensor([z.long()])[0].float(),
    "new": lambda z: torch.zeros(1).new([z])[0],
    "new_tensor": lambda z: torch.zeros(1).new_tensor([z])[0],
    "tensor": lambda z: torch.tensor([z, z])[0],
    "as_tensor": lambda z: torch.as_tensor([z])[0],
    "by a list": lambda z: TABLE[:, [z.long(), z.long()]][1, 0],
    "by a number": lambda z: TABLE[z.long()][1],
    "pickle": lambda z: pickle.loads(pickle.dumps(z)),
    "save": saved,
    "deepcopy": lambda z: copy.deepcopy(z),
    "to_dlpack": lambda z: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(z)),
    "dlpack": lambda z: torch.from_numpy(np.from_dlpack(z)).clone(),
    "numpy": shared_memory,
    "storage": lambda z: torch.tensor(z.storage()[0]),
    "untyped storage": lambda z: torch.empty(()).set_(z.untyped_storage(), 0, ()),
    "text": lambda z: torch.tensor(float(repr(z)[7:-1])),
    "data": lambda z: z.data,
    "parameter": lambda z: torch.nn.Parameter(z).detach(),
    "another thread": lambda z: POOL.submit(lambda: z * 1.0).result(),
    "a number from another thread": lambda z: torch.tensor(POOL.submit(lambda: z.item()).result()),
    "a new thread": in_new_thread,
    "a custom function": Doubling.apply,
    "written": written,
    "vmap": lambda z: torch.vmap(lambda x: x * 2.0)(z[None])[0],
}


def reads_of(way):
    """Return what the data's cost reads, in a program where it reads z1 in that way, and z2 not at all."""

    def model():
        z1 = pyro.sample("z1", dist.Bernoulli(0.5))
        pyro.sample("z2", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(3.0 * way(z1), 1.0), obs=torch.tensor(0.7))

    def guide():
        a = pyro.param("a", torch.tensor([0.3, -0.4]))
        pyro.sample("z1", dist.Bernoulli(logits=a[0]))
        pyro.sample("z2", dist.Bernoulli(logits=a[1]))

    return model, guide


def found_of(model, guide, monkeypatch, steps=1):
    layouts, plain = [], Layout.build.__func__

    def build(cls, sites, costs, objective=None):
        layouts.append({cost.name: set(cost.reads) for cost in costs if cost.sign > 0})
        return plain(cls, sites, costs, objective)

    monkeypatch.setattr(Layout, "build", classmethod(build))
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    for _ in range(steps):
        elbo.loss_and_grads(model, guide)
    return layouts, elbo


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", WAYS)
def test_no_way_leads_around(name, monkeypatch):
    layouts, _ = found_of(*reads_of(WAYS[name]), monkeypatch)
    assert "z1" in layouts[-1]["x"]


@pytest.mark.parametrize(
    "name", ["itself", "running mean", "new", "tensor", "by a list", "by a number", "data", "written", "vmap"]
)
def test_what_can_be_followed_is_charged_to_its_draw_alone(name, monkeypatch):
    layouts, elbo = found_of(*reads_of(WAYS[name]), monkeypatch, steps=3)
    assert layouts[0]["x"] == {"z1"}
    assert next(iter(elbo._structures._known.values())).reusable


@pytest.mark.parametrize("name", ["to_dlpack", "another thread", "untyped storage", "pickle"])
def test_what_cannot_be_followed_is_watched_at_every_step(name, monkeypatch):
    layouts, elbo = found_of(*reads_of(WAYS[name]), monkeypatch, steps=5)
    assert len(layouts) == 5 and all("z1" in found["x"] for found in layouts)


def test_data_that_were_there_before_depend_on_no_draw(monkeypatch):
    data, module = torch.tensor(0.7), torch.nn.Linear(1, 1)

    class Held:
        scale = torch.tensor(2.0)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, Held.scale), obs=data)
        pyro.sample("y", dist.Normal(module(data[None])[0] + z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    layouts, _ = found_of(model, guide, monkeypatch)
    assert layouts[0]["x"] == set() and layouts[0]["y"] == {"z"}


def test_without_the_second_net_another_thread_is_not_seen(monkeypatch):
    """The check of tensors that turn up from nowhere is what finds them."""
    plain = Provenance._from_outside
    monkeypatch.setattr(
        Provenance,
        "_from_outside",
        lambda self, tensor, key: provenance_room.Known(0, {}, 1) if key else plain(self, tensor, key),
    )
    layouts, _ = found_of(*reads_of(WAYS["to_dlpack"]), monkeypatch)
    assert "z1" not in layouts[-1]["x"]


@pytest.mark.parametrize(("kind", "counts"), [("monitor", False), ("own", True)])
def test_a_progress_bar_s_thread_has_no_part_in_a_program(kind, counts):
    ends = threading.Event()
    if kind == "monitor":
        thread = TMonitor(tqdm, 0.001)
    else:
        thread = threading.Thread(target=lambda: [ends.wait(0.001) for _ in range(10_000) if not ends.is_set()])
        thread.start()
    try:
        time.sleep(0.05)
        with OtherThreads() as others:
            time.sleep(0.1)
        assert others.ran == counts
    finally:
        ends.set()
        if kind == "monitor":
            thread.exit()


INDICES = {
    "one": lambda t, i: t[i],
    "second": lambda t, i: t[:, i],
    "last": lambda t, i: t[..., i],
    "two": lambda t, i: t[i, i],
    "with a new axis": lambda t, i: t[None, i],
    "with a slice": lambda t, i: t[i, 1:],
    "with an array": lambda t, i: t[torch.tensor([0, 1]), i],
    "with a number": lambda t, i: t[1, :, i],
    "negative": lambda t, i: t[i - 3],
    "after an ellipsis": lambda t, i: t[..., i, :],
    "in front of an ellipsis": lambda t, i: t[i, ..., 0],
}


@pytest.mark.parametrize("name", INDICES)
def test_a_number_in_a_tensor_picks_what_it_picks_when_it_is_read(name):
    table = torch.arange(3.0 * 3 * 3).reshape(3, 3, 3)
    for i in range(3):
        wanted = INDICES[name](table, torch.tensor(i))
        with Provenance() as provenance:
            found = INDICES[name](table, torch.tensor(i))
        assert torch.equal(found, wanted) and provenance.read_at is None
    assert without_numbers((table, torch.tensor([True, False, True])))[1].dtype == torch.bool


def test_an_index_out_of_range_is_an_error():
    with Provenance(), pytest.raises(IndexError):
        TABLE[torch.tensor(5)]


def test_reductions_over_particles_run_apart():
    """z.sum() adds up particles, and branches: found when the step is watched, with a warning, and exact from the first step on."""

    def model():
        with pyro.plate("p", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z.sum(), 1.0), obs=torch.tensor(2.5))

    def guide():
        with pyro.plate("p", 2):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.4, -0.3]))))

    def gradient(elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(model, guide)
        return loss, pyro.get_param_store()._params["a"].grad

    for particles in (1, 3):
        plain = TraceGrad_ELBO(particles, max_plate_nesting=1, estimators={"z": LocalExpectation()})
        together = TraceGrad_ELBO(
            particles, max_plate_nesting=1, vectorize_particles=True, estimators={"z": LocalExpectation()}
        )
        wanted = gradient(plain)
        with pytest.warns(UserWarning, match="site 'x' mixes particles"):
            found = gradient(together)
        assert found[0] == pytest.approx(wanted[0], rel=1e-5)
        torch.testing.assert_close(found[1], wanted[1])
        assert gradient(together)[0] == pytest.approx(wanted[0], rel=1e-5)
    pyro.set_rng_seed(1)
    wanted = TraceGrad_ELBO(3, max_plate_nesting=1).loss(model, guide)
    pyro.set_rng_seed(1)
    with pytest.warns(UserWarning, match="site 'x' mixes particles"):
        found = TraceGrad_ELBO(3, max_plate_nesting=1, vectorize_particles=True).loss(model, guide)
    assert found == pytest.approx(wanted, rel=1e-5)


def averaging_guide():
    """Return a guide whose second draw depends on a sum over all that runs together."""
    with pyro.plate("p", 2):
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.4, -0.3]))))
    pyro.sample("w", dist.Bernoulli(logits=pyro.param("b", torch.tensor(-1.0)) + 2 * z.sum()))


def cost_of_both():
    w, rows = pyro.sample("w", dist.Bernoulli(0.5)), pyro.plate("p", 2)
    with rows:
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * w + z, 1.0), obs=torch.tensor([2.5, -0.3]))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("estimator", [LocalExpectation(), DisARM()], ids=repr)
def test_draws_that_meet_run_apart_where_their_density_does_not_count(estimator, particles):
    def step(vectorized):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        given = {"vectorize_particles": vectorized, "max_plate_nesting": 1, "objective": Expectation()}
        TraceGrad_ELBO(particles, estimators={"*": estimator}, **given).loss_and_grads(cost_of_both, averaging_guide)
        return [pyro.get_param_store()._params[name].grad for name in "ab"]

    with pytest.warns(UserWarning, match="site 'w' mixes particles.*one by one"):
        found = step(True)
    torch.testing.assert_close(found, step(False))


def test_relaxed_branches_that_meet_run_apart():
    """One particle is compared with nothing; its relaxed branches, which run together, are compared with each by itself."""

    def model():
        z, w = (pyro.sample(name, dist.Bernoulli(torch.full((1,), 0.4)).to_event(1)) for name in "zw")
        pyro.sample("x", dist.Normal(2 * z.sum() + w.sum(), 1.0), obs=torch.tensor(1.4))

    def guide():
        for name in "zw":
            pyro.sample(name, dist.Bernoulli(logits=pyro.param("a" + name, torch.tensor([0.3]))).to_event(1))

    def step(vectorized):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        chosen = {"*": REBAR(learn=False)}
        elbo = TraceGrad_ELBO(vectorize_particles=vectorized, max_plate_nesting=0, estimators=chosen)
        loss = elbo.loss_and_grads(model, guide)
        return torch.stack([torch.tensor([loss]), *(pyro.get_param_store()._params["a" + name].grad for name in "zw")])

    with pytest.warns(UserWarning, match="site 'x' mixes particles.*one by one"):
        found = step(True)
    torch.testing.assert_close(found, step(False))


def test_a_program_that_moves_on_when_it_runs_again_is_refused():
    from pplgrad import ProgramError

    counter = iter(range(1000))

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z + float(next(counter)), 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    def moving_guide():
        first = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))
        pyro.sample("w", dist.Bernoulli(logits=first + 0.1 * float(next(counter))))

    def still_model():
        z, w = (pyro.sample(name, dist.Bernoulli(0.5)) for name in "zw")
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=torch.tensor(0.7))

    for vectorized in (False, True):
        given = {"vectorize_particles": vectorized, "max_plate_nesting": 0, "estimators": {"*": LocalExpectation()}}
        elbo = TraceGrad_ELBO(**given)
        with pytest.raises(ProgramError, match="Site 'x' has another density when the program runs again"):
            elbo.loss_and_grads(model, guide)
        elbo = TraceGrad_ELBO(**given, objective=Expectation())
        with pytest.raises(ProgramError, match="Site 'w' has another density when the program runs again"):
            elbo.loss_and_grads(still_model, moving_guide)
    TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss_and_grads(model, guide)


@pytest.mark.parametrize("changes", [False, True])
def test_a_program_that_is_watched_for_ever_runs_once_more_on_a_schedule(changes):
    """What a program computes may be dear: a simulator, say."""
    runs = []

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        runs.append(0)
        pyro.factor("f", z if changes else torch.tensor(float(z)))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    elbo = TraceGrad_ELBO(estimators={"z": LocalExpectation()})
    counts = []
    for _ in range(17):
        before = len(runs)
        elbo.loss_and_grads(model, guide)
        counts.append(len(runs) - before)
    assert [step for step, count in enumerate(counts, 1) if count == 3] == [1, 2, 3, 5, 9, 17]
    assert set(counts) == {2, 3}


def test_a_structure_that_changed_where_nothing_saw_it_is_found_on_the_schedule(monkeypatch):
    """With the guard switched off: the next step that is watched again says so; or warns, and goes on watching."""
    monkeypatch.setattr("pplgrad.pyro._reuse.guards.Guard.holds", lambda self: True)
    from pplgrad import ProgramError

    class State:
        second = False

    def model():
        z1 = pyro.sample("z1", dist.Bernoulli(0.5))
        z2 = pyro.sample("z2", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z2 if State.second else z1, 1.0), obs=torch.tensor(0.7))

    def guide():
        a = pyro.param("a", torch.tensor([0.3, -0.4]))
        pyro.sample("z1", dist.Bernoulli(logits=a[0]))
        pyro.sample("z2", dist.Bernoulli(logits=a[1]))

    def until_told(**options):
        State.second = False
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, **options)
        for _ in range(5):
            elbo.loss_and_grads(model, guide)
        State.second = True
        for _ in range(20):
            elbo.loss_and_grads(model, guide)
        return elbo

    with pytest.raises(ProgramError, match="site 'x' reads 'z2' now, and read 'z1' before"):
        until_told()
    with pytest.raises(ProgramError, match="site 'x' reads 'z2' now, and read 'z1' before"):
        until_told(compile={"backend": "eager"})
    with pytest.warns(UserWarning, match="every step is watched"):
        elbo = until_told(reuse_structure="warn")
    assert not next(iter(elbo._structures._known.values())).reusable
    until_told(reuse_structure=False)


def test_a_compiled_step_that_computes_something_else_is_found_on_the_schedule(monkeypatch):
    from pplgrad import ProgramError

    monkeypatch.setattr("pplgrad.pyro._reuse.guards.Guard.holds", lambda self: True)

    class State:
        scale = 1.0

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z * State.scale, 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(3.0))))

    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()}, compile={"backend": "eager"})
    for _ in range(4):
        elbo.loss_and_grads(model, guide)
    State.scale = 5.0
    with pytest.raises(ProgramError, match="where the step that was recorded computes"):
        for _ in range(20):
            elbo.loss_and_grads(model, guide)


def test_a_sequential_plate_is_reused_and_a_subsampled_one_is_watched(monkeypatch):
    data = torch.tensor([0.7, -1.0, 0.3])

    def program(size):
        def model():
            z = pyro.sample("z", dist.Bernoulli(0.5))
            for i in pyro.plate("data", 3, subsample_size=size):
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=data[i])

        return model

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    for size, reused in ((3, True), (2, False)):
        _, elbo = found_of(program(size), guide, monkeypatch, steps=5)
        assert next(iter(elbo._structures._known.values())).reusable == reused


@pytest.mark.parametrize(
    ("index", "apart"),
    [
        (lambda n: torch.arange(n), True),
        (lambda n: torch.arange(n)[:, None], True),
        (lambda n: torch.arange(n).flip(0), False),
        (lambda n: torch.arange(1, n + 1) - 1, False),
        (lambda n: torch.arange(n).index_fill_(0, torch.tensor([0]), 1), False),
        (lambda n: torch.arange(n).expand(n, n).T[:, 0], True),
        (lambda n: torch.arange(n).expand(n, n).T[0], False),
    ],
)
def test_an_index_that_counts_keeps_elements_apart(index, apart):
    """As in Pyro's Vindex, which writes a slice as torch.arange; a permutation mixes."""
    with Provenance() as provenance:
        z = provenance.tag("z", torch.zeros(4, 3), [PlateAxis("plate", -2)])
        picked = z[index(4), 1]
        assert (provenance.mixed(picked, "z", [("plate", -picked.dim())]) == frozenset()) == apart
