"""The module form of the ELBO keeps in its `state_dict` all that a training needs; Lightning's checkpoints go on from it bit for bit."""

import io
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam

from pplgrad import Watch
from pplgrad.pyro import TraceGrad_ELBO, config_estimators, is_baseline_param
from tests.resuming import CHOICES, DATA, chosen

X = torch.tensor(DATA)
ROWS = 12


class Model(PyroModule):
    def forward(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            a = pyro.sample("z_1", dist.Bernoulli(x.new_tensor(0.3)))
            b = pyro.sample("z_2", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("y", dist.Normal((x * w).sum(-1) + a - 0.5 * b, 1.0), obs=x[..., 0] ** 2)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.scale = PyroParam(torch.ones(3, dtype=torch.float64), dist.constraints.positive)
        self.encoder = torch.nn.Linear(3, 2).double()

    def forward(self, x):
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(1))
        logits = self.encoder(x)
        with pyro.plate("data", len(x)):
            a = pyro.sample("z_1", dist.Bernoulli(logits=logits[..., 0]))
            pyro.sample("z_2", dist.Bernoulli(logits=logits[..., 1] + 0.3 * a))


def made(choice, seed=0, watch=None, **options):
    """Return the module as a new process would make it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = config_estimators(Guide(), chosen(choice), watch=watch)
    return TraceGrad_ELBO(**options)(Model(), guide).initialize(X)


def train(module, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(X)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


HOW = {
    "one": {},
    "looped": {"num_particles": 2},
    "vectorized": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.mark.grid
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("choice", CHOICES)
def test_state_dict_holds_all_that_is_learned(choice, how):
    module = made(choice, **HOW[how])
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    train(module, optimizer, 9)
    file = io.BytesIO()
    torch.save([module.state_dict(), optimizer.state_dict(), torch.get_rng_state()], file)
    wanted = train(module, optimizer, 10)
    store = {name: x.detach().clone() for name, x in pyro.get_param_store().items() if is_baseline_param(name)}
    file.seek(0)
    state, moments, numbers = torch.load(file, weights_only=True)
    module = made(choice, 99, **HOW[how])
    module.load_state_dict(state)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(numbers)
    assert train(module, optimizer, 10) == wanted
    now = {name: x for name, x in pyro.get_param_store().items() if is_baseline_param(name)}
    assert now.keys() == store.keys() and all(torch.equal(x, now[name]) for name, x in store.items())
    if choice.startswith("average"):
        assert {name.rpartition(".")[2] for name in state["_extra_state"]["averages"]} == {"mean", "weight"}


def lightning():
    """Return Lightning, whose import warns of packages that it would like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("pytorch_lightning")


def fit(choice, folder, epochs, resume=None, seed=0, steps=None):
    """Train for some epochs with Lightning, and return the losses."""
    L = lightning()
    losses = []

    class Training(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.elbo = made(choice, seed, Watch(steps.append, every=3, draws=2) if steps is not None else None)

        def training_step(self, batch):
            loss = self.elbo(batch[0])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.elbo.parameters(), 0.05)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["numbers"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint):
            torch.set_rng_state(checkpoint["numbers"])

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=5, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            default_root_dir=folder,
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Training(), data, ckpt_path=resume, weights_only=None if resume is None else True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["average", "networks", "RELAX", "average + network"])
def test_lightnings_checkpoint_goes_on(choice, tmp_path):
    steps = []
    whole = fit(choice, tmp_path, 6, steps=steps)
    del steps[3:]
    assert fit(choice, tmp_path, 3, steps=[]) == whole[:9]
    assert fit(choice, tmp_path, 6, tmp_path / "last.ckpt", seed=99, steps=steps) == whole[9:]
    # The watch counts on.
    assert [record["step"] for record in steps] == [0, 3, 6, 9, 12, 15]
