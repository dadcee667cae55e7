"""Optuna chooses a relaxation's settings: the estimator, its temperature and the learning rate, on a belief network of 64 latents.

A trial trains with one choice. At four points it reports its loss on held-out digits, per image and at hard draws, whatever the estimator
relaxes; a trial that is behind the median of the earlier ones is pruned there. Beside the loss, the table shows what the choice costs: the
gradient's variance × the time of a step, with which an estimator would have to take less time, or more draws, to be as good as another.

    loss(t, rate) after a fixed number of steps → min,    variance × time = tr Cov[g] · seconds

REBAR is unbiased at each temperature, so that its temperature moves the variance alone. Gumbel-softmax is biased: a high temperature has
little variance and the wrong objective, a low one the right objective and much variance.
"""

import click
import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, gradient_variances, model_script, save, story, train

from pplgrad import REBAR, GumbelSoftmax, ScoreFunction

sbn = model_script("sbn")
OPTIONS = {**sbn.OPTIONS, "latents": 64}
KINDS = {"REBAR": REBAR, "GumbelSoftmax": GumbelSoftmax}
POINTS, DRAWS = 4, 20


def held_out(backend, program, params, images):
    """Return the loss per image at hard draws, from the same random numbers each time."""
    model, guide = program
    hard = {"z*": ScoreFunction()}
    if backend == "pyro":
        import torch

        from pplgrad.pyro import TraceGrad_ELBO

        # The parameters are in the store; training's own random numbers stay where they are.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            return TraceGrad_ELBO(estimators=hard).loss(model, guide, torch.from_numpy(images)) / len(images)
    import jax

    from pplgrad.numpyro import TraceGrad_ELBO

    return float(TraceGrad_ELBO(estimators=hard).loss(jax.random.key(1), params, model, guide, images)) / len(images)


def objective_of(backend, steps, seed):
    """Return what a trial of Optuna's minimises."""
    import optuna

    images, test = (x.astype(np.float32) for x in sbn.load(OPTIONS, seed))
    validation, images = images[:300], images[300:]

    def objective(trial):
        kind = trial.suggest_categorical("estimator", list(KINDS))
        temperature = trial.suggest_float("temperature", 0.05, 2.0, log=True)
        rate = trial.suggest_float("learning_rate", 3e-4, 3e-2, log=True)
        estimators = {"z*": KINDS[kind](temperature=temperature)}
        program = getattr(sbn, f"{backend}_program")(OPTIONS, images, seed)
        found = {}

        def at(step, seconds, params):
            if step == 1:
                return  # This one found the structure, or compiled.
            loss = held_out(backend, program, params, validation)
            found.update(loss=loss, seconds=seconds / (step - 1), params=params)
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        every = max(2, steps // POINTS)
        train(
            backend, program, images, max(steps, 2), seed,
            estimators=estimators, learning_rate=rate, batch_size=100, every=every, at=at,
        )  # fmt: skip
        variances = gradient_variances(
            backend, program, images[:100], found["params"], estimators=estimators, draws=DRAWS, seed=seed
        )
        trial.set_user_attr("variance x time", sum(variances.values()) * found["seconds"])
        return found["loss"]

    return objective


@story(steps=600)
@click.option("--trials", default=24, show_default=True, type=click.IntRange(2), help="Trials of Optuna's.")
def main(backend, steps, seed, out, trials):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=min(5, trials // 2)),
    )
    study.optimize(objective_of(backend, steps, seed), n_trials=trials, show_progress_bar=True)

    print("estimator      temperature  learning rate   loss/image  variance x time")
    whole = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    for trial in sorted(whole, key=lambda trial: trial.value)[:8]:
        chosen = trial.params
        print(
            f"{chosen['estimator']:14s} {chosen['temperature']:11.3f} {chosen['learning_rate']:14.2g} {trial.value:12.3f} "
            f"{trial.user_attrs['variance x time']:16.3g}"
        )
    print(f"{len(study.trials) - len(whole)} of {len(study.trials)} trials were pruned")

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for number, kind in enumerate(KINDS):
        mine = [trial for trial in study.trials if trial.params["estimator"] == kind]
        done = [trial for trial in mine if trial in whole]
        for trial in mine:
            points = sorted(trial.intermediate_values.items())
            axes[0].plot(*zip(*points, strict=True), ".-", color=COLOURS[number], alpha=1 if trial in done else 0.3)
        where = [trial.params["temperature"] for trial in done], [trial.user_attrs["variance x time"] for trial in done]
        axes[1].scatter(*where, color=COLOURS[number], label=kind)
    axes[0].set(xlabel="step", ylabel="held-out loss per image, nats", title="trials (pale: pruned)")
    axes[1].set(
        xlabel="temperature", ylabel="variance × time, nats² s", xscale="log", yscale="log", title="cost of a gradient"
    )
    axes[1].legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
