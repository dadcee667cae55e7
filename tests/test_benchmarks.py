"""The benchmarks run, and what they compare is the same: nothing here is a time.

A command that makes the documentation's numbers must not have rotted, and a hand-written version is no peer unless it gives the
gradient of `TraceGrad_ELBO` on the same draws.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from benchmarks import by_hand_torch, gpu, guards, of_estimators, passes, suite, tables, turns, works
from benchmarks.arithmetic import multiples
from benchmarks.contestants import CONTESTANTS, contestant
from pplgrad import ScoreFunction
from tests.covering import mostly

ROOT = Path(__file__).parents[1]
SMALL = {
    "arithmetic": ["--latents", "4"],
    "watching": ["--latents", "4", "--seconds", "0.1", "--libraries", "numpyro"],
    "memory": ["--latents", "4", "--batch", "10", "--rows", "0", "2", "--libraries", "numpyro"],
    "mixtures": [
        "--gaps",
        "2",
        "--dims",
        "1",
        "--elements",
        "2",
        "--components",
        "3",
        "--draws",
        "20",
        "--seconds",
        "0.1",
    ],
    "weak_scaling": ["--processes", "2", "--steps", "3", "--rows", "10"],
    "variance": ["--latents", "4", "--stops", "0", "--draws", "4", "--seconds", "0.1"],
    "training": ["--latents", "4", "--seconds", "0.1", "--libraries", "pyro", "--estimators", "DisARM"],
}
BELOW = {
    "suite": ("turns", "cell", "contestants", "works", "tables", "picture", "by_hand_jax", "by_hand_torch", "shared")
    + ("of_estimators", "by_hand_estimators_jax", "by_hand_estimators_torch"),
    "in_storchastic": (),
    # In tests/test_assess_statistics.py.
    "assessing": (),
    "gpu": (),
    "growth": (),
    "guards": (),
    "marginal": (),
    "passes": (),
    # In tests/lab/test_compare.py.
    "published": (),
}
"""The other commands that are tested here, and the modules that they are made of."""

WORKS = [
    works.Work("sbn", 5, particles=3, batch=4),
    works.Work("sbn", 5, layers=2, particles=2, batch=4),
    works.Work("chain", 6, particles=3),
    works.Work("scan", 6, particles=3),
    works.Work("plate", 3, particles=2, batch=4),
]
PLAIN = {"*": ScoreFunction()}
each_work = pytest.mark.parametrize("work", WORKS, ids=[work.name for work in WORKS])


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["training"], SMALL))
def test_runs(name, tmp_path):
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], "--out", out]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(pd.read_csv(out)) > 0


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("host", ["pyro", "numpyro"])
def test_summed_sites_beside_the_host(host):
    command = [sys.executable, "-m", "benchmarks.marginal", "--host", host, "--turns", "1", "--draws", "4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("LocalExpectation") >= 3 and "fails" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("library", ["Pyro", "NumPyro"])
def test_a_branch_is_no_more_arithmetic_than_an_evaluation(library):
    found = multiples(library, ("DisARM()", "LocalExpectation()"), works.Work("sbn", 20), seed=0)
    assert (found["/ one evaluation"] <= 1.1).all(), found


@pytest.mark.slow
def test_suite_runs_and_goes_on_where_it_stopped(tmp_path):
    options = ("--work", "chain 10", "--contestant", "Pyro Trace_ELBO", "--contestant", "NumPyro TraceGrad_ELBO")
    options = ("--turns", "3", "--seconds", "0.05", "--out", str(tmp_path), *options)
    command = [sys.executable, "-m", "benchmarks.suite", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    printed, frame = result.stdout, pd.read_parquet(tmp_path / "bench.parquet")
    assert "| Pyro Trace_ELBO |" in printed
    assert set(frame["status"]) == {"measured"}
    steps = frame[frame["quantity"] == "step_ms"]
    assert (steps.groupby("contestant").size() == 3).all()
    assert (frame["value"] >= 0).all()
    numbers = {"import_s", "to_first_step_s", "peak_mib", "step_ms"}
    assert all(numbers <= set(mine["quantity"]) for _, mine in frame.groupby("contestant"))
    assert {"trace_s", "compile_s"} <= set(frame.loc[frame["contestant"] == "NumPyro TraceGrad_ELBO", "quantity"])
    assert {f"bench.{kind}" for kind in ("md", "png", "svg", "parquet")} == {path.name for path in tmp_path.iterdir()}
    # The second time nothing is measured again: the dates are those of the first.
    suite.main(options, standalone_mode=False)
    again = pd.read_parquet(tmp_path / "bench.parquet")
    pd.testing.assert_frame_equal(again, frame)


@pytest.mark.slow
def test_what_fails_or_takes_too_long_is_a_row_with_its_reason(tmp_path):
    work, data = works.Work("chain", 3), works.arrays(works.Work("chain", 3), 0)
    unknown, late = "Pyro NoSuchEstimator()", "Pyro Trace_ELBO"
    (first,) = turns.race([unknown], work, data, 0, turns.Rules(3, 0.05, limit_s=120))
    assert first.status == "failed" and "NoSuchEstimator" in first.reason
    (second,) = turns.race([late], work, data, 0, turns.Rules(3, 0.05, limit_s=0.0))
    assert second.status == "given up" and second.reason == "> 0 s (import)"
    frame = suite.tidy(work, [first, second], 0, "a cell")
    assert len(frame[frame["quantity"].isna()]) == 1
    page = tables.markdown(frame)
    assert "NoSuchEstimator" in page and "> 0 s (import)" in page


def invented(**steps):
    """Return a tidy frame of a chain of 50 with the given steps by contestant, a turn each."""
    work = works.Work("chain", 50)
    found = [turns.Found(name.replace("_ms", ""), turns=dict(enumerate(values))) for name, values in steps.items()]
    return suite.tidy(work, found, 0, "a cell")


def test_a_gpus_table(tmp_path, monkeypatch):
    """All but the GPU: what is counted, the rows, and the table of them."""
    monkeypatch.setattr(gpu, "SECONDS", 0.02)
    work = works.Work("sbn", 5, layers=2, particles=3, batch=4)
    data = works.arrays(work, 0)
    operations, moved = gpu.least(work, data, works.start(work, data, 0))
    # Each product has a second one in its derivative with respect to the weights; draws have none.
    assert operations == 2 * (2 * 4 * 64 * 5 + 2 * (2 * 12 * 5 * 5) + 2 * 12 * 5 * 64)
    assert moved == 4 * (8 * (5 + 2 * 64 * 5 + 2 * 25 + 3 * 5 + 64) + 4 * 64)
    names = ["PyTorch by hand", "Pyro TraceGrad_ELBO", "Storchastic"]
    rows = list(gpu.measure(work, names, "float32", lambda _: (nullcontext, lambda: None), 0))
    assert ["ms" in row for row in rows] == [True, True, False] and "storch" in rows[2]["reason"]
    (tmp_path / "gpu-torch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ceilings = {"bytes": 1e9, "float32": 1e9, "bf16": 1e9}
    about = {"gpu": "none", "torch": "2", "ceilings": ceilings, "needs": {work.name: (operations, 1.0)}}
    (tmp_path / "gpu.json").write_text(json.dumps(about))
    table = gpu.markdown(tmp_path)
    assert f"| the least | {operations / 1e6:.2g} |" in table and "| Storchastic | failed |" in table
    middle = np.median(rows[0]["ms"])
    assert f"| PyTorch by hand | {middle:.3g} ({operations / 1e6 / middle:.2g}) |" in table


def test_ratios_are_paired_by_turn():
    """Turn by turn the first takes twice as long, whatever else the machine did; their medians say less."""
    second = np.array([1.0, 1.0, 1.0, 10.0, 100.0])
    frame = invented(**{"Pyro Trace_ELBO": second, "Pyro TraceGrad_ELBO": 2 * second})
    found = tables.ratio(frame, "chain 50", "Pyro TraceGrad_ELBO", "Pyro Trace_ELBO")
    assert (found.middle, found.low, found.high) == (2.0, 2.0, 2.0)
    # A contestant that took fewer turns is compared in those.
    frame = frame[~((frame["contestant"] == "Pyro TraceGrad_ELBO") & (frame["turn"] < 2))]
    assert tables.ratio(frame, "chain 50", "Pyro TraceGrad_ELBO", "Pyro Trace_ELBO").middle == 2.0


def test_aims_stand_beside_their_figures():
    graph, compiled, numpyro = "Pyro TraceGraph_ELBO", "Pyro TraceGrad_ELBO compiled", "NumPyro TraceGrad_ELBO"
    page = tables.aims_table(invented(**{graph: [60.0] * 3, compiled: [1.0] * 3, numpyro: [0.5] * 3}))
    assert "| Pyro, compiled: TraceGraph_ELBO / | chain 50 | 60 (60 to 60) | ≥ 50 | met |" in page
    assert "| Pyro, compiled: / jitted NumPyro | chain 50 | 2 (2 to 2) | ≤ 1.5 | not met |" in page


def test_every_estimator_is_measured():
    """`make bench` has all of the registry that fit its program, in both libraries, beside their limits."""
    from pplgrad.estimators.registry import every_estimator

    names = {type(estimator).__name__ for estimator in every_estimator()}
    assert set(suite.ELSEWHERE) < names
    for cells in (suite.quick(), suite.full()):
        measured = {of_estimators.role(name) for cell in cells for name in cell.contestants} - {None}
        for name in names - set(suite.ELSEWHERE):
            mine = {what for text, what in measured if text == f"{name}()"}
            assert {"Pyro", "Pyro's limit", "Pyro compiled", "Pyro compiled, joint optimizer", "NumPyro"} <= mine, name
        assert ("default", "Pyro's limit with a network") in measured


def test_the_default_stands_beside_a_step_that_trains_the_same_network():
    default, beside = "Pyro default", "Pyro Trace_ELBO with a network for default"
    frame = invented(**{default: [3.0] * 3, beside: [2.0] * 3})
    rows = tables.summary(frame.assign(layers=1, status="measured", reason="", note=""))
    page = tables.estimator_table(frame, rows)
    assert "trains the same network beside it: 1.5 (1.5 to 1.5) with validation on." in page


@pytest.mark.slow
def test_a_network_beside_the_hosts_step_is_trained():
    work = works.Work("sbn", 3, batch=4)
    pyro.clear_param_store()
    step = (
        contestant("Pyro Trace_ELBO with a network for default, validation off")
        .build(work, works.arrays(work, 0), 0)
        .step
    )
    step()
    before = {name: x.detach().clone() for name, x in pyro.get_param_store().items() if name.startswith("network")}
    step()
    assert len(before) == 4 and any((pyro.get_param_store()[name] != x).any() for name, x in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CONTESTANTS if n != "Storchastic" and "compiled" not in n])
def test_every_contestant_takes_a_step(name):
    """All but those that compile in torch, which takes a minute each."""
    work = works.Work("chain", 2)
    pyro.clear_param_store()
    if "TraceEnum_ELBO" in name and name.startswith("NumPyro"):
        pytest.importorskip("funsor").set_backend(
            "torch"
        )  # As Pyro's part of the same process does where it has a sum.
    contestant(name).build(work, works.arrays(work, 0), 0).step()


@pytest.mark.slow
def test_storchastic_gives_the_same_gradient():
    if not turns.STORCHASTIC.exists():
        pytest.skip("Storchastic's environment is not there; `make storchastic` makes it.")
    command = [turns.STORCHASTIC, "-m", "benchmarks.in_storchastic"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    differences = [float(line.rsplit(" ", 1)[1]) for line in result.stdout.splitlines()]
    assert len(differences) == 5 and max(differences) < 1e-10


def in_pyro(work, data):
    """Return draws, particles first, with the loss and the gradient that Pyro's plug-in finds on them."""
    from pyro import poutine

    from pplgrad.pyro import TraceGrad_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    model, guide, args = works.pyro_program(work, data, 0, double=True)
    losses, draws = [], []
    for _ in range(work.particles):
        trace = poutine.trace(guide).get_trace(*args)
        draws.append({n: trace.nodes[n]["value"].detach() for n in trace.stochastic_nodes if n.startswith("z")})
        losses.append(TraceGrad_ELBO(estimators=PLAIN).loss_and_grads(model, poutine.replay(guide, trace=trace), *args))
    gradient = {name: leaf.grad / work.particles for name, leaf in pyro.get_param_store().named_parameters()}
    return {n: torch.stack([d[n] for d in draws]) for n in draws[0]}, np.mean(losses), gradient


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(found[name]), np.asarray(value), rtol=1e-10, atol=1e-10, err_msg=name)


