"""`pplgrad init`: a model script to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from pplgrad.lab.cli_shared import need
from pplgrad.lab.script import PROGRAMS, ScriptError

KINDS = {
    "mixture": "LocalExpectation()",
    "belief-network": "DisARM()",
    "time-series": "DisARM()",
    "counts": "MeasureValued()",
}
"""The kinds of program, with an estimator that each can be compared with."""


@click.command()
@click.argument("script", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(list(KINDS)), default="mixture", show_default=True, help="Kind of program.")
@click.option(
    "--backend", "backends", type=click.Choice(list(PROGRAMS)), multiple=True, help="May be repeated; both by default."
)
def init(script: Path, kind: str, backends: tuple[str, ...]) -> None:
    """Write SCRIPT, a model script that runs as it stands, to begin with.

    Its data are simulated, with inputs and targets; put yours into `load`, and your model and guide into `program`. A file that
    is there already is left as it is.

    \b
    Exit code 0: written. 2: it cannot be written.

    \b
    mixture          assignments (categorical) of data to lines
    belief-network   binary units between inputs and binary targets
    time-series      a hidden state, on or off, in each series
    counts           counts (Poisson) that are measured with noise

    \b
    pplgrad init my_model.py --kind belief-network
    pplgrad check my_model.py
    """
    need("init", "jinja2")
    if script.suffix != ".py":
        raise ScriptError(f"A model script is a Python file; write {script}.py.")
    text = written(kind, backends or tuple(PROGRAMS), script.name)
    try:
        # Exclusive: a file of the user's is never written over, whenever it came.
        with script.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ScriptError(f"{script} is there already, and was left as it is; give another name.") from None
    except OSError as error:
        raise ScriptError(f"{script} cannot be written ({error.strerror}); give another path.") from None
    click.echo(f"written: {script}\ntry:     pplgrad check {script}")


def written(kind: str, backends: tuple[str, ...], name: str) -> str:
    """Return the text of a script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pplgrad.lab"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    names = [kind, *(backend for backend in PROGRAMS if backend in backends)]
    return "".join(
        environment.get_template(f"scripts/{part}.txt").render(name=name, other=KINDS[kind]) for part in names
    )
