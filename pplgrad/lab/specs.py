"""Estimators and objectives as text: `DisARM()`, `ScoreFunction(LeaveOneOut())`, `z=DisARM(),w=Reparam()`, `score+loo`."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import pplgrad
from pplgrad import (
    ELBO,
    Auto,
    Baseline,
    DecayingAverage,
    Estimator,
    Expectation,
    LeaveOneOut,
    NeuralBaseline,
    Objective,
    OptimalConstant,
    ScoreFunction,
)
from pplgrad.core.baseline import parts_of
from pplgrad.errors import PplgradError, did_you_mean, nearest
from pplgrad.lab.faults import shortened
from pplgrad.lab.script import ScriptError

BASELINES: dict[str, Callable[[], Baseline]] = {
    "average": lambda: DecayingAverage(0.9),
    "neural": NeuralBaseline,
    "loo": LeaveOneOut,
    "optimal": OptimalConstant,
    "optimal-past": lambda: OptimalConstant(decay=0.9),
}
"""Short words for baselines, after `score+`."""

NAMES: dict[str, Any] = {
    name: made
    for name in pplgrad.__all__
    if isinstance(made := getattr(pplgrad, name), type)
    and issubclass(made, (Estimator, Baseline, Objective))
    and made not in (Estimator, Baseline, Objective)
}
"""What a specification may name."""

_LONGEST, _DEEPEST, _LARGEST = 2000, 20, 10**9
"""What a text may hold: letters, expressions inside one another, and the size of a number. Far above any that has a use."""


@dataclass(frozen=True)
class Specification:
    """What one candidate of a comparison does: an estimator for each name or pattern, and a number of particles.

    The name "" stands for the sites that a script calls discrete; `particles` is None for the study's number.
    """

    text: str
    estimators: Mapping[str, Estimator]
    particles: int | None = None

    def mapping(self, discrete: tuple[str, ...], inputs: Callable[..., Any] | None = None) -> dict[str, Estimator]:
        """Return the estimators by site; networks that say nothing of their inputs get the script's."""
        result: dict[str, Estimator] = {}
        for name, estimator in self.estimators.items():
            given = with_inputs(estimator, inputs)
            result.update(dict.fromkeys(discrete, given) if name == "" else {name: given})
        return result

    @property
    def all(self) -> tuple[Estimator, ...]:
        """The estimators that are named."""
        return tuple(self.estimators.values())

    @property
    def learns(self) -> bool:
        """Whether anything is learned or averaged along the way."""
        return any(estimator.keeps_state for estimator in self.all)


def specification(text: str) -> Specification:
    """Return what a text says.

    An estimator as in Python, for the script's discrete sites (`DisARM()`); several by site (`z=DisARM(),w=Reparam()`), where names
    may be patterns; or `score` with short words for baselines (`score+loo`). `@4` at the end asks for four particles.

    >>> specification("score+loo").mapping(("z",))
    {'z': ScoreFunction(baseline=LeaveOneOut())}
    >>> specification("layer*=ARMS(4), w=Reparam() @ 2").particles
    2
    """
    _check_length(text)
    body, particles = _particles(text)
    found: dict[str, Estimator] = {}
    for part in _split(body, text):
        name, equals, rest = part.partition("=")
        named = bool(equals) and "(" not in name
        key, expression = (name.strip(), rest) if named else ("", part)
        if key in found:
            raise ScriptError(f"Estimator '{text}' names {key or 'the discrete sites'} twice.")
        found[key] = estimator = _estimator(expression.strip(), text)
        if isinstance(estimator, Auto) and estimator.measure:
            raise ScriptError(
                f"Estimator '{text}' measures times, and what a study finds must not depend on them; run `pplgrad choose` and "
                "write what it chooses."
            )
    return Specification(text.strip(), found, particles)


def objective(text: str) -> Objective:
    """Return the objective that a text names.

    >>> objective("IWAE(samples=5)")
    IWAE(samples=5, plates=None)
    """
    _check_length(text)
    made = _evaluated(text, text)
    if not isinstance(made, Objective):
        raise ScriptError(f"'{text}' is not an objective; write one such as ELBO(), IWAE() or Renyi(0.5).")
    return made


def judged_by(text: str) -> Objective:
    """Return what training under an objective is judged by: the reward where that is it, else the evidence lower bound.

    >>> judged_by("IWAE(samples=5)"), judged_by("Expectation()")
    (ELBO(kl_weight=1.0), Expectation(entropy=0.0))
    """
    made = objective(text)
    return made if isinstance(made, Expectation) else ELBO()


def host_elbo(module: Any, name: str, particles: int) -> Any:
    """Return an ELBO of the host by its name."""
    made = getattr(module, name, None)
    if not isinstance(made, type) or not name.endswith("ELBO"):
        known = ", ".join(sorted(n for n in dir(module) if n.endswith("_ELBO") or n == "RenyiELBO"))
        hint = did_you_mean(name, known.split(", ")) or "."
        raise ScriptError(f"'{name}' is not an ELBO of {module.__name__}; these are: {known}{hint}")
    return made(num_particles=particles)


