"""The engine's view of a traced particle: its sites and costs, and the draws that each density reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pplgrad.core.plates import AFTER, BEFORE, EVERY, OWN, SAME, WHOLE, Plate, Read
from pplgrad.core.sites import CostSpec, SiteSpec
from pplgrad.engine.checks import moving_support, refuse_lost, refuse_lost_in_model
from pplgrad.engine.marginal_sites import mixed_values, read_after_scan
from pplgrad.errors import ProgramError
from pplgrad.numpyro._compat import PREVIOUS, root
from pplgrad.numpyro._tracing.axis_rules import Axis
from pplgrad.numpyro._tracing.differentiability import lost_paths, may_lose
from pplgrad.numpyro._tracing.factors import Dims
from pplgrad.numpyro._tracing.particle_trace import TIME_DIM, ParticleOutputs, ParticleTrace
from pplgrad.numpyro._tracing.provenance import Reads, SitePlates, outputs_read, union
from pplgrad.numpyro._tracing.supports import carries_gradient, gradient_reaches, is_differentiated


def densities_read(
    static: ParticleTrace, numbers: ParticleOutputs, read: Sequence[Reads], shapes: Sequence[tuple[int, ...]]
) -> dict[str, dict[str, Read]]:
    """Return what the density of each site reads, by 'model:name' and 'guide:name', from what each output reads.

    `numbers` holds the number of each output, `shapes` are those of the outputs. The densities themselves tell all, also of a
    distribution that holds arrays it does not declare. The arrays that it declares tell of a draw whose density is masked; and of
    the steps of a scan, which lie in front there, where an operation of the density does not keep them apart.
    """
    site_plates, plates, n = static.site_plates(), static.plates, numbers
    found: dict[str, dict[str, Read]] = {}

    def density(outputs: Any, kind: str, name: str) -> dict[str, Read]:
        mine: Any = plates[kind, name]  # type: ignore[index]
        parts: list[dict[str, Read]] = [_aligned(read[i], mine, len(shapes[i]), site_plates) for i in outputs]
        return _all_read(parts)

    def declared(group: str, name: str) -> dict[str, int]:
        reads = union(*(read[i] for i in n.probes[f"{group}:{name}"]))  # type: ignore[call-overload]
        front = {site: way.axes[0] is not None and way.axes[0].at == 0 for site, way in reads.items()}
        return {site: way.steps if front[site] else EVERY for site, way in reads.items()}

    for name in static.model:
        reads, flags = density([n.model_costs[name]], "model", name), declared("model", name)
        own = reads.pop(name, OWN)
        found["own:model:" + name] = {name: own}
        if name in flags:
            reads[name] = own._replace(steps=EVERY)
        found["model:" + name] = _known_of(reads, flags)
    for name in static.guide:
        reads = density([n.scores[name]], "score", name) if name in n.scores else {}
        costs = density([n.guide_costs[name]], "guide", name)
        if name in static.closed:
            found["closed:" + name] = costs
        else:
            found["own:guide:" + name] = {name: costs.get(name, OWN)}
            reads = _all_read([reads, costs])
        # The density of a draw reads the draw, which the draw itself does not, but at earlier steps.
        flags, own = declared("guide", name), reads.pop(name, OWN)
        if name in flags:
            reads[name] = own._replace(steps=EVERY)
        found["guide:" + name] = _known_of(reads, flags)
    return found


def _aligned(
    reads: Reads, plates: Sequence[Plate], ndim: int, site_plates: Mapping[str, SitePlates]
) -> dict[str, Read]:
    """Return what a density reads, along which of its plates an element may read others, and at which steps."""
    result = {}
    steps_at = ndim + TIME_DIM if any(plate.time for plate in plates) else None
    for site, (flags, _, (steps, *axes)) in reads.items():
        own = site_plates[site].plates if site in site_plates else ()
        across = {
            plate.name
            for plate, axis in zip(own, axes, strict=True)
            if plate.size > 1 and plate in plates and axis != Axis(ndim + plate.dim, 1, plate.size)
        }
        followed = steps is not None and steps.at == steps_at and steps.inner == 1
        result[site] = Read(flags if followed else EVERY, frozenset(across))
    return result


def _all_read(parts: Sequence[Mapping[str, Read]]) -> dict[str, Read]:
    result: dict[str, Read] = {}
    for reads in parts:
        for site, way in reads.items():
            result[site] = result[site].joined(way) if site in result else way
    return result


def _known_of(reads: dict[str, Read], declared: Mapping[str, int]) -> dict[str, Read]:
    """Return what a density reads, at the steps at which both it and the arrays of its distribution say so."""
    result = dict(reads)
    for site, flags in declared.items():
        steps = result[site].steps & flags if site in result else flags
        result[site] = Read(steps or EVERY, result[site].across if site in result else None)
    return result


def numbered(closed: Any, shapes: ParticleOutputs, static: ParticleTrace) -> tuple[ParticleOutputs, list[Reads]]:
    """Return the number of each output of a traced particle, in the tree of the outputs, and what each reads beside summed sites."""
    tree = jax.tree.structure(shapes)
    numbers = jax.tree.unflatten(tree, range(tree.num_leaves))
    read = outputs_read(closed, static.site_plates() | static.variables)
    return numbers, _keeping_apart(static, numbers, read, sizes_of(closed))


def sizes_of(closed: Any) -> list[tuple[int, ...]]:
    """Return the shape of each output of a jaxpr."""
    return [aval.shape for aval in closed.out_avals]


def _keeping_apart(
    static: ParticleTrace, numbers: ParticleOutputs, read: Sequence[Reads], shapes: Sequence[tuple[int, ...]]
) -> list[Reads]:
    """Return what each output reads beside summed sites, or refuse a density that may mix their values.

    A summed site has all its values at once, along a dimension of its own. A program that adds them up (`k.sum()`), sorts them, or looks
    one up by another's place computes densities of no value at all.
    """
    probes: Any = numbers.probes
    for component, factors in static.factors.items():
        for i, (name, dims) in zip(probes["factors:" + component], factors, strict=True):
            moved = _passed_on(dims)
            for variable in (v for v in read[i].keys() & static.variables.keys() if root(v) not in moved):
                at = next((dim for dim, other in dims.names.items() if other == variable), None)
                plate = static.variables[variable].plates[0]
                axis = read[i][variable].axes[1]
                if at is None or (plate.size > 1 and axis != Axis(len(shapes[i]) + at, 1, plate.size)):
                    raise _mixing(static, root(name), variable)
    costs: Any = numbers.model_costs
    for name in static.model:
        summed = read[costs[name]].keys() & static.variables.keys()
        if summed and name not in static.factors:  # A sum reads them; whatever else does has none of their dimensions.
            raise _mixing(static, name, min(summed))
    return [{site: way for site, way in reads.items() if site not in static.variables} for reads in read]


def _mixing(static: ParticleTrace, name: str, variable: str) -> ProgramError:
    """Return the error for the density of a site that may mix the values of a variable."""
    inside = [site in static.model_flows and static.model_flows[site].scanned for site in (name, root(variable))]
    if inside == [False, True]:
        return read_after_scan(name, root(variable))
    return mixed_values(name, root(variable), static.variables[variable].plates[0].dim)


def _passed_on(dims: Dims) -> frozenset[str]:
    """Return the variables of a scan's rolled steps that move from place to place in what one step hands to the next.

    They do where steps read others than the one before. The first steps, which are not rolled, run the same body.
    """
    names = [name for name in dims.names.values() if name.startswith(2 * PREVIOUS)]
    return frozenset(map(root, names)) if dims.time is not None else frozenset()


def specify(
    static: ParticleTrace, reads: Mapping[str, dict[str, Read]] | None
) -> tuple[list[SiteSpec], list[CostSpec]]:
    """Return the specifications of sites and costs.

    `reads` is what each density reads, from `densities_read`; without it (a program that cannot be traced) everything is
    taken to read every site drawn before it, which is unbiased for any program.
    """
    drawn = list(static.estimators)
    costs: list[CostSpec] = []
    sites: list[SiteSpec] = []
    plates: Any = static.plates

    def direct(group: str, name: str, before: list[str]) -> dict[str, Read]:
        if reads is None:
            return dict.fromkeys(before, WHOLE)
        backwards = group == "guide" and name in static.guide_flows and static.guide_flows[name].reverse
        return {
            site: way._replace(steps=_flags(way.steps, backwards)) for site, way in reads[f"{group}:{name}"].items()
        }

    def with_own(read: dict[str, Read], name: str, group: str) -> dict[str, Read]:
        known = OWN if reads is None else reads[f"own:{group}:{name}"][name]
        own = Read(_own(static, name, (group, name)), known.across)
        return {**read, name: read[name].joined(own) if name in read else own}

    for name in static.model:
        read = direct("model", name, drawn)
        if name in static.estimators:
            read = with_own(read, name, "model")
        costs.append(CostSpec(name, plates["model", name], 1.0, read))
    before: list[str] = []
    for name in static.guide:
        read = direct("guide", name, before)
        if name in static.estimators:
            sites.append(SiteSpec(name, plates["score", name], static.estimators[name], read))
            if name in static.closed:
                if reads is None and static.closed[name] == "kl":
                    raise ProgramError(
                        f"Python control flow of the program depends on a value, so that it cannot be seen whether the divergence "
                        f"of site '{name}' has a closed form; drop it from closed_form."
                    )
                read = direct("closed", name, drawn)
            else:
                read = with_own(read, name, "guide")
            before.append(name)
        costs.append(CostSpec(name, plates["guide", name], -1.0, read, closed=name in static.closed))
    return sites, costs


def _own(static: ParticleTrace, name: str, cost: Any) -> int:
    """Return how a cost reads the value of its own site: step by step if both have the same time axis.

    For a model that scans in reverse NumPyro evaluates the density of each step at the value stored in the same
    place, which is another step's: then nothing is taken for granted.
    """
    plates: Any = static.plates
    if cost[0] == "model" and name in static.model_flows and static.model_flows[name].reverse:
        return EVERY
    both = any(plate.time and plate in plates["score", name] for plate in plates[cost])
    return SAME if both else EVERY


def _flags(flags: int, backwards: bool) -> int:
    """Return flags about steps as flags about positions: a scan in reverse stores later steps first."""
    if flags == EVERY or not backwards:
        return flags
    return flags & SAME | (BEFORE if flags & AFTER else 0)


Reached = Callable[[], list[bool]]
"""What tells, where it is asked, which outputs of a traced particle may have a derivative with respect to a parameter."""


def refuse_moving(
    static: ParticleTrace,
    arrays: ParticleOutputs,
    reached: Reached | None = None,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a site whose support moves with a parameter, under an estimator that takes it for fixed.

    `arrays` holds the numbers of the outputs of a traced particle, or without `reached` the arrays themselves.
    """
    unknown = not is_differentiated(params)
    for name in static.estimators:
        found: Any = arrays.probes.get("bounds:" + name, [])
        if any(carries_gradient(x, unknown) if reached is None else reached()[x] for x in found):
            raise moving_support(name, static.families[name], static.estimators[name], name in static.reparameterized)


