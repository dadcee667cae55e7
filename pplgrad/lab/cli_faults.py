"""How the commands tell of a script that raises: one sentence on standard error for each failure, and an exit code of its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from pplgrad.lab.script import Script
from pplgrad.lab.tasks import account

FAULT = 2
"""The exit code of a command, a script or a study that cannot be used as given."""


def _ask(context: click.Context, option: click.Parameter, value: bool) -> None:
    context.meta["traceback"] = value


traceback_option = click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    callback=_ask,
    help="Show where in Python an error of the script was raised, too.",
)


def say(text: str, details: str | None = None, context: click.Context | None = None) -> None:
    """Print a sentence for the user, and the traceback if it was asked for."""
    context = context or click.get_current_context(silent=True)
    if details and context is not None and context.meta.get("traceback"):
        click.echo(details.rstrip(), err=True)
    click.echo(f"pplgrad: {printable(text)}", err=True)


def printable(text: str) -> str:
    r"""Return a text in which letters that would steer a terminal are written out.

    >>> printable("a\x1b[2Jé\n")
    'a\\x1b[2Jé\\n'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def details_of(error: BaseException) -> str:
    """Return a traceback as text."""
    return "".join(traceback.format_exception(error))


class Faults:
    """The failures of a command, each reported once: the same failure in both libraries is one failure.

    Printed on leaving the context, in their order, whatever else happens there.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[list[str], str | None]] = {}

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, text: str, backend: str, details: str | None = None) -> None:
        """Note what went wrong in a library."""
        backends, first = self.found.setdefault(text, ([], details))
        self.found[text] = (backends if backend in backends else [*backends, backend], first)

    @contextmanager
    def of(self, script: Script, backend: str) -> Iterator[None]:
        """Note what is raised inside, and go on: other estimators and the other library may have results."""
        try:
            yield
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            self.add(account(error, script.path, script, backend), backend, details_of(error))

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *error: Any) -> None:
        for text, (backends, details) in self.found.items():
            where = f" ({backends[0]})" if len(backends) == 1 else ""
            text = text.removesuffix(".") + where
            say(text if text.endswith("?") else f"{text}.", details)
