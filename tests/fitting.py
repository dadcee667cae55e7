"""Every estimator that a kind of site can have."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pplgrad import IWAE
from pplgrad.core.objectives import ELBO
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import PplgradError
from pplgrad.estimators.registry import every_estimator

DISCRETE = SiteInfo("z", "Bernoulli", False, True, 2, categories=2, relaxable=True)
CONTINUOUS = SiteInfo("w", "Normal", True, False, 2)


def fitting(site: SiteInfo) -> Iterator[Any]:
    """Yield every estimator that a site can have, with an objective under which it can."""
    for estimator in every_estimator():
        for objective in (ELBO(), IWAE(plates=())):
            try:
                estimator.check(replace(site, objective=objective))
            except PplgradError:
                continue
            yield pytest.param(estimator, objective, id=type(estimator).__name__)
            break
