"""A parameter that is made again from the same tensor after `clear_param_store` starts without the gradient of the time before."""

import pyro
import pyro.distributions as dist
import torch

from pplgrad import LocalExpectation
from pplgrad.pyro import TraceGrad_ELBO


def program(start):
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", start)))

    return model, guide


def step(model, guide, **options):
    TraceGrad_ELBO(estimators={"*": LocalExpectation()}, **options).loss_and_grads(model, guide)


def test_a_second_training_starts_anew():
    start = torch.tensor(0.4)
    step(*program(start))
    once = start.grad.clone()
    pyro.clear_param_store()
    step(*program(start))
    torch.testing.assert_close(start.grad, once)


def test_so_does_a_compiled_one():
    start = torch.tensor(0.4)
    step(*program(start))
    once = start.grad.clone()
    pyro.clear_param_store()
    step(*program(start), compile={"backend": "eager"})
    torch.testing.assert_close(start.grad, once)


def test_steps_of_one_training_add_up():
    start = torch.tensor(0.4)
    step(*program(start))
    once = start.grad.clone()
    step(*program(start))
    torch.testing.assert_close(start.grad, 2 * once)


def test_the_users_own_loss_before_the_first_step_counts():
    start = torch.tensor(0.4)
    step(*program(start.clone()))
    once = pyro.get_param_store()._params["a"].grad.clone()
    pyro.clear_param_store()
    start.requires_grad_()
    (3.0 * start).backward()
    step(*program(start))
    torch.testing.assert_close(start.grad, once + 3.0)


def test_a_modules_parameter_is_left_to_its_owner():
    start = torch.nn.Parameter(torch.tensor(0.4))
    step(*program(start))
    once = start.grad.clone()
    pyro.clear_param_store()
    step(*program(start))
    torch.testing.assert_close(start.grad, 2 * once)


def test_one_tensor_under_two_names():
    start = torch.tensor(0.4)
    model, guide = program(start)
    step(model, guide)
    once = start.grad.clone()

    def with_another_name():
        guide()
        pyro.param("b", start)

    step(model, with_another_name)
    torch.testing.assert_close(start.grad, 2 * once)
