"""A hierarchical policy on a small grid, with two objectives: treasure found, and time spent.

A diver starts at the top left of a sea that gets deeper to the right, and deeper treasures are worth more. The upper level of
the policy chooses an option (a way of moving) at the start and once more on the way, the lower level a move at every
step: right or down. Rewards are a treasure's worth when it is reached, and −1 for every step until then. With the
weight w of a preference the reward is scalarised, (1 − w) · worth − w · time, and the objective is `Expectation()`:

    ∇ E[R] = E[Σ_k G_k ∇ log π(option_k | cell) + Σ_t G_t ∇ log π(move_t | option, cell)],   G: the reward still to come.

A datum is the number of a preference; each has a policy of its own, a table. `returns` gives the exact expected
worth and time of a policy by dynamic programming, `best` the best that any policy can do. Under `ELBO()` the policy gets an
entropy bonus: both levels are compared with the uniform policy.
"""

import numpy as np

OPTIONS = {
    "preferences": 13,  # weights of time between 0 and 1, both included
    "ways": 2,  # options of the upper level
    "credit": "to go",  # "to go": a reward a step; "episode": one reward at the end, which every draw gets whole
}
DISCRETE = ("option*", "move*")
# Worth of the treasure under each column, and how deep it lies (a made-up sea, in the manner of deep sea treasure).
WORTH = np.array([1.0, 5.5, 8.5, 9.7, 10.3])
DEPTH = np.array([1, 2, 3, 3, 4])
COLUMNS, ROWS = len(WORTH), int(DEPTH.max()) + 1
STEPS = COLUMNS - 1 + int(DEPTH.max())
SECOND = STEPS // 2  # the step at which the option is chosen again


def load(options, seed):
    """Return preferences, each as often."""
    if options["credit"] not in ("to go", "episode"):
        raise ValueError(f"credit is 'to go' or 'episode'; got '{options['credit']}'.")
    n = int(options["preferences"])
    return np.repeat(np.arange(n), 30)[:, None], np.repeat(np.arange(n), 10)[:, None]


def sea():
    """Return, for each cell, where the moves right and down lead, what is found there, and whether that ends the dive.

    Cells are numbered by row; the right edge stops a move to the right, and a dive that is over stays where it is.
    """
    cells = ROWS * COLUMNS
    after, found, over = np.zeros((cells, 2), int), np.zeros((cells, 2)), np.zeros(cells)
    for row in range(ROWS):
        for column in range(COLUMNS):
            cell = row * COLUMNS + column
            over[cell] = row >= DEPTH[column]
            for move, (r, c) in enumerate([(row, min(column + 1, COLUMNS - 1)), (min(row + 1, ROWS - 1), column)]):
                after[cell, move] = cell if over[cell] else r * COLUMNS + c
                found[cell, move] = WORTH[c] if r >= DEPTH[c] and not over[cell] else 0.0
    return after, found, over


def weights(options):
    """Return the weights of time of all preferences."""
    return np.linspace(0, 1, int(options["preferences"]))


def returns(upper, lower):
    """Return the exact expected worth and time of one policy, by going through all steps forwards.

    `upper` has the probabilities of options, (2, cells, ways); `lower` those of moves, (ways, cells, 2).
    """
    after, found, over = sea()
    ways = upper.shape[-1]
    mass = np.zeros((ways, ROWS * COLUMNS))
    mass[:, 0] = upper[0, 0]
    worth = time = 0.0
    for t in range(STEPS):
        if t == SECOND:
            mass = (mass.sum(0)[:, None] * upper[1]).T
        time += (mass * (1 - over)).sum()
        moved = mass[..., None] * lower
        worth += (moved * found).sum()
        mass = np.stack([np.bincount(after.ravel(), m.ravel(), ROWS * COLUMNS) for m in moved])
    return worth, time


def best(weight):
    """Return the best scalarised reward of any policy, by dynamic programming from the last step backwards."""
    after, found, over = sea()
    value = np.zeros(ROWS * COLUMNS)
    for _ in range(STEPS):
        value = ((1 - weight) * found - weight * (1 - over[:, None]) + value[after]).max(-1)
    return value[0]


def front():
    """Return worth and time of every treasure: all that a sensible policy can reach."""
    return WORTH, np.arange(COLUMNS) + DEPTH


def probabilities(params):
    """Return the policy's probabilities of options and moves, from its parameters."""

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    return softmax(params["upper"]), softmax(params["lower"])


def program(ppl, dist, xp, array, whole, options, train, seed):
    """Return model and guide, written once for both libraries."""
    n, ways, cells = int(options["preferences"]), int(options["ways"]), ROWS * COLUMNS
    rng = np.random.default_rng(seed)
    start = {
        "upper": array(np.zeros((n, 2, cells, ways))),
        # The ways must differ at first, or the upper level has nothing to choose.
        "lower": array(rng.normal(size=(n, ways, cells, 2))),
    }
    after, found, over = sea()
    after, found, over = whole(after), array(found), array(over)
    weight = array(weights(options))
    even = {"option": array(np.zeros(ways)), "move": array(np.zeros(2))}

    def dive(x, choose, reward):
        """Run an episode for each datum: choose(name, kind, ...) draws, reward(name, value) takes what a step earned."""
        who = whole(x[:, 0])
        cell, earned = who * 0, []
        with ppl.plate("dives", x.shape[0]):
            for t in range(STEPS):
                if t in (0, SECOND):
                    option = choose(f"option{t}", "option", who, int(t > 0), cell)
                move = choose(f"move{t}", "move", who, option, cell)
                earned.append((1 - weight[who]) * found[cell, move] - weight[who] * (1 - over[cell]))
                cell = after[cell, move]
                if options["credit"] == "to go":
                    reward(f"reward{t}", earned[-1])
            if options["credit"] == "episode":
                reward("reward", sum(earned))

    def model(x):
        dive(x, lambda name, kind, *where: ppl.sample(name, dist.Categorical(logits=even[kind])), ppl.factor)

    def guide(x):
        tables = {"option": ppl.param("upper", start["upper"]), "move": ppl.param("lower", start["lower"])}

        def choose(name, kind, *where):
            return ppl.sample(name, dist.Categorical(logits=tables[kind][where]))

        dive(x, choose, lambda name, value: None)

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    def whole(a):
        return torch.as_tensor(a).long()

    return program(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), whole, options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def whole(a):
        return jnp.asarray(a).astype(int)

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), whole, options, train, seed)