def with_inputs(estimator: Estimator, inputs: Callable[..., Any] | None) -> Estimator:
    """Return an estimator whose networks that say nothing of their inputs have the given ones."""
    baseline = getattr(estimator, "baseline", None)
    if inputs is None or baseline is None:
        return estimator
    made = [
        replace(p, inputs=inputs) if isinstance(p, NeuralBaseline) and p.inputs is None else p
        for p in parts_of(baseline)
    ]
    total: Any = made[0]
    for part in made[1:]:
        total = total + part
    return replace(estimator, baseline=total)  # type: ignore[type-var]


def _check_length(text: str) -> None:
    """Refuse what nobody writes by hand, before it is read."""
    if not isinstance(text, str):
        raise ScriptError(f"{shortened(repr(text))} is no text; write an estimator such as 'DisARM()' in quotes.")
    if len(text) > _LONGEST:
        raise ScriptError(
            f"'{text[:20]}...' has {len(text):,} letters, and an estimator or an objective at most {_LONGEST:,}."
        )


def _particles(text: str) -> tuple[str, int | None]:
    body, at, count = text.rpartition("@")
    if not at:
        return text, None
    count = count.strip()
    if not (count.isascii() and count.isdecimal() and len(count) < 10 and int(count)):
        raise ScriptError(f"Estimator '{text}': write the number of particles after @, such as @2.")
    return body, int(count)


def _split(text: str, whole: str) -> list[str]:
    """Split at the commas that stand in no parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    if not all(part.strip() for part in parts):
        raise ScriptError(
            f"Estimator '{whole}' has an empty part; write one such as DisARM() or z=DisARM(),w=Reparam()."
        )
    return parts


def _estimator(text: str, whole: str) -> Estimator:
    first, *rest = text.split("+")
    if first.strip() == "score":
        return ScoreFunction(_sum([word.strip() for word in rest], whole))
    made = _evaluated(text, whole)
    if not isinstance(made, Estimator):
        raise ScriptError(f"'{text}' in '{whole}' is not an estimator; write one such as DisARM() or score+loo.")
    return made


def _sum(words: list[str], whole: str) -> Baseline | None:
    total: Any = None
    for word in words:
        if word not in BASELINES:
            hint = did_you_mean(word, BASELINES) or "."
            raise ScriptError(
                f"Unknown baseline '{word}' in '{whole}'; the baselines are: {', '.join(BASELINES)}{hint}"
            )
        total = BASELINES[word]() if total is None else total + BASELINES[word]()
    return total


def _evaluated(text: str, whole: str) -> Any:
    """Return what a text makes. It is read as a tree, of which known names are called with plain values: nothing in it is executed."""
    try:
        with warnings.catch_warnings():
            # Python's remarks about literals are none about estimators.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
        _check_size(tree, whole)
        return _value(tree, whole)
    except (SyntaxError, RecursionError, MemoryError):
        raise ScriptError(
            f"'{text}' cannot be read; write an estimator such as DisARM() or ScoreFunction(LeaveOneOut())."
        ) from None
    except PplgradError:
        raise
    except Exception as error:
        # A specification looks at its arguments as it is made, and any of them may be anything.
        raise ScriptError(f"'{text}' cannot be made: {shortened(str(error))}") from None


def _check_size(tree: ast.expr, whole: str) -> None:
    """Refuse expressions that stand too deep in one another, and numbers that no setting has."""
    level: list[ast.AST] = [tree]
    for _ in range(_DEEPEST):
        for node in level:
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, (int, float)) and value > _LARGEST:
                raise ScriptError(f"'{whole}' has a number above {_LARGEST:,}; write a smaller one.")
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return
    raise ScriptError(
        f"'{whole}' is nested more than {_DEEPEST} deep; write an estimator such as ScoreFunction(LeaveOneOut())."
    )


def _value(node: ast.expr, whole: str) -> Any:
    """Return the value of an expression of known names, calls, sums of baselines and plain numbers."""
    match node:
        case ast.Call(func=ast.Name(id=name)):
            made = _named(name, whole)
            arguments = [_value(argument, whole) for argument in node.args]
            _check_keywords(made, [str(k.arg) for k in node.keywords], whole)
            return made(*arguments, **{str(k.arg): _value(k.value, whole) for k in node.keywords})
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, whole) + _value(right, whole)
        case ast.Name(id=name):
            _named(name, whole)
            raise ScriptError(f"'{name}' in '{whole}' is a name without parentheses; write {name}().")
        case _:
            return ast.literal_eval(node)


def _check_keywords(made: Any, given: list[str], whole: str) -> None:
    known = list(signature(made).parameters)
    for name in given:
        if given.count(name) > 1:
            raise ScriptError(f"{made.__name__}() in '{whole}' is given '{name}' twice.")
        if name not in known:
            hint = did_you_mean(name, known) or "."
            raise ScriptError(
                f"{made.__name__}() in '{whole}' takes no '{name}'; it takes: {', '.join(known) or 'nothing'}{hint}"
            )


def _named(name: str, whole: str) -> Any:
    if name not in NAMES:
        near = nearest(name, [*NAMES, "score"])
        near = near if near in (None, "score") else f"{near}()"
        hint = f"did you mean {near}?" if near else "`pplgrad estimators` lists them."
        raise ScriptError(f"Unknown name '{name}' in '{whole}'; {hint}")
    return NAMES[name]
