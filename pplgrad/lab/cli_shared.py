"""What several commands do: ask for packages, read settings, print JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from pplgrad.lab.faults import ScriptError
from pplgrad.lab.script import PROGRAMS, Script, load_script

Command = Callable[..., Any]
PAGE = ("altair", "itables", "jinja2", "matplotlib", "pandas", "pyarrow", "vl_convert")
"""The packages that a study's page needs."""


def need(command: str, *packages: str, extra: str = "research") -> None:
    """Refuse a command whose packages are not installed, before anything runs."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ScriptError(f"{command} needs {', '.join(missing)}, not installed; pip install 'pplgrad[{extra}]'.")


def script_argument(command: Command) -> Command:
    """Add the script, and the libraries in which its program runs."""
    libraries = click.option(
        "--backend",
        "backends",
        type=click.Choice(list(PROGRAMS)),
        multiple=True,
        help="May be repeated; those of the script by default.",
    )
    return click.argument("script", type=click.Path(path_type=Path))(libraries(command))


def seed_option(command: Command) -> Command:
    """Add the seed."""
    return click.option("--seed", default=0, show_default=True, type=int, help="Of data, parameters and draws.")(
        command
    )


def settings_option(command: Command) -> Command:
    """Add the script's own options."""
    return click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="An option of the script; may be repeated."
    )(command)


def json_option(command: Command) -> Command:
    """Add the choice of JSON in the place of tables."""
    return click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")(command)


def opened(
    script: Path, backends: tuple[str, ...], settings: tuple[str, ...]
) -> tuple[Script, tuple[str, ...], dict[str, Any]]:
    """Return a script whose data can be loaded, its libraries, and its options; what is wrong with them is told before anything runs."""
    loaded = load_script(script, backends)
    options = loaded.options(parsed(settings))
    loaded.load(options, 0)
    return loaded, backends or loaded.backends, options


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
