"""A joint optimizer does what Pyro's optimizers of single parameters do, in one call for all that are alike."""

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI

from pplgrad import NeuralBaseline, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO, joint_optimizer, split_optimizer

OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "fused": lambda: pyro.optim.Adam({"lr": 0.05, "fused": True}),
    "amsgrad": lambda: pyro.optim.AdamW({"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    "rmsprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "rate that falls by itself": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5}),
    "pyro's": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "two rates": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.02}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.1}),
    "one alone": lambda: pyro.optim.Rprop({"lr": 0.05}),
    **{name: lambda name=name: getattr(pyro.optim, name)({}) for name in ("Adadelta", "Adagrad", "Adamax", "ASGD")},
    **{name: lambda name=name: getattr(pyro.optim, name)({}) for name in ("NAdam", "RAdam", "DCTAdam")},
    "schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}
    ),
}


def program(step):
    """Return a model and a guide; `late` appears at the third step, and `seldom` is there at every other one."""

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            loc = z * pyro.param("b", torch.tensor(0.5)) + pyro.param("c", torch.tensor([0.1, 0.2, 0.3, 0.4]))
            if step >= 2:
                loc = loc + pyro.param("late", torch.tensor(0.2))
            if step % 2:
                loc = loc * pyro.param("seldom", torch.tensor(1.2))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.5, 1.5, -0.5, 2.0]))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(4))))

    return model, guide


def train(optimizer, steps):
    """Take steps, each from its own seed, and a scheduler's after every third; return the parameters."""
    for step in steps:
        pyro.set_rng_seed(step)
        SVI(*program(step), optimizer, TraceGrad_ELBO(estimators={"*": ScoreFunction()})).step()
        if step % 3 == 2 and hasattr(optimizer, "step"):
            optimizer.step()
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_trains_like_single_ones(make):
    wanted = train(make(), range(9))
    pyro.clear_param_store()
    assert_equal(train(joint_optimizer(make()), range(9)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_are_saved_and_loaded_by_either(make, tmp_path):
    wanted = train(make(), range(9))
    for first, second in ((joint_optimizer, lambda x: x), (lambda x: x, joint_optimizer)):
        pyro.clear_param_store()
        optimizer = first(make())
        train(optimizer, range(5))
        optimizer.save(tmp_path / "state")
        again = second(make())
        again.load(tmp_path / "state")
        assert_equal(train(again, range(5, 9)), wanted)


def test_an_optimizer_goes_on_jointly():
    wanted = train(OPTIMIZERS["adam"](), range(9))
    pyro.clear_param_store()
    optimizer = OPTIMIZERS["adam"]()
    train(optimizer, range(4))
    assert_equal(train(joint_optimizer(optimizer), range(4, 9)), wanted)


@pytest.mark.parametrize(
    ("kind", "calls"), [("adam", 1), ("two rates", 2), ("schedule", 1), ("rate that falls by itself", 2)]
)
def test_one_call_for_all_that_are_alike(kind, calls, monkeypatch):
    """The rate that falls by itself has fallen less for the parameter that came later."""
    optimizer = joint_optimizer(OPTIMIZERS[kind]())
    made = {"schedule": torch.optim.Adam, "rate that falls by itself": pyro.optim.clipped_adam.ClippedAdam}
    cls, count = made.get(kind, torch.optim.Adam), [0]
    train(optimizer, (0, 2, 4))
    plain = cls.step

    def counted(self, *args, **kwargs):
        count[0] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(cls, "step", counted)
    SVI(*program(4), optimizer, TraceGrad_ELBO(estimators={"*": ScoreFunction()})).step()
    assert count == [calls]


def test_what_is_not_known_to_treat_parameters_singly_is_called_singly():
    class Whole(torch.optim.SGD):
        """Follows the gradient's direction alone, of whatever it is given."""

        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norm = sum((g**2).sum() for g in grads) ** 0.5
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(0.1 * p.grad / norm)

    wanted = train(pyro.optim.PyroOptim(Whole, {"lr": 0.1}), range(5))
    pyro.clear_param_store()
    assert_equal(train(joint_optimizer(pyro.optim.PyroOptim(Whole, {"lr": 0.1})), range(5)), wanted)


def test_a_split_optimizer_is_joint_on_each_side():
    def run(wrap):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        baseline = NeuralBaseline(hidden=(3,), inputs=lambda: torch.ones(4, 2))
        elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(baseline)})
        optimizer = wrap(pyro.optim.Adam({"lr": 0.01}), pyro.optim.Adam({"lr": 0.1}))
        for _ in range(6):
            SVI(*program(4), optimizer, elbo).step()
        return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}

    def single(main, baseline):
        optimizer = split_optimizer(main, baseline)
        return pyro.optim.PyroOptim(lambda params, **_: optimizer._owner(params[0])._get_optim(params[0]), {})

    assert_equal(run(split_optimizer), run(single))


def test_refuses_what_is_no_pyro_optimizer():
    with pytest.raises(TypeError, match="joint_optimizer takes an optimizer of pyro.optim; got SGD"):
        joint_optimizer(torch.optim.SGD([torch.zeros(1)], 0.1))
