"""What estimators ask of a site, and the refusal where it does not fit."""

from __future__ import annotations

from pplgrad.core.estimator import Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.core.structures import LAWS
from pplgrad.errors import EstimatorError
from pplgrad.estimators.registry import remedy


def require_finite(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site whose elements do not have finitely many values."""
    require_steps(estimator, site)
    if site.categories is None:
        why = "does not have finitely many values"
        if site.distribution == "PermutationMatrix":
            why = "has values that are not listed; draw a PlackettLuce (of up to 6 items)"
        elif site.distribution in LAWS:
            why = "has too many values to list"
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': {site.distribution} {why}; {remedy(site)}"
        )


def require_finite_or_count(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site whose elements have neither finitely many values nor are single counts."""
    if site.distribution in LAWS or site.categories is not None:
        require_finite(estimator, site)
        return
    require_steps(estimator, site)
    if not site.is_count:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': {site.distribution} does not have finitely many values, and its "
            f"elements are no single counts; {remedy(site)}"
        )


def require_binary(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site whose elements are not Bernoulli."""
    require_steps(estimator, site)
    if site.categories != 2:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': {site.distribution} is not binary; {remedy(site)}"
        )


def require_count(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site whose elements are not single counts."""
    require_steps(estimator, site)
    if not site.is_count:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': an element of {site.distribution} is no single count (a whole number, 0 "
            f"or more, such as that of a Poisson, NegativeBinomial, Binomial or ZeroInflatedPoisson); {remedy(site)}"
        )


def require_relaxable(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site whose value has no relaxation: all but Bernoulli and one-hot vectors."""
    if site.relaxable:
        return
    if site.categories is not None and site.distribution == "Categorical":
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': a Categorical is a number that indexes something, which has "
            f"no value between two numbers; draw it as a OneHotCategorical, or {remedy(site)}"
        )
    if site.distribution == "Subset":
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': a Subset is relaxed by SIMPLE() and IMLE() alone, which are "
            f"biased; use one of these, or {remedy(site)}"
        )
    if site.distribution == "PlackettLuce":
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}': a ranking is a row of numbers that index something, which has no value "
            f"between two rankings; draw it as a PermutationMatrix, use RELAX(through_cost=False), or {remedy(site)}"
        )
    raise EstimatorError(
        f"{estimator!r} cannot be used at site '{site.name}': {site.distribution} cannot be relaxed, only Bernoulli and "
        f"OneHotCategorical can; {remedy(site)}"
    )


def require_steps(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site in a compiled loop unless each step of it can take another value alone."""
    if estimator.enumerates:
        require_unscanned(estimator, site)
    elif site.nested:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}', which is drawn inside a scan in the body of another one; write one of the two "
            f"as a Python loop, or {remedy(site)}"
        )


def require_unscanned(estimator: Estimator, site: SiteInfo) -> None:
    """Refuse a site drawn in a `scan` or `cond`, whose steps are not one draw of independent elements, and not relaxed together."""
    if site.scanned:
        raise EstimatorError(
            f"{estimator!r} cannot be used at site '{site.name}', which is drawn inside scan or cond, whose steps are not one "
            f"draw of independent elements; write the steps as a Python loop, or {remedy(site)}"
        )