@each_work
def test_pytorch_by_hand_gives_the_same_gradient(work):
    data = works.arrays(work, 0)
    draws, expected_loss, expected = in_pyro(work, data)
    params = by_hand_torch.tensors(works.start(work, data, 0), torch.float64)
    for leaf in params.values():
        leaf.requires_grad_()
    loss, surrogate = by_hand_torch.estimate(work, params, by_hand_torch.tensors(data, torch.float64), draws)
    surrogate.backward()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert_same({name: leaf.grad for name, leaf in params.items()}, expected)


MANY = 4000


@each_work
def test_pytorch_by_hand_draws_from_the_guide(work):
    """The chance of each value, and not only the gradient at a given one, is the guide's."""
    from pyro.infer import Trace_ELBO

    data = works.arrays(work, 0)
    torch.manual_seed(0)
    many = works.Work(work.kind, work.size, work.layers, MANY, work.batch)
    params = by_hand_torch.tensors(works.start(work, data, 0), torch.float64)
    loss = by_hand_torch.estimate(many, params, by_hand_torch.tensors(data, torch.float64))[0].item()
    assert loss == pytest.approx(mean_loss(work, data, Trace_ELBO), rel=2e-2)


def mean_loss(work, data, kind):
    pyro.clear_param_store()
    model, guide, args = works.pyro_program(work, data, 0, double=True)
    return kind(MANY, vectorize_particles=True, max_plate_nesting=work.plates).loss(model, guide, *args)


