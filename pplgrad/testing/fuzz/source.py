"""A random program as source that a human can run, in either library, and as functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pplgrad.testing.fuzz.functions import FUNCTIONS, detour, opaque
from pplgrad.testing.fuzz.program import Program, Site, in_chain
from pplgrad.testing.fuzz.states import STATES, TORCH_STATES, State
from pplgrad.testing.fuzz.terms import Detour, Draw, Opaque, Term, matrix

_HEADS = {
    "pyro": """import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.utils.checkpoint
from pyro import factor, plate, sample
from pyro import poutine as handlers

torch.set_default_dtype(torch.float64)
POOL = ThreadPoolExecutor(1)


def param(name):
    return pyro.param(name, torch.tensor(START[name]))
""",
    "numpyro": """import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import factor, handlers, plate, sample
from numpyro.contrib.control_flow import scan

jax.config.update("jax_enable_x64", True)


def param(name):
    return numpyro.param(name, jnp.array(START[name]))
""",
}


def state_of(program: Program, library: str = "pyro") -> State | None:
    """Return the kind of Python state that a program reads.

    In JAX a dictionary stands for what is torch's, and for what changes whenever it is read: a program is traced at will.
    """
    if program.state is None:
        return None
    state = (STATES | TORCH_STATES)[program.state]
    plain = library == "numpyro" and (state.each_step or program.state in TORCH_STATES)
    return STATES["dictionary"] if plain else state


def source(program: Program, library: str) -> str:
    """Return the program as source: `model`, `guide`, the parameters `START`, and `set_state(v)` where it reads Python state."""
    state = state_of(program, library)
    argument = "state" if state is not None and state.argument else ""
    body = "\n\n".join(
        _function(name, argument, sites, program, library)
        for name, sites in (("model", program.model), ("guide", program.guide))
    )
    if program.state is not None and state is not None:
        body = body.replace((STATES | TORCH_STATES)[program.state].read, state.read)
    setting = "" if state is None else f"{state.setup}\n\ndef set_state(v):\n    {state.write}\n\n\n"
    start = f"START = { ({name: x.tolist() for name, x in program.params.items()})!r}\n"
    return (
        _HEADS[library]
        + "\n\n"
        + start
        + _matrices(body)
        + "\n\n"
        + _definitions(program, library, body)
        + setting
        + body
    )


def _matrices(body: str) -> str:
    return f"MATRIX = { ({n: matrix(n).tolist() for n in (1, 2, 3)})!r}\n" if "mix(" in body else ""


def _definitions(program: Program, library: str, body: str) -> str:
    """Return the definitions of the functions that a program calls."""
    found: dict[str, str] = {}
    for term in program.terms():
        if isinstance(term, Detour):
            found[term.way] = detour(library, term.way)
        elif isinstance(term, Opaque):
            found[term.name] = opaque(library, term.way, term.name, term.numbers).strip()
    table = FUNCTIONS[library]
    called = {name for name in table if re.search(rf"\b{name}\(", body)}
    called |= {"array"} if "mix" in called else set()
    plain = {name: text for name, text in table.items() if name in called}
    return "".join(text + "\n\n\n" for text in (plain | found).values())


def _function(name: str, argument: str, sites: tuple[Site, ...], program: Program, library: str) -> str:
    lines = [f"def {name}({argument}):"]
    used = [name for name in program.params if any(_mentions(site, name) for site in sites)]
    lines += [f"    {param} = param({param!r})" for param in used]
    plates = [plate for plate in program.plates if any(plate in site.plates for site in sites)]
    for p in plates:
        size = f"{p.size}, subsample_size={p.drawn}" if p.subsampled else f"{p.size}"
        lines.append(f"    {p.name} = plate({p.name!r}, {size}, dim={p.dim})")
    open_: tuple | None = None
    for site in sites:
        if in_chain(site.name):
            if site.name == "c_0":
                lines += _loop([other for other in sites if in_chain(other.name)], program.chain, library)
            open_ = None
            continue
        if site.plates and site.plates != open_:
            held = [f"{p.name} as {p.name}_index" if p.subsampled else p.name for p in site.plates]
            lines.append(f"    with {', '.join(held)}:")
        open_ = site.plates
        indent = "        " if site.plates else "    "
        around = _around(site)
        if around:
            lines.append(f"{indent}with {', '.join(around)}:")
            indent += "    "
        lines.append(indent + _statement(site))
    return "\n".join(lines) + ("\n    pass\n" if len(lines) == 1 else "\n")


def _loop(sites: list[Site], steps: int, library: str) -> list[str]:
    """Return the program's loop: its second step, which reads the first, says what every step does."""
    drawn = next(site for site in sites if site.name == "c_1")
    law = _law(drawn).replace(Draw("c_0", False).code(), "(1.0 * c)")
    seen = next((site for site in sites if site.name == "cx_1"), None)
    name = {"pyro": 'f"{}_{{t}}"', "numpyro": '"{}"'}[library]
    body = [f"c = sample({name.format('c')}, {law})"]
    if seen is not None:
        data = [float(site.data) for site in sites if site.name.startswith("cx_") and site.data is not None]
        law = _law(seen).replace(Draw("c_1", False).code(), "(1.0 * c)")
        body.append(f"sample({name.format('cx')}, {law}, obs=array({data!r})[t])")
    names = ", ".join(f"c_{t}" for t in range(steps))
    if library == "pyro":
        loop = ["c, cs = torch.zeros(()), []", f"for t in pyro.markov(range({steps})):", *("    " + x for x in body)]
        return ["    " + x for x in (*loop, "    cs.append(c)", f"{names} = cs")]
    loop = ["def step(c, t):", *("    " + x for x in body), "    return 1.0 * c, 1.0 * c"]
    return ["    " + x for x in (*loop, f"_, cs = scan(step, jnp.zeros(()), jnp.arange({steps}))", f"{names} = cs")]


