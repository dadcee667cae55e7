"""Molecules written character by character, for a reward that cannot be differentiated: drug-likeness as RDKit computes it.

    ∇ E[QED(s)] = E[QED(s) Σ_t ∇ log q(c_t | c_<t)],   s = c_1 c_2 ... up to the end sign; QED = 0 if s is no molecule

Characters are sites of a recurrent guide (gated units), the reward is a `factor`, and the objective is `Expectation()`. The few
molecules in `EXAMPLES` are the data, so that the guide finds valid strings at all: for each datum one string is drawn, and
the datum's own log probability counts with a small weight. In NumPyro characters are drawn in `scan`. RDKit is a `black_box`,
called string by string. QED: Bickerton et al. (2012), between 0 and 1. Under `ELBO()` strings are compared with even characters: an
entropy bonus.
"""

from functools import lru_cache

import numpy as np

OPTIONS = {
    "length": 30,  # characters of a string, at most
    "hidden": 64,  # gated units
    "imitation": 0.05,  # weight of an example's log probability, in QED per nat
    "reward": 1.0,  # weight of the QED
}
DISCRETE = ("c*",)
ALPHABET = "$CcNnOFS()=#123"  # the first is the end sign
EXAMPLES = """CC(=O)Oc1ccccc1C(=O)O CC(=O)Nc1ccc(O)cc1 CC(C)Cc1ccc(cc1)C(C)C(=O)O CN1CCCC1c1cccnc1 OC(=O)c1ccccc1O
CCOC(=O)c1ccc(N)cc1 NC(=O)c1cccnc1 CC(C)NCC(O)COc1ccccc1 Nc1ccc(cc1)S(=O)(=O)N CNCCC(Oc1ccccc1)c1ccccc1 CCN(CC)CC(=O)Nc1ccccc1
Oc1ccc(F)cc1 CC(N)Cc1ccccc1 COc1ccccc1O NCCc1ccc(O)c(O)c1 O=C1CCCN1 c1ccc2ncccc2c1 CC1CCCCN1 O=C(O)CCc1ccccc1
CN(C)CCc1ccccc1 N#Cc1ccccc1 Cc1ccccc1NC(=O)C Fc1ccc(CN2CCNCC2)cc1 CCOc1ccccc1 O=C(Nc1ccccc1)C1CCNCC1""".split()


def encoded(strings, length):
    """Return strings as rows of character numbers, filled up with end signs."""
    rows = np.zeros((len(strings), length), int)
    for row, string in zip(rows, strings, strict=True):
        row[: len(string)] = [ALPHABET.index(character) for character in string]
    return rows


def decoded(row):
    """Return the string of one row, up to its first end sign."""
    return "".join(ALPHABET[c] for c in row).partition(ALPHABET[0])[0]