@each_work
def test_jax_by_hand_draws_from_the_guide(work):
    jax = pytest.importorskip("jax")
    from pyro.infer import Trace_ELBO

    from benchmarks import by_hand_jax

    data = works.arrays(work, 0)
    many = works.Work(work.kind, work.size, work.layers, MANY, work.batch)
    params, arrays = by_hand_jax.arrays(works.start(work, data, 0)), by_hand_jax.arrays(data)
    loss = jax.jit(lambda key: by_hand_jax.estimate(many, params, arrays, key)[0])(jax.random.key(0))
    torch.manual_seed(0)
    assert float(loss) == pytest.approx(mean_loss(work, data, Trace_ELBO), rel=2e-2)


@pytest.mark.parametrize("keys", ["host", "independent"])
@pytest.mark.parametrize("kind", ["chain", "scan"])
def test_jax_by_hand_with_the_hosts_keys_draws_what_the_host_draws(kind, keys):
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    import numpyro

    from benchmarks import by_hand_jax
    from pplgrad.numpyro import independent_keys

    # Whatever this process has turned on before: a uniform number of double precision is another one.
    with jax.enable_x64(False):
        work = works.Work(kind, 12)
        data = works.arrays(work, 0)
        _, guide, args = works.numpyro_program(work, data, 0)
        guide = independent_keys(guide) if keys == "independent" else guide
        params = by_hand_jax.arrays(works.start(work, data, 0))
        estimate = jax.jit(by_hand_jax.with_keys(work, keys))
        on = jax.jit(lambda z: by_hand_jax.estimate(work, params, by_hand_jax.arrays(data), None, z)[0])
        losses = set()
        for number in range(4):
            drawn = numpyro.handlers.trace(numpyro.handlers.seed(guide, jax.random.key(number))).get_trace(*args)
            values = {name: site["value"] for name, site in drawn.items() if site["type"] == "sample"}
            loss, _ = estimate(params, by_hand_jax.arrays(data), jax.random.key(number))
            assert loss == pytest.approx(
                float(on({name: jnp.asarray(z, float)[None] for name, z in values.items()})), rel=1e-6
            )
            losses.add(float(loss))
    assert len(losses) > 1