def refuse_jumps(static: ParticleTrace, arrays: ParticleOutputs, closed: Any, reached: Reached) -> None:
    """Refuse a reparameterized draw that carries gradient, and on which a cost depends without a derivative."""
    points = {name for name, family in static.families.items() if family == "Delta"}
    values: Any = arrays.values
    followed = [
        name
        for name, estimator in static.estimators.items()
        if name in values and name not in points and not (estimator.uses_score or estimator.relaxes)
    ]
    if (followed or static.from_prior) and may_lose(closed.jaxpr):
        moved = {name for name in followed if reached()[values[name]]}
        held: Any = {name: arrays.probes["model:" + name] for name in static.from_prior}
        moved |= {name for name, probes in held.items() if any(reached()[number] for number in probes)}
        costs: Any = [*arrays.guide_costs.items(), *arrays.model_costs.items()]
        lost = lost_paths(closed, moved, points, costs)
        refuse_lost(static.estimators, lost)
        refuse_lost_in_model(static.from_prior, lost)


def outputs_with_gradient(arrays: ParticleOutputs, closed: Any, key: Any, params: Mapping[str, Any]) -> list[bool]:
    """Return which outputs of a traced particle, a function of key and parameters, may have a derivative with respect to a parameter.

    Mutable state, which is among the parameters, is not differentiated.
    """
    still = jax.tree.map(lambda _: False, key)
    smooth = {name: jax.tree.map(lambda _: name not in arrays.mutable, x) for name, x in params.items()}  # noqa: B023
    return gradient_reaches(closed, jax.tree.leaves((still, smooth)), not is_differentiated(params))