@lru_cache(maxsize=1_000_000)
def drug_likeness(string):
    """Return the QED of a molecule, or None if the string is none."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import QED

    RDLogger.DisableLog("rdApp.*")
    molecule = Chem.MolFromSmiles(string) if string else None
    return None if molecule is None else QED.qed(molecule)


def scores(rows):
    """Return the QED of each row of character numbers, of shape (..., length); 0 for what is no molecule."""
    rows = np.asarray(rows)
    found = [drug_likeness(decoded(row)) or 0.0 for row in rows.reshape(-1, rows.shape[-1])]
    return np.array(found, np.float32).reshape(rows.shape[:-1])


def load(options, seed):
    """Return the examples that are no longer than a string may be, encoded, several times over."""
    length, shortest = int(options["length"]), min(map(len, EXAMPLES))
    if length < shortest:
        raise ValueError(f"length is at least that of the shortest example, {shortest}; got {length}.")
    rows = encoded([example for example in EXAMPLES if len(example) <= length], length)
    return np.tile(rows, (8, 1)), rows


def initial(options, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng, hidden, signs = np.random.default_rng(seed), int(options["hidden"]), len(ALPHABET)
    params = {"out_w": 0.1 * rng.normal(size=(hidden, signs)), "out_b": np.zeros(signs)}
    for gate in ("update", "reset", "new"):
        params[f"{gate}_c"] = rng.normal(size=(signs, hidden)) / 2
        params[f"{gate}_h"] = rng.normal(size=(hidden, hidden)) / np.sqrt(hidden)
    return params


def advance(xp, params, h, before):
    """Return the gated units after a character (one-hot), and the logits of the next one."""

    def gate(name, h):
        return before @ params[f"{name}_c"] + h @ params[f"{name}_h"]

    update, reset = (0.5 + 0.5 * xp.tanh(gate(name, h)) for name in ("update", "reset"))
    h = (1 - update) * h + update * xp.tanh(gate("new", reset * h))
    return h, h @ params["out_w"] + params["out_b"]


def strings(params, count, options, seed):
    """Return strings drawn from a trained guide, in NumPy."""
    rng, signs = np.random.default_rng(seed), np.eye(len(ALPHABET))
    h, before = np.zeros((count, params["out_w"].shape[0])), np.tile(signs[0], (count, 1))
    rows = []
    for _ in range(int(options["length"])):
        h, logits = advance(np, params, h, before)
        # The largest of logits with Gumbel noise is a draw.
        rows.append((logits + rng.gumbel(size=logits.shape)).argmax(-1))
        before = signs[rows[-1]]
    return [decoded(row) for row in np.stack(rows, -1)]


def imitate(xp, params, log_softmax, carry, now):
    """Return the carry (units, character before, whether the string goes on, log probability) after a character of a given string."""
    h, before, alive, total = carry
    h, logits = advance(xp, params, h, before)
    return h, now, alive * (1 - now[:, 0]), total + alive * (log_softmax(logits, -1) * now).sum(-1)


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pplgrad.pyro import black_box

    start = {name: torch.tensor(x, dtype=torch.float32) for name, x in initial(options, seed).items()}
    signs, length = torch.eye(len(ALPHABET)), int(options["length"])

    def registered():
        return {name: pyro.param(name, value) for name, value in start.items()}

    def model(x):
        x = x.long()
        with pyro.plate("strings", len(x)):
            alive, drawn = torch.ones(len(x), dtype=torch.bool), []
            for t in range(length):
                drawn.append(pyro.sample(f"c{t}", dist.Categorical(logits=torch.zeros(len(ALPHABET))).mask(alive)))
                alive = alive & (drawn[-1] > 0)
            reward = black_box(scores, torch.stack(torch.broadcast_tensors(*drawn), -1), event_dim=1)
            pyro.factor("reward", float(options["reward"]) * reward)
            params, zeros = registered(), torch.zeros(len(x))
            carry = (torch.zeros(len(x), int(options["hidden"])), signs[x[:, 0] * 0], zeros + 1, zeros)
            for now in signs[x].unbind(1):
                carry = imitate(torch, params, torch.log_softmax, carry, now)
            pyro.factor("imitation", float(options["imitation"]) * carry[-1])

    def guide(x):
        params = registered()
        h, before = torch.zeros(len(x), int(options["hidden"])), signs[x[:, 0].long() * 0]
        with pyro.plate("strings", len(x)):
            alive = torch.ones(len(x), dtype=torch.bool)
            for t in range(length):
                h, logits = advance(torch, params, h, before)
                drawn = pyro.sample(f"c{t}", dist.Categorical(logits=logits).mask(alive))
                alive, before = alive & (drawn > 0), signs[drawn]

    return model, guide


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    from pplgrad.numpyro import black_box

    start = {name: jnp.asarray(x, jnp.float32) for name, x in initial(options, seed).items()}
    signs, length = jnp.eye(len(ALPHABET)), int(options["length"])

    def registered():
        return {name: numpyro.param(name, value) for name, value in start.items()}

    def drawn(x, first, each):
        """Draw all characters; each(carry, character before) returns the carry and the logits."""

        def step(carry, _):
            carry, alive, before = carry
            carry, logits = each(carry, before)
            with numpyro.plate("strings", x.shape[0]):
                c = numpyro.sample("c", dist.Categorical(logits=logits).mask(alive))
            return (carry, alive & (c > 0), signs[c]), c

        begin = (first, jnp.ones(x.shape[0], bool), jnp.tile(signs[0], (x.shape[0], 1)))
        return scan(step, begin, None, length=length)[1].T

    def model(x):
        x = x.astype(int)
        rows = drawn(x, None, lambda carry, before: (None, jnp.zeros_like(before)))
        with numpyro.plate("strings", x.shape[0]):
            numpyro.factor("reward", float(options["reward"]) * black_box(scores, rows, event_dim=1))
            params, zeros = registered(), jnp.zeros(x.shape[0])
            carry = (jnp.zeros((x.shape[0], int(options["hidden"]))), signs[x[:, 0] * 0], zeros + 1, zeros)

            def step(carry, now):
                return imitate(jnp, params, jax.nn.log_softmax, carry, now), None

            carry, _ = jax.lax.scan(step, carry, signs[x].swapaxes(0, 1))
            numpyro.factor("imitation", float(options["imitation"]) * carry[-1])

    def guide(x):
        params = registered()
        first = jnp.zeros((x.shape[0], int(options["hidden"])))
        drawn(x, first, lambda h, before: advance(jnp, params, h, before))

    return model, guide