@pytest.mark.slow
@each_work
def test_jax_by_hand_gives_the_same_gradient(work):
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp
    import numpyro

    from benchmarks import by_hand_jax
    from pplgrad.numpyro import TraceGrad_ELBO

    with jax.enable_x64(True):
        data = works.arrays(work, 0)
        model, guide, args = works.numpyro_program(work, data, 0, double=True)
        # Off zero, where NumPyro 0.22 differentiates a Bernoulli's logits wrongly.
        params = {name: jnp.asarray(value + 0.12) for name, value in works.start(work, data, 0).items()}
        draws, found = [], []
        elbo = TraceGrad_ELBO(estimators=PLAIN)

        @jax.jit
        def expected(params, values):
            forced = numpyro.handlers.substitute(guide, data=values)
            return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(9), p, model, forced, *args))(params)

        for i in range(work.particles):
            trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, i)).get_trace(*args)
            values = {name: site["value"] for name, site in trace.items() if site["type"] == "sample"}
            draws.append({name: value.astype(float) for name, value in values.items()})
            found.append(expected(params, values))
        losses, gradients = zip(*found, strict=True)
        together = {name: jnp.stack([d[name] for d in draws]) for name in draws[0]}
        arrays = by_hand_jax.arrays(data, jnp.float64)

        def surrogate(params):
            loss, surrogate = by_hand_jax.estimate(work, params, arrays, jax.random.key(0), together)
            return surrogate, loss

        mine, loss = jax.grad(surrogate, has_aux=True)(params)
        assert float(loss) == pytest.approx(float(np.mean(losses)), rel=1e-12)
        assert_same(mine, {name: sum(g[name] for g in gradients) / work.particles for name in params})


