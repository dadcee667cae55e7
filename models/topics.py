"""Latent Dirichlet allocation: which topics do texts have, with a discrete topic for every word?

    topic_k ~ Dirichlet(η) over words,  share_d ~ Dirichlet(α) over topics,  z_dn ~ Categorical(share_d),  w_dn ~ Categorical(topic_{z_dn})

The plate of documents is subsampled at every step, and that of words inside it is masked where a text is shorter. Topics and shares are
continuous, drawn from learned Dirichlets (a document's from the words in it), and the topic of a word is discrete, with logits
log share + a table of the vocabulary. Since all documents share the topics, every step is given the whole train set.

The corpus ships with SciPy (BSD licence): the docstrings of the public functions of some of its modules, a document each.
"""

import numpy as np

OPTIONS = {
    "topics": 5,
    "vocabulary": 300,
    "length": 40,  # words of a text that are kept
    "batch": 32,  # documents that a step sees
    "alpha": 0.3,
    "eta": 0.5,
}
DISCRETE = ("z",)
WHOLE_DATA = True
MODULES = ("fft", "linalg", "ndimage", "signal", "stats")
NO_WORD = -1
FLOOR = 0.3  # no Dirichlet of the guide is sparser: draws that round to zero have no density
DULL = {
    *("array", "arrays", "like", "axis", "default", "dtype", "examples", "float", "function", "int", "input", "ndarray"),
    *("none", "notes", "object", "optional", "output", "parameters", "references", "return", "returned", "returns", "scipy", "shape", "size"),
    *("true", "false", "type", "using", "used", "use", "value", "values", "version", "given", "number", "numpy", "import", "np", "plt", "rng"),
}  # fmt: skip


def texts():
    """Return the docstrings and the module of each."""
    import importlib

    found = []
    for label, name in enumerate(MODULES):
        module = importlib.import_module(f"scipy.{name}")
        seen = {getattr(module, public).__doc__ for public in module.__all__ if callable(getattr(module, public))}
        found += [(text, label) for text in sorted(filter(None, seen)) if len(text.split()) > 60]
    return [text for text, _ in found], np.array([label for _, label in found])


def corpus(options):
    """Return the texts as numbers of words (−1 where a text is shorter), the module of each, and the vocabulary."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    documents, labels = texts()
    vectorizer = CountVectorizer(
        stop_words=sorted(DULL | ENGLISH_STOP_WORDS),
        max_features=int(options["vocabulary"]),
        max_df=0.5,
        token_pattern="[a-z]{3,}",
    ).fit(documents)
    analyse, length = vectorizer.build_analyzer(), int(options["length"])
    words = np.full((len(documents), length), NO_WORD, float)
    for row, text in zip(words, documents, strict=True):
        known = [vectorizer.vocabulary_[word] for word in analyse(text) if word in vectorizer.vocabulary_][:length]
        row[: len(known)] = known
    full = (words != NO_WORD).sum(1) >= min(10, length)
    return words[full], labels[full], vectorizer.get_feature_names_out()


def load(options, seed):
    """Return the texts as numbers of words, split into train and test."""
    from sklearn.model_selection import train_test_split

    if min(int(options[name]) for name in ("topics", "vocabulary", "length", "batch")) < 2:
        raise ValueError("topics, vocabulary, length and batch are at least 2.")
    words = corpus(options)[0]
    if len(words) < 2:
        raise ValueError(
            "so small a vocabulary leaves no text with enough words; pass a larger one or a smaller length."
        )
    return train_test_split(words, test_size=0.2, random_state=seed)


def counts(words, vocabulary):
    """Return how often each word is in each text."""
    return np.stack([np.bincount(row[row != NO_WORD].astype(int), minlength=vocabulary) for row in np.asarray(words)])


def topic_shares(params, words):
    """Return the guide's mean share of each topic in each text."""
    shape = shape_of_shares(np, counts(words, len(params["see"])), params)
    return shape / shape.sum(-1, keepdims=True)


def shape_of_shares(xp, count, params):
    """Return the Dirichlet's parameters of the shares: a positive number for each topic, and the words' votes."""
    votes = xp.exp(params["see"])
    return (
        FLOOR + xp.exp(params["share_bias"]) + count @ (votes / votes.sum(-1, keepdims=True)) * xp.exp(params["trust"])
    )


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries: each topic near some texts."""
    rng = np.random.default_rng(seed)
    k, size = int(options["topics"]), int(options["vocabulary"])
    frequency = counts(train, size).sum(0) + 1.0
    near = 0.3 * rng.normal(size=(k, size))
    return {
        "topic_shape": np.log(0.5 + 0.02 * len(train) * size / k * frequency / frequency.sum()) + near,
        "see": near.T.copy(),
        "share_bias": np.full(k, -2.0),
        "trust": np.zeros(1),
        "word": near.T.copy(),
    }


def program(ppl, dist, xp, array, index, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    k, size = start["topic_shape"].shape
    alpha, eta = (float(options[name]) for name in ("alpha", "eta"))

    def param(name):
        return ppl.param(name, start[name])

    def documents(x):
        return ppl.plate("documents", len(x), subsample_size=min(int(options["batch"]), len(x)), dim=-2)

    def one_hot(values, n):
        return 1.0 * (values[..., None] == xp.arange(n))

    def model(x):
        topics = ppl.sample("topics", dist.Dirichlet(array(np.full((k, size), eta))).to_event(1))
        with documents(x) as rows:
            words = index(x[rows])
            share = ppl.sample("share", dist.Dirichlet(array(np.full(k, alpha))))
            with ppl.plate("words", words.shape[1], dim=-1), ppl.mask(words >= 0):
                z = ppl.sample("z", dist.Categorical(probs=share))
                probabilities = (one_hot(z, k)[..., None, :] @ topics)[..., 0, :]
                ppl.sample("w", dist.Categorical(probs=probabilities), obs=words.clip(0))

    def guide(x):
        ppl.sample("topics", dist.Dirichlet(FLOOR + xp.exp(param("topic_shape"))).to_event(1))
        votes = {name: param(name) for name in ("see", "share_bias", "trust")}
        with documents(x) as rows:
            words = index(x[rows])
            count = (one_hot(words, size)).sum(-2)[:, None]
            share = ppl.sample("share", dist.Dirichlet(shape_of_shares(xp, count, votes)))
            with ppl.plate("words", words.shape[1], dim=-1), ppl.mask(words >= 0):
                logits = xp.log(share.clip(1e-6)) + param("word")[words.clip(0)]
                ppl.sample("z", dist.Categorical(logits=logits))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import types

    import pyro
    import pyro.distributions as dist
    import torch

    ppl = types.SimpleNamespace(sample=pyro.sample, param=pyro.param, plate=pyro.plate)
    ppl.mask = lambda mask: pyro.poutine.mask(mask=mask)

    def array(a):
        return torch.tensor(a, dtype=torch.float32)

    return program(ppl, dist, torch, array, torch.Tensor.long, options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import types

    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers

    ppl = types.SimpleNamespace(sample=numpyro.sample, param=numpyro.param, plate=numpyro.plate)
    ppl.mask = lambda mask: handlers.mask(mask=mask)

    def index(x):
        return x.astype(int)

    return program(ppl, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), index, options, train, seed)
