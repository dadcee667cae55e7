"""A script's data: one array with a datum in each row, or a dict of such arrays (inputs and targets, say)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Data = Any
"""An array, or a dict of arrays by name, of equally many rows."""


def arrays_of(data: Data) -> list[Any]:
    """Return the arrays that data are made of."""
    return list(data.values()) if isinstance(data, dict) else [data]


def mapped(function: Callable[[Any], Any], data: Data) -> Data:
    """Return data with a function applied to each array.

    >>> mapped(len, {"x": [1, 2], "y": [3, 4]}), mapped(len, [1, 2, 3])
    ({'x': 2, 'y': 2}, 3)
    """
    return {name: function(array) for name, array in data.items()} if isinstance(data, dict) else function(data)


def count(data: Data) -> int:
    """Return the number of rows."""
    return len(arrays_of(data)[0])


def taken(data: Data, chosen: Any) -> Data:
    """Return some rows of data.

    >>> taken({"x": [1, 2, 3]}, slice(0, 2))
    {'x': [1, 2]}
    """
    return mapped(lambda array: array[chosen], data)


def parts(data: Data, size: int) -> list[Data]:
    """Return data in parts of so many rows, the last one of fewer."""
    return [taken(data, slice(start, start + size)) for start in range(0, count(data), size)]


def together(function: Callable[[list[Any]], Any], found: list[Data]) -> Data:
    """Return one of several data: a function makes one of each array's versions.

    >>> together(sum, [{"x": 1, "y": 2}, {"x": 3, "y": 4}])
    {'x': 4, 'y': 6}
    """
    if isinstance(found[0], dict):
        return {name: function([data[name] for data in found]) for name in found[0]}
    return function(found)
