"""A policy for CartPole: a pole on a cart, pushed left or right at every step, with a reward of 1 for each step it stands.

    ∇ E[R] = E[Σ_t A_t ∇ log π(a_t | s_t)],   A_t = Σ_{u ≥ t} r_u − V(s_t)

Actions are sites of the guide, rewards are factors of the model, and the objective is `Expectation(entropy=c)`. The value baseline V is
learned in the program: the factor of step t is r_t + V(s_{t+1}) − V(s_t) with V held constant, which sums to the advantage A_t over the
steps from t on, and changes no gradient on average, since it adds up to −V(s_0) over the episode, which a factor at the start makes
good (potential-based shaping, Ng, Harada and Russell 1999). A last factor, whose value is zero, has the gradient of −½ Σ (V(s_t) − Σ_{u ≥ t} r_u)².

In Pyro the environment is Gymnasium's, stepped while the program runs, in both guide and model: the actions leave the tensors, so that
whatever comes later is taken to depend on them. In NumPyro the same equations in jnp run inside `scan`, where an episode goes on
when the pole has fallen, and is masked. A datum is the state at the start (m, m/s, rad, rad/s). Under `ELBO()` the policy is
compared with the even one: an entropy bonus.
"""

import numpy as np

OPTIONS = {
    "steps": 200,  # of an episode, at most
    "hidden": 32,  # tanh units of the policy and of the value
    "baseline": True,  # whether a value is learned and subtracted
}
DISCRETE = ("a*",)
# The scale of a reward, so that returns are about one, and the scales of a state.
REWARD, SCALES = 0.02, np.array([2.4, 2.0, 0.21, 2.0])


def load(options, seed):
    """Return states at the start, as Gymnasium draws them."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-0.05, 0.05, (256, 4)), rng.uniform(-0.05, 0.05, (64, 4))


def initial(options, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng, hidden = np.random.default_rng(seed), int(options["hidden"])
    sizes = {"policy_w0": (4, hidden), "value_w0": (4, hidden)}
    params = {name: rng.normal(size=shape) / SCALES[:, None] / 2 for name, shape in sizes.items()}
    params |= {"policy_b0": np.zeros(hidden), "value_b0": np.zeros(hidden)}
    return params | {"policy_w1": 0.01 * rng.normal(size=(hidden, 2)), "value_w1": np.zeros((hidden, 1))}


def network(name, xp, params, state):
    """Return the output of a network with one hidden layer."""
    return xp.tanh(state @ params[f"{name}_w0"] + params[f"{name}_b0"]) @ params[f"{name}_w1"]


def act(params, states):
    """Return the more probable action of a trained policy, from NumPy arrays."""
    return network("policy", np, params, states).argmax(-1)


def registered(ppl, start, name):
    """Return the parameters of one network."""
    return {key: ppl.param(key, value) for key, value in start.items() if key.startswith(name)}


def environment(states, steps):
    """Return Gymnasium's CartPole, one for each row of `states`, which are where they start."""
    import gymnasium as gym

    made = gym.make_vec("CartPole-v1", len(states), vectorization_mode="vector_entry_point", max_episode_steps=steps)
    made.reset(seed=0)
    made.unwrapped.state = np.array(states, np.float64).T
    return made


