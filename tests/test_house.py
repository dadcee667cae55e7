"""The direction of imports: which part may import which, and that nothing imports in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"core", "errors"}
SHARED = GROUND | {"engine", "estimators", "baselines", "configuration", "monitoring", "diagnostics", "assessment"}

# What each part may import beside itself. A plug-in's own modules that no room stands above are its ground.
ARROWS = {
    "errors": set(),
    "core": {"errors"},
    "estimators": GROUND | {"_moved"},
    "baselines": GROUND | {"_moved"},
    "engine": GROUND,
    "monitoring": GROUND | {"engine"},
    "configuration": GROUND | {"estimators", "baselines", "monitoring"},
    "diagnostics": SHARED - {"diagnostics", "assessment"},
    "assessment": GROUND | {"engine", "diagnostics"},
    "_moved": set(),
    "_extras": set(),
    "objectives": {"_moved"},
    "watch": {"_moved"},
    "pplgrad": GROUND | {"estimators", "baselines", "monitoring", "assessment"},
    "lab": SHARED | {"_extras", "pplgrad", "pyro", "numpyro"},
    # It puts the estimators' noise and the draws in the place of the plug-ins' own.
    "testing": SHARED
    | {"pplgrad", "pyro", "numpyro", "pyro.ground", "numpyro.ground", "pyro._rerun", "numpyro._tracing"},
}
for host, rooms in {
    "pyro": {
        "_tracing": {"ground"},
        "_reuse": {"ground", "_tracing"},
        "_rerun": {"ground", "_tracing", "_baselines"},
        "_compile": {"ground", "_tracing", "_reuse", "_baselines", "_evaluation"},
        "_diagnostics": {"ground", "_tracing", "_rerun", "_baselines", "_elbo", "_guide", "_optim", "_posterior"},
    },
    "numpyro": {
        "_tracing": {"ground"},
        "_fusion": {"ground"},
        "_rerun": {"ground", "_tracing", "_baselines"},
        "_diagnostics": {
            "ground",
            "_tracing",
            "_rerun",
            "_baselines",
            "_elbo",
            "_evaluation",
            "_guide",
            "_optim",
            "_posterior",
        },
    },
}.items():
    ARROWS[f"{host}.ground"] = SHARED
    for room, below in rooms.items():
        ARROWS[f"{host}.{room}"] = SHARED | {f"{host}.{name}" for name in below}
    # The glue: the ELBO, the guide's wrapper, optimizers, and what they are made of.
    ARROWS[host] = SHARED | {"_extras"} | {f"{host}.{room}" for room in rooms} | {f"{host}.ground"}

PLUGIN_GROUND = {
    "_array_ops",
    "_compat",
    "_compat_jax",
    "_distributions",
    "_logits",
    "_mixtures",
    "_recording",
    "_structures",
}


def modules():
    """Return every module of the package with its source."""
    found = {}
    for path in sorted((ROOT / "pplgrad").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(modules):
    """Return which module imports which, wherever in the file it does."""
    graph = {}
    for name, source in modules.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pplgrad":
                found |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules else node.module
                    for a in node.names
                }
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names if a.name in modules}
        graph[name] = found - {name}
    return graph


def part(module):
    """Return the part of the house that a module belongs to."""
    names = module.split(".")[1:]
    if not names:
        return "pplgrad"
    if names[0] not in ("pyro", "numpyro") or len(names) == 1:
        return names[0]
    host, name = names[:2]
    if name in PLUGIN_GROUND:
        return f"{host}.ground"
    return f"{host}.{name}" if f"{host}.{name}" in ARROWS else host


def named(module):
    """Return a module of the glue by its own name, by which a room may be allowed to import it."""
    return ".".join(module.split(".")[1:3])


def wrong_arrows(graph):
    """Return the imports that the list does not allow."""
    return sorted(
        (a, b)
        for a, targets in graph.items()
        for b in targets
        if part(a) != part(b) and part(b) not in ARROWS[part(a)] and named(b) not in ARROWS[part(a)]
    )


def circle(graph):
    """Return modules that import each other in a circle, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        path.append(module)
        for target in sorted(graph[module]):
            if (found := visit(target)) is not None:
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module)) is not None), None)


def test_imports_go_one_way():
    assert wrong_arrows(imports(modules())) == []


def test_no_imports_in_a_circle():
    assert circle(imports(modules())) is None


@pytest.mark.slow
def test_the_test_sees_an_arrow_that_goes_up_and_a_circle():
    source = modules()
    source["pplgrad.core.sites"] += "\nfrom pplgrad.engine import layout\n"
    graph = imports(source)
    assert wrong_arrows(graph) == [("pplgrad.core.sites", "pplgrad.engine.layout")]
    assert {"pplgrad.core.sites", "pplgrad.engine.layout"} <= set(circle(graph))


ROOMS = [
    path.parent
    for path in sorted((ROOT / "pplgrad").rglob("__init__.py"))
    if path.parent.name not in ("pplgrad", "fuzz")
]


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_every_room_says_what_it_is(room):
    text = (room / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    assert "May import:" in text and "Entry:" in text
    assert "Papers:" in text or room.name in ("pyro", "numpyro", "testing")


WITHOUT = """
import sys

class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({room!r}):
            raise ImportError(name + " is closed")

sys.meta_path.insert(0, Closed())
"""

PYRO = """
import pyro, torch, pyro.distributions as dist
from pplgrad import DisARM
from pplgrad.pyro import TraceGrad_ELBO, check_gradients
from pyro.infer import SVI
from pyro.optim import Adam

def model():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

def guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))

svi = SVI(model, guide, Adam({"lr": 0.1}), TraceGrad_ELBO(2, estimators={"z": DisARM()}))
assert all(svi.step() > 0 for _ in range(5))
assert check_gradients(model, guide, draws=200, tolerance=0.9).status == "unbiased"
assert not [name for name in sys.modules if name.startswith("pplgrad.pyro._compile")]
"""

NUMPYRO = """
import jax, numpyro, numpyro.distributions as dist
from pplgrad import DisARM
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients
from numpyro.infer import SVI
from numpyro.optim import Adam

def model():
    for i in range(6):
        z = numpyro.sample(f"z{i}", dist.Bernoulli(0.3))
        numpyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=1.0)

def guide():
    for i in range(6):
        numpyro.sample(f"z{i}", dist.Bernoulli(logits=numpyro.param(f"a{i}", 0.5)))

svi = SVI(model, guide, Adam(0.1), TraceGrad_ELBO(2, estimators={"z*": DisARM()}, fuse=False))
assert svi.run(jax.random.key(0), 5, progress_bar=False).losses.shape == (5,)
assert not [name for name in sys.modules if name.startswith("pplgrad.numpyro._fusion")]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "program"),
    [("pplgrad.pyro._compile", PYRO), ("pplgrad.numpyro._fusion", NUMPYRO)],
    ids=["compile", "fusion"],
)
def test_a_plugin_works_without_its_compiler(room, program):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(room=room) + program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
