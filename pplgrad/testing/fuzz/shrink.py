"""A smaller program with the same fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np

from pplgrad.testing.fuzz.program import Program, Site, in_chain
from pplgrad.testing.fuzz.terms import Const, Sum, Term, Times


def smaller(term: Term) -> Iterator[Term]:
    """Yield simpler terms in the place of one."""
    if isinstance(term, (Sum,)) and len(term.terms) > 1:
        for i in range(len(term.terms)):
            yield Sum(term.terms[:i] + term.terms[i + 1 :])
    if isinstance(term, Times):
        yield from (term.a, term.b)
    if isinstance(term, Sum) and len(term.terms) == 1:
        yield term.terms[0]
    for f in fields(term):  # type: ignore[arg-type]
        held = getattr(term, f.name)
        if isinstance(held, Term):
            for other in smaller(held):
                yield replace(term, **{f.name: other})  # type: ignore[type-var]
        elif isinstance(held, tuple) and any(isinstance(x, Term) for x in held):
            for i, x in enumerate(held):
                for other in smaller(x):
                    yield replace(term, **{f.name: held[:i] + (other,) + held[i + 1 :]})  # type: ignore[type-var]


def _sites(site: Site) -> Iterator[Site]:
    if site.mask is not None:
        yield replace(site, mask=None)
    if site.scale is not None:
        yield replace(site, scale=None)
    for i, term in enumerate(site.args):
        for other in smaller(term):
            if other != Const(0.0):
                yield replace(site, args=site.args[:i] + (other,) + site.args[i + 1 :])


def programs(program: Program) -> Iterator[Program]:
    """Yield programs that are a step smaller."""
    read = {name for site in (*program.guide, *program.model) for name in site.reads()}
    for site in (*program.model, *program.guide):
        if site.name not in read and not in_chain(site.name):
            yield program.without(site.name)
    for which in ("guide", "model"):
        sites: tuple[Site, ...] = getattr(program, which)
        for i, site in enumerate(sites):
            if in_chain(site.name):
                continue  # All steps of a loop do the same.
            for other in _sites(site):
                found = replace(program, **{which: sites[:i] + (other,) + sites[i + 1 :]})  # type: ignore[arg-type]
                yield found if found.reads_state else replace(found, state=None)


def shrunk(program: Program, wrong: Callable[[Program], bool], tries: int = 300) -> Program:
    """Return a smaller program for which `wrong` still holds, after at most so many tries."""
    left = tries
    again = True
    while again and left > 0:
        again = False
        for other in programs(program):
            left -= 1
            if left <= 0:
                break
            if other.guide and wrong(other):
                program, again = other, True
                break
    return _without_unused(program)


def _without_unused(program: Program) -> Program:
    """Return the program without the parameters and plates that nothing reads."""
    text = " ".join(term.code() for term in program.terms())
    params: dict[str, np.ndarray] = {name: x for name, x in program.params.items() if name in text}
    plates = tuple(p for p in program.plates if any(p in site.plates for site in (*program.guide, *program.model)))
    return replace(program, params=params, plates=plates)