def _mentions(site: Site, name: str) -> bool:
    text = " ".join(term.code() for term in site.terms())
    return re.search(rf"\b{name}\b", text) is not None


def _around(site: Site) -> list[str]:
    """Return the handlers around a site."""
    found = []
    if isinstance(site.mask, Term):
        found.append(f"handlers.mask(mask={site.mask.code()} > 0.5)")
    elif site.mask is not None:
        found.append(f"handlers.mask(mask={_per_element(site, list(site.mask), site.plates[-1:])})")
    if site.scale is not None:
        found.append(f"handlers.scale(scale={site.scale})")
    return found


def _per_element(site: Site, values: Any, plates: tuple) -> str:
    """Return an array of numbers that belong to the elements of plates, of those that are drawn."""
    text = f"array({values!r})"
    for p in plates:
        if len(plates) == 1 and p.dim < -1:
            text += f".reshape({len(values)}{', 1' * (-p.dim - 1)})"
        if p.subsampled:
            text = f"take({text}, {p.name}_index, {p.dim})"
    return text


def _law(site: Site) -> str:
    """Return a site's distribution."""
    args = [term.code() for term in site.args]
    return {
        "bernoulli": lambda: f"dist.Bernoulli(logits={args[0]})",
        "binomial": lambda: f"dist.Binomial(2, logits={args[0]})",
        "categorical": lambda: f"dist.Categorical(logits=stack({', '.join(args)}))",
        "normal": lambda: f"dist.Normal({args[0]}, {args[1]})",
        "uniform": lambda: f"dist.Uniform({args[0]}, {args[1]})",
    }[site.family]()


def _statement(site: Site) -> str:
    if site.family == "factor":
        return f"factor({site.name!r}, {site.args[0].code()})"
    if site.data is None:
        return f"{site.name} = sample({site.name!r}, {_law(site)})"
    return f"sample({site.name!r}, {_law(site)}, obs={_observed(site)})"


def _observed(site: Site) -> str:
    assert site.data is not None
    text = f"array({site.data.tolist()!r})"
    for p in site.plates:
        if p.subsampled:
            text = f"take({text}, {p.name}_index, {p.dim})"
    return text


@dataclass
class Built:
    """A program's functions in one library."""

    text: str
    model: Callable
    guide: Callable
    set_state: Callable[[int], Any]
    args: tuple


def build(program: Program, library: str) -> Built:
    """Return a program's functions."""
    text = source(program, library)
    # The harness says which precision is used, and puts the switch back.
    code = text.replace('jax.config.update("jax_enable_x64", True)\n', "\n")
    namespace: dict[str, Any] = {"__name__": f"fuzz_{program.seed}"}
    exec(compile(code, f"<program {program.seed}>", "exec"), namespace)
    state = state_of(program, library)
    args = (namespace["STATE"],) if state is not None and state.argument else ()
    return Built(text, namespace["model"], namespace["guide"], namespace.get("set_state", lambda v: None), args)
