"""What several commands do: ask for packages, read settings, print JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import click

from pplgrad.lab.faults import ScriptError


def need(command: str, *packages: str, extra: str = "research") -> None:
    """Refuse a command whose packages are not installed, before anything runs."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ScriptError(f"{command} needs {', '.join(missing)}, not installed; pip install 'pplgrad[{extra}]'.")


def parsed(settings: tuple[str, ...]) -> dict[str, str]:
    """Return NAME=VALUE pairs as a dict."""
    pairs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ScriptError(f"--set takes NAME=VALUE; got '{setting}'.")
        pairs[name] = value
    return pairs


@contextmanager
def resumable(left: Callable[[], str]) -> Iterator[None]:
    """Say what an interruption leaves, where that is not nothing."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(left()) from None


class Interrupted(KeyboardInterrupt):
    """An interruption after which something is kept; its text says what."""


def show_json(data: Any) -> None:
    """Print plain data for a machine to read."""
    import json

    click.echo(json.dumps(data, indent=2, default=str))
