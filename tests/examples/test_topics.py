"""Topics of words: exact in a subsampled plate, and learned topics follow the modules that no model sees."""

import numpy as np
import pytest

from pplgrad import LeaveOneOut, ScoreFunction
from tests.examples.loading import example, program


def test_the_corpus_is_counted_right():
    script = example("_story").model_script("topics")
    words, modules, vocabulary = script.corpus({**script.OPTIONS, "vocabulary": 80})
    assert len(words) == len(modules) > 200 and len(vocabulary) == 80
    count = script.counts(words, 80)
    assert (count.sum(1) == (words != script.NO_WORD).sum(1)).all() and (count.sum(1) >= 10).all()


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
