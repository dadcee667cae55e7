"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    import click
except ModuleNotFoundError:  # pragma: no cover
    sys.exit("The command line needs click and more, which are not installed; pip install 'pplgrad[research]'.")

from pplgrad import __version__
from pplgrad.errors import PplgradError
from pplgrad.estimators import registry
from pplgrad.lab import cli_assess, cli_check, cli_choose, cli_compare, cli_init
from pplgrad.lab.cli_faults import FAULT, details_of, say
from pplgrad.lab.cli_shared import PAGE, Interrupted, need, show_json
from pplgrad.lab.faults import shortened

_INTERRUPTED = 130

_EXITS = """\b
Exit codes: 0 done; 1 a verdict or a result that is bad news; 2 a command, a script or a study that cannot be used as given,
or a script that raises (one sentence with its line; --traceback shows more); 3 `check` cannot tell with its budget;
4 `compare` is done but for some estimators that failed; 130 interrupted (`compare` then goes on where it stopped)."""


class _Group(click.Group):
    """A command group that shows errors as one sentence, with exit code 2; an interruption is none."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            left = str(error) if isinstance(error, Interrupted) else "nothing is kept; the same command starts anew"
            say(f"interrupted: {left}.", None, ctx)
            ctx.exit(_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except PplgradError as error:
            say(str(error), details_of(error), ctx)
            ctx.exit(FAULT)
        except Exception as error:
            text = shortened(f"{type(error).__name__}: {error}").removesuffix(".")
            hint = "" if isinstance(error, (OSError, MemoryError)) else "; --traceback shows where"
            say(f"{text}{hint}.", details_of(error), ctx)
            ctx.exit(FAULT)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXITS)
@click.version_option(__version__)
def main() -> None:
    """A gradient estimator for each latent sample site, in Pyro and in NumPyro.

    \b
    Where do I begin?                     pplgrad init my_model.py --kind belief-network
    Is my gradient right?                 pplgrad check SCRIPT --estimator 'DisARM()'
    Which estimator is best here?         pplgrad choose SCRIPT
    Did the guide fit?                    pplgrad assess SCRIPT --train 1000
    How do they compare, in full?         pplgrad compare SCRIPT --estimator ... (or a study in a TOML file)
    What came out, as a page?             pplgrad report DIR
    What is there to choose from?         pplgrad estimators

    A SCRIPT is a model script: a Python file with a model and a guide (models/README.md). Completion in the shell:
    `pplgrad completion bash` says what to put where.
    """


@main.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "markdown", "json"]),
    default="table",
    show_default=True,
    help="What to print.",
)
def estimators(form: str) -> None:
    """List all estimators with what they declare."""
    if form == "markdown":
        click.echo(registry.markdown())
        return
    if form == "json":
        show_json([dict(zip(registry.COLUMNS, row, strict=True)) for row in registry.table()])
        return
    need("estimators", "rich")
    from pplgrad.lab.sheet import Sheet, show_lines

    first = ("estimator", "bias", "sites", "evaluations", "differentiable costs", "source", "derivatives")
    Sheet(registry.COLUMNS, registry.table(), first=first, more="--format json has all").show()
    show_lines(["", "evaluations: of the program, beyond the primary draw, for each site"])


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the tables' numbers as JSON.")
def report(folder: Path, as_json: bool) -> None:
    """Make one page, report.html, of the study in FOLDER, and its pictures as PNG and SVG."""
    need("report", *PAGE)
    from pplgrad.lab.report import write_report
    from pplgrad.lab.results import read

    page = write_report(folder)
    if as_json:
        frame, about = read(folder)
        show_json(
            {"page": str(page), **about, "rows": frame.astype(object).where(frame.notna(), None).to_dict("records")}
        )
    else:
        click.echo(f"written: {page}")


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete pplgrad's commands and options.

    \b
    bash:  pplgrad completion bash >> ~/.bashrc
    zsh:   pplgrad completion zsh >> ~/.zshrc
    fish:  pplgrad completion fish > ~/.config/fish/completions/pplgrad.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(main, {}, "pplgrad", "_PPLGRAD_COMPLETE").source())


main.add_command(cli_init.init)
main.add_command(cli_assess.assess)
main.add_command(cli_check.check)
main.add_command(cli_choose.choose)
main.add_command(cli_compare.compare)
