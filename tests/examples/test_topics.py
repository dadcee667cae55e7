"""Topics of words: exact in a subsampled plate, and learned topics follow the modules that no model sees."""

import numpy as np
import pytest

from pplgrad import LeaveOneOut, LocalExpectation, ScoreFunction
from pplgrad.testing.programs import Case
from tests.examples.loading import example, program


def test_the_corpus_is_counted_right():
    script = example("_story").model_script("topics")
    words, modules, vocabulary = script.corpus({**script.OPTIONS, "vocabulary": 80})
    assert len(words) == len(modules) > 200 and len(vocabulary) == 80
    count = script.counts(words, 80)
    assert (count.sum(1) == (words != script.NO_WORD).sum(1)).all() and (count.sum(1) >= 10).all()


def small():
    """Return three texts of at most two words, of which a step sees two, parameters, and fixed draws of topics and shares."""
    words, sizes = np.array([[0.0, 1.0], [1.0, -1.0], [1.0, 1.0]]), {"topics": 2, "vocabulary": 2, "batch": 2}
    rng = np.random.default_rng(2)
    shapes = {"topic_shape": (2, 2), "see": (2, 2), "share_bias": (2,), "trust": (1,), "word": (2, 2)}
    held = {"topics": np.array([[0.7, 0.3], [0.2, 0.8]]), "share": np.array([[[0.6, 0.4]], [[0.25, 0.75]]])}
    return words, sizes, {name: rng.normal(size=shape) for name, shape in shapes.items()}, held


def case_of(program_of, params, x):
    """Return the enumerable case of model and guide: topics of words in a subsampled plate, masked where there is no word."""
    model, guide = program_of
    latents = {"z": ((2, 2), 2)}
    return Case(
        "topics", params, latents, lambda h: (lambda: model(x), lambda: guide(x)), subsamples={"documents": (3, 2)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=["score", "local"])
def test_gradient_of_the_discrete_part_is_exact_in_pyro(estimator):
    """With topics and shares held where they were drawn; over all minibatches and topics of words."""
    import torch
    from pyro.poutine.messenger import Messenger

    from pplgrad.pyro import TraceGrad_ELBO
    from pplgrad.testing import in_pyro as testing

    words, sizes, params, held = small()

    class Held(Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] in held:
                msg["value"], msg["done"] = testing.array(held[msg["name"]]), True

    with testing.isolated():
        _, _, (model, guide) = program("topics", "pyro", words, **sizes)
        case = case_of((model, Held()(guide)), params, torch.as_tensor(words))
        over = testing.expected_gradient_over_cells if estimator.uses_branches else testing.expected_gradient
        found = over(case, lambda: TraceGrad_ELBO(estimators={"z": estimator}), 1)
        wanted = testing.exact_gradient(case)
    testing.assert_same(found, wanted)
    assert np.abs(wanted["word"]).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("estimator", [ScoreFunction(), LocalExpectation()], ids=["score", "local"])
def test_gradient_of_the_discrete_part_is_exact_in_numpyro(estimator):
    from numpyro import handlers

    from pplgrad.numpyro import TraceGrad_ELBO
    from pplgrad.testing import in_numpyro as testing

    words, sizes, params, held = small()
    with testing.isolated():
        _, _, (model, guide) = program("topics", "numpyro", words, **sizes)
        fixed = handlers.substitute(guide, data={name: testing.array(value) for name, value in held.items()})
        case = case_of((model, fixed), params, testing.array(words))
        over = testing.expected_gradient_over_cells if estimator.uses_branches else testing.expected_gradient
        found = over(case, TraceGrad_ELBO(estimators={"z": estimator}), 1)
        wanted = testing.exact_gradient(case)
    testing.assert_same(found, wanted)
    assert np.abs(wanted["word"]).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_topics_follow_the_modules(backend):
    from sklearn.metrics import normalized_mutual_info_score

    story = example("_story")
    script = story.model_script("topics")
    small = {"vocabulary": 80, "length": 20, "batch": 24, "topics": 3}
    words, modules, _ = script.corpus({**script.OPTIONS, **small})
    # Three modules with little in common.
    rows = np.isin(modules, [script.MODULES.index(name) for name in ("fft", "linalg", "stats")])
    words, modules = words[rows], modules[rows]
    script, options, made = program("topics", backend, words, **small)
    before = normalized_mutual_info_score(
        modules, script.topic_shares(script.initial(options, words, 0), words).argmax(-1)
    )
    params, losses = story.train(
        backend, made, words, 200, 0, estimators={"z": ScoreFunction(LeaveOneOut())}, learning_rate=0.1, particles=2
    )
    total = (words != script.NO_WORD).sum()
    after = normalized_mutual_info_score(modules, script.topic_shares(params, words).argmax(-1))
    frequency = script.counts(words, 80).sum(0)
    alone = (frequency / total) @ np.log(np.maximum(frequency, 1) / total)
    # Better than one topic for all, at its best and without a price for parameters.
    assert -losses[-50:].mean() / total > alone - 0.05 > -losses[:5].mean() / total
    assert after > before + 0.1
