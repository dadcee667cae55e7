"""Attend, infer, repeat: how many objects a scene holds, where they are, and what they look like.

    for t = 1, 2, ... while present:  present_t ~ Bernoulli,  where_t ~ uniform over places,  what_t ~ N(0, I)
    x ~ N(Σ_t drawn(where_t, decode(what_t)), σ²)

Scenes are up to `most` of scikit-learn's digits (8 × 8 pixels) on a canvas of 16 × 16. The decoder is fixed: the mean digit and the
principal components. The guide goes through the objects in the same way: it looks at what the objects so far leave
unexplained, and says whether there is one more, where, and, from the pixels at that place, what. Presence and place are discrete, and
the appearance is reparameterized. An object that is not there is masked: it is drawn, and costs nothing. Eslami et al. (2016),
and their difference-AIR for the guide.
"""

import numpy as np

OPTIONS = {
    "most": 3,  # objects of a scene
    "components": 10,  # principal components of the decoder
    "sigma": 0.25,  # standard deviation of a pixel, whose intensity is in [0, 1]
    "hidden": 16,  # tanh units of the network that scores places
    "scenes": 2000,  # for training
}
DISCRETE = ("present*", "where*")
CANVAS, SIDE = 16, 8
PLACES = CANVAS - SIDE + 1  # along each axis


def scenes(options, seed):
    """Return scenes and their numbers of objects, for training and for testing, of different digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    split = train_test_split(load_digits().images / 16, test_size=0.3, random_state=seed)
    rng, made = np.random.default_rng(seed), []
    for digits, size in zip(split, (int(options["scenes"]), 300), strict=True):
        counts = rng.integers(0, int(options["most"]) + 1, size)
        made.append((np.array([_scene(digits, count, rng) for count in counts]), counts))
    return made


def _scene(digits, count, rng):
    """Return digits at random places, whose squares share two rows or columns at most, and a little noise."""
    while True:
        places = rng.integers(0, PLACES, (count, 2))
        apart = np.abs(places[:, None] - places[None]).max(-1) + SIDE * np.eye(count)
        if (apart >= SIDE - 2).all():
            break
    canvas = 0.05 * rng.normal(size=(CANVAS, CANVAS))
    for row, column in places:
        canvas[row : row + SIDE, column : column + SIDE] += digits[rng.integers(len(digits))]
    return canvas


def load(options, seed):
    """Return the scenes, without their numbers of objects."""
    if int(options["most"]) not in (1, 2, 3):
        raise ValueError(f"most is 1, 2 or 3 on a canvas of this size; got {options['most']}.")
    (train, _), (test, _) = scenes(options, seed)
    return train, test


def decoder(options):
    """Return the mean digit and the components, each as wide as it varies, of all of scikit-learn's digits."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    found = PCA(int(options["components"])).fit(load_digits().data / 16)
    return found.mean_, found.components_ * np.sqrt(found.explained_variance_)[:, None]


def initial(options, seed):
    """Return the guide's initial parameters: it sees no difference between scenes, but looks where there is ink."""
    rng, hidden, size = np.random.default_rng(seed), int(options["hidden"]), int(options["components"])
    return {
        "present_w": np.zeros(2),
        "present_b": np.zeros(()),
        "place_template": 0.3 * decoder(options)[0],
        "place_w0": rng.normal(size=(SIDE**2, hidden)) / SIDE,
        "place_b0": np.zeros(hidden),
        "place_w1": np.zeros(hidden),
        "what_w": np.zeros((SIDE**2, size)),
        "what_b": np.zeros(size),
        "what_log_scale": np.full(size, -1.0),
    }