def pyro_program(options, train, seed):
    """Return model and guide for Pyro, which step Gymnasium's environment."""
    import pyro
    import pyro.distributions as dist
    import torch

    start = {name: torch.tensor(x, dtype=torch.float32) for name, x in initial(options, seed).items()}
    steps = int(options["steps"])

    def episode(x, choose):
        """Yield (t, state, alive, next state, alive then) of each step until no pole stands."""
        made, state, alive = None, x, torch.ones(len(x), dtype=torch.bool)
        for t in range(steps):
            action = choose(t, state, alive)
            if made is None:
                # Vectorized particles stand left of the episodes, each with an environment of its own.
                made = environment(x.expand(*action.shape, 4).reshape(-1, 4).numpy(), steps)
            reached, _, fallen, _, _ = made.step(action.flatten().numpy())
            after = torch.as_tensor(reached, dtype=x.dtype).reshape(*action.shape, 4)
            # What would come after the last step is worth nothing.
            standing = alive & ~torch.as_tensor(fallen).reshape(action.shape) & (t + 1 < steps)
            yield t, state, alive, after, standing
            state, alive = after, standing
            if not alive.any():
                break
        made.close()

    def model(x):
        params = registered(pyro, start, "value") if options["baseline"] else {}

        def value(state):
            return network("value", torch, params, state)[..., 0] if params else torch.zeros(state.shape[:-1])

        with pyro.plate("episodes", len(x)):
            rewards, values = [], []
            pyro.factor("start", value(x).detach())

            def choose(t, state, alive):
                even = dist.Categorical(logits=torch.zeros(len(x), 2))
                return pyro.sample(f"a{t}", even.mask(alive))

            for t, state, alive, after, standing in episode(x, choose):
                now, then = value(state) * alive, value(after).detach() * standing
                rewards.append(REWARD * alive)
                values.append(now)
                pyro.factor(f"reward{t}", rewards[-1] + then - now.detach())
            if params:
                rewards, values = (torch.stack(torch.broadcast_tensors(*several)) for several in (rewards, values))
                loss = ((values - rewards.flip(0).cumsum(0).flip(0)) ** 2).sum(0) / 2
                pyro.factor("critic", loss.detach() - loss)

    def guide(x):
        params = registered(pyro, start, "policy")
        with pyro.plate("episodes", len(x)):

            def choose(t, state, alive):
                policy = dist.Categorical(logits=network("policy", torch, params, state))
                return pyro.sample(f"a{t}", policy.mask(alive))

            for _ in episode(x, choose):
                pass

    return model, guide


def moved(xp, state, action):
    """Return where a cart is after a push, by Euler steps of 0.02 s, and whether the pole has fallen then.

    Equations: Barto, Sutton and Anderson (1983), without friction, as in Gymnasium.
    """
    x, speed, angle, spin = (state[..., i] for i in range(4))
    force = 20.0 * action - 10.0
    sine, cosine = xp.sin(angle), xp.cos(angle)
    shared = (force + 0.05 * spin**2 * sine) / 1.1
    spinning = (9.8 * sine - cosine * shared) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
    pushed = shared - 0.05 * spinning * cosine / 1.1
    after = xp.stack([x + 0.02 * speed, speed + 0.02 * pushed, angle + 0.02 * spin, spin + 0.02 * spinning], -1)
    return after, (abs(after[..., 0]) > 2.4) | (abs(after[..., 2]) > 12 * 2 * np.pi / 360)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro, with the environment inside `scan`."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from jax.lax import stop_gradient
    from numpyro.contrib.control_flow import scan

    start = {name: jnp.asarray(x, jnp.float32) for name, x in initial(options, seed).items()}
    steps = int(options["steps"])

    def episode(x, logits, each):
        """Scan over the steps; each(state, alive, next state, alive then) may add factors, and returns what is stacked."""

        def step(carry, t):
            state, alive = carry
            with numpyro.plate("episodes", x.shape[0]):
                action = numpyro.sample("a", dist.Categorical(logits=logits(state)).mask(alive))
                after, fallen = moved(jnp, state, action)
                # A pole that lies there would go on turning without bounds.
                after = jnp.where(alive[:, None], after, state)
                # What would come after the last step is worth nothing.
                standing = alive & ~fallen & (t + 1 < steps)
                return (after, standing), each(state, alive, after, standing)

        return scan(step, (x, jnp.ones(x.shape[0], bool)), jnp.arange(steps))[1]

    def model(x):
        params = registered(numpyro, start, "value") if options["baseline"] else {}

        def value(state):
            return network("value", jnp, params, state)[:, 0] if params else jnp.zeros(state.shape[0])

        def each(state, alive, after, standing):
            now, then = value(state) * alive, value(after) * standing
            numpyro.factor("reward", REWARD * alive + stop_gradient(then - now))
            return now, REWARD * alive

        with numpyro.plate("episodes", x.shape[0]):
            numpyro.factor("start", stop_gradient(value(x)))
        values, rewards = episode(x, lambda state: jnp.zeros((x.shape[0], 2)), each)
        if params:
            to_go = jnp.cumsum(rewards[::-1], 0)[::-1]
            loss = ((values - to_go) ** 2).sum(0) / 2
            with numpyro.plate("episodes", x.shape[0]):
                numpyro.factor("critic", stop_gradient(loss) - loss)

    def guide(x):
        params = registered(numpyro, start, "policy")
        episode(x, lambda state: network("policy", jnp, params, state), lambda *_: None)

    return model, guide