@pytest.mark.exhaustive
@pytest.mark.slow
def test_growth(tmp_path):
    command = [sys.executable, "-m", "benchmarks.growth", "--axis", "categories", "--largest", "10", "--turns", "3"]
    command += ["--seconds", "0.05", "--contestant", "NumPyro default", "--out", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    page = (tmp_path / "growth.md").read_text()
    assert "| contestant | 2 | 10 | slope |" in page and page.count("| NumPyro default |") == 2


def test_what_a_guard_costs():
    name, model, guide = next(guards.programs())
    assert name == "chain of 10" and min(guards.row(model, guide, turns=2)) > 0


def test_every_benchmark_is_tested():
    tested = {*SMALL, *BELOW, *(name for parts in BELOW.values() for name in parts)}
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == {*tested, "__init__"}


WITHOUT_PASSES = """
import os, sys, traceback
import pplgrad.{library}
from benchmarks import passes, works
from benchmarks.cell import seed_all
from benchmarks.contestants import contestant

work = works.Work("chain", 8)
data = works.arrays(work, 0)
for name in {names}:
    child = os.fork()
    if child:
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        continue
    try:
        ready = contestant(name).build(work, data, 0)
        seed_all(0)
        [ready.step() for _ in range(4)]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""
"""A pass is turned off for the whole process: each in a fork of one that has imported everything and run nothing."""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("whole", passes.PASSES)
def test_each_pass_can_be_turned_off(whole):
    """What is put in its place must be what the compilers look up, and a step without it must work."""
    names = [f"{whole} without {name}" for name in passes.PASSES[whole]]
    code = WITHOUT_PASSES.format(library=whole.split()[0].lower(), names=names)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines() == [f"{name} 0" for name in names], result.stderr[-2000:]


@pytest.mark.slow
def test_the_table_of_passes():
    rows = [("NumPyro TraceGrad_ELBO", 2.0, 1.0), ("NumPyro TraceGrad_ELBO without scan fission", 3.0, 4.0)]
    frame = pd.DataFrame(
        [
            {"work": "scan 8", "contestant": who, "quantity": quantity, "value": value}
            for who, step, compiling in rows
            for quantity, value in (("step_ms", step), ("compile_s", compiling), ("trace_s", 0.0))
        ]
    )
    assert "| NumPyro TraceGrad_ELBO | scan fission | 1.50 (4.00) |" in passes.table(frame)
    assert "| NumPyro TraceGrad_ELBO | stacked views | - |" in passes.table(frame)
