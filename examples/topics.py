"""Topics of SciPy's documentation: a discrete topic for every word, in subsampled plates, beside scikit-learn's LDA.

topic_k ~ Dirichlet, share_d ~ Dirichlet, z_dn ~ Categorical(share_d), w_dn ~ Categorical(topic_{z_dn}). A step sees 32 of the docstrings,
with everything in the plate scaled up; the words' topics are estimated by the score function, whose log q is not scaled. How well the
topics follow the modules (which no model sees) is given as normalised mutual information.

    python examples/topics.py --out results/topics.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"z": ScoreFunction(LeaveOneOut()), "topics": Reparam(), "share": Reparam()}


@story(steps=250, backends=("pyro", "numpyro"))
def main(backend, steps, seed, out):
    from sklearn.decomposition import LatentDirichletAllocation
    from sklearn.metrics import normalized_mutual_info_score

    script = model_script("topics")
    options = script.OPTIONS
    words, modules, vocabulary = script.corpus(options)
    print(f"{len(words)} docstrings, {(words != script.NO_WORD).sum()} words of {len(vocabulary)}")
    program = getattr(script, f"{backend}_program")(options, words, seed)
    params, losses = train(backend, program, words, steps, seed, estimators=CHOICE, learning_rate=0.1, particles=2)
    counts = script.counts(words, len(vocabulary))
    peer = LatentDirichletAllocation(
        options["topics"],
        doc_topic_prior=options["alpha"],
        topic_word_prior=options["eta"],
        max_iter=30,
        random_state=seed,
    )
    shares = {"learned": script.topic_shares(params, words), "scikit-learn": peer.fit_transform(counts)}
    total = (words != script.NO_WORD).sum()
    tenth = max(1, len(losses) // 10)
    print(f"bound: {-losses[:tenth].mean() / total:.3f} → {-losses[-tenth:].mean() / total:.3f} nats / word")
    for name, share in shares.items():
        score = normalized_mutual_info_score(modules, share.argmax(-1))
        print(f"mutual information with the modules, {name}: {score:.2f}")

    topics = np.exp(params["topic_shape"])
    topics /= topics.sum(-1, keepdims=True)
    # A topic's words are those that it has more often than all texts together.
    lift = topics * np.log(topics / (counts.sum(0) + 1) * (counts.sum() + len(vocabulary)))
    figure, axes = plt.subplots(2, len(topics), figsize=(11, 5), sharey="row")
    for k, topic in enumerate(topics):
        best = np.argsort(-lift[k])[:9][::-1]
        axes[0, k].barh(range(len(best)), topic[best], color=COLOURS[k % len(COLOURS)], alpha=0.5)
        for place, word in enumerate(best):
            axes[0, k].text(0.001, place, vocabulary[word], va="center", fontsize=8)
        axes[0, k].set(title=f"topic {k + 1}", yticks=[], xlabel="probability")
        mean = [shares["learned"][modules == m, k].mean() for m in range(len(script.MODULES))]
        axes[1, k].bar(range(len(mean)), mean, color=COLOURS[k % len(COLOURS)])
        axes[1, k].set_xticks(range(len(mean)), script.MODULES, rotation=60)
    axes[1, 0].set_ylabel("mean share of the topic\nin a module's docstrings")
    save(figure, out)


if __name__ == "__main__":
    main()