class Eye:
    """What the guide computes from what is still unexplained, of shape (..., 16, 16), in NumPy, torch or JAX alike."""

    def __init__(self, xp, array, whole, options):
        self.xp = xp
        corner = np.stack(np.divmod(np.arange(PLACES**2), PLACES), -1)
        within = np.stack(np.divmod(np.arange(SIDE**2), SIDE), -1)
        pixels = corner[:, None] + within[None]
        self.rows, self.columns = whole(pixels[..., 0]), whole(pixels[..., 1])
        # shift[k] writes a line of 8 pixels to a line of 16, from pixel k on.
        self.shift = array(np.stack([np.eye(SIDE, CANVAS, k) for k in range(PLACES)]))
        mean, components = decoder(options)
        self.mean, self.components = array(mean), array(components)
        self.places = array(np.eye(PLACES**2))

    def patches(self, left):
        """Return the pixels at every place, (..., places, 64)."""
        return left[..., self.rows, self.columns]

    def place(self, params, patches):
        """Return the logits of places, (..., places)."""
        hidden = self.xp.tanh(patches @ params["place_w0"] + params["place_b0"])
        return patches @ params["place_template"] + hidden @ params["place_w1"]

    def present(self, params, left, place):
        """Return the logit of one more object, from the ink that is left and the best place's score."""
        features = (left**2).sum(-1).sum(-1) / 10 - 1, self.xp.amax(place, -1) - 1
        return features[0] * params["present_w"][0] + features[1] * params["present_w"][1] + params["present_b"]

    def what(self, params, patches, where):
        """Return the appearance's mean, from the pixels at a place."""
        seen = (self.places[where][..., None] * patches).sum(-2)
        return seen @ params["what_w"] + params["what_b"]

    def drawn(self, where, what):
        """Return a canvas with one object."""
        patch = (self.mean + what @ self.components).reshape(*what.shape[:-1], SIDE, SIDE)
        down, across = self.shift[where // PLACES], self.shift[where % PLACES]
        return down.swapaxes(-1, -2) @ patch @ across


def looked(params, x, options):
    """Return the numbers of objects that a trained guide finds, its canvases and its places, taking the likeliest of each."""
    eye = Eye(np, np.asarray, np.asarray, options)
    canvas, there, places = np.zeros_like(x), np.ones(len(x), bool), []
    counts = np.zeros(len(x), int)
    for _ in range(int(options["most"])):
        patches = eye.patches(x - canvas)
        place = eye.place(params, patches)
        there = there & (eye.present(params, x - canvas, place) > 0)
        where = place.argmax(-1)
        canvas = canvas + there[:, None, None] * eye.drawn(where, eye.what(params, patches, where))
        counts += there
        places.append(where)
    return counts, canvas, np.stack(places, -1)


def program(ppl, dist, mask, xp, array, whole, options, seed):
    """Return model and guide, written once for both libraries; mask(there) masks what it encloses."""
    start = {name: array(value) for name, value in initial(options, seed).items()}
    most, size = int(options["most"]), int(options["components"])
    eye = Eye(xp, array, whole, options)

    def model(x):
        with ppl.plate("scenes", x.shape[0]):
            canvas, there = array(np.zeros((CANVAS, CANVAS))), x[:, 0, 0] == x[:, 0, 0]
            for t in range(most):
                with mask(there):
                    # All numbers of objects are equally probable.
                    chance = array(np.array((most - t) / (most - t + 1)))
                    there = there & (ppl.sample(f"present{t}", dist.Bernoulli(chance)) > 0)
                with mask(there):
                    where = ppl.sample(f"where{t}", dist.Categorical(logits=array(np.zeros(PLACES**2))))
                    what = ppl.sample(f"what{t}", dist.Normal(array(np.zeros(size)), 1.0).to_event(1))
                canvas = canvas + there[..., None, None] * eye.drawn(where, what)
            ppl.sample("x", dist.Normal(canvas, float(options["sigma"])).to_event(2), obs=x)

    def guide(x):
        params = {name: ppl.param(name, value) for name, value in start.items()}
        with ppl.plate("scenes", x.shape[0]):
            left, there = x, x[:, 0, 0] == x[:, 0, 0]
            for t in range(most):
                patches = eye.patches(left)
                place = eye.place(params, patches)
                with mask(there):
                    present = ppl.sample(f"present{t}", dist.Bernoulli(logits=eye.present(params, left, place)))
                there = there & (present > 0)
                with mask(there):
                    where = ppl.sample(f"where{t}", dist.Categorical(logits=place))
                    loc = eye.what(params, patches, where)
                    what = ppl.sample(f"what{t}", dist.Normal(loc, xp.exp(params["what_log_scale"])).to_event(1))
                left = left - there[..., None, None] * eye.drawn(where, what)

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.float32)

    return program(
        pyro, dist, lambda m: pyro.poutine.mask(mask=m), torch, array, lambda a: torch.tensor(a).long(), options, seed
    )


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.handlers import mask

    def array(a):
        return jnp.asarray(a, jnp.float32)

    return program(numpyro, dist, lambda m: mask(mask=m), jnp, array, jnp.asarray, options, seed)
