"""Tables in narrow terminals: fewer columns, and never a name or a number that is cut."""

import io
import re

import pytest
from click.testing import CliRunner
from rich.console import Console

from pplgrad.estimators import registry
from pplgrad.lab import cli
from pplgrad.lab.sheet import Sheet
from tests.lab.test_crashes import given
from tests.lab.test_terminal import write

WIDTHS = [60, 80, 110, 200]
HEADS = ("library", "estimator", "ELBO test, nats / datum", "step, ms", "note")
ROWS = [
    ("pyro", "score+loo", "-31.42 ± 0.2718", "1.25", ""),
    ("numpyro", "z=DisARM(),w=Reparam()", "-1.234e+04 ± 12.5", "0.75", "not measured: out of time"),
]


def printed(width, *arguments, **options):
    result = CliRunner().invoke(cli.main, list(map(str, arguments)), env={"COLUMNS": str(width)}, **options)
    assert result.exit_code in (0, 1, 3, 4), result.output
    return result.stdout


def uncut(text, width, allowed):
    """Whether lines fit, and each word that is printed is one of those of the cells."""
    assert "…" not in text
    known = {word for cell in allowed for word in str(cell).split()}
    for line in text.splitlines():
        assert len(line.rstrip()) <= width, line
        if set(line.strip()) <= set("─") or line.startswith(("Too narrow", "shows", "has", "all)")):
            continue
        for word in line.split():
            assert word in known, (word, line)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_estimators_words_are_whole(width):
    text = printed(width, "estimators")
    table, _, _ = text.partition("evaluations: of")
    heads = [f"{head}:" for head in registry.COLUMNS]
    cells = [cell for row in registry.table() for cell in row]
    uncut(table.partition("Too narrow")[0], width, [*registry.COLUMNS, *heads, *cells])
    for row in registry.table():
        assert row[0].split(",")[0] in table
    assert ("source" in table) and ("Too narrow" in table) == (80 <= width < 200)


@pytest.mark.parametrize("width", [20, 40, 50, 60, 70, 80, 100])
def test_columns_go_in_the_order_of_their_importance(width):
    console = Console(width=width, file=io.StringIO())
    first = ("estimator", "ELBO test, nats / datum", "library", "step, ms", "note")
    Sheet(HEADS, ROWS, numbers=HEADS[2:4], first=first).show(console)
    text = console.file.getvalue()
    _, _, left = text.partition("Too narrow for: ")
    lines = text.splitlines()
    for row in ROWS:
        # A name or a number is on one line.
        assert any(row[1] in line for line in lines)
        for head, number in zip(HEADS[2:4], row[2:4], strict=True):
            assert any(number in line for line in lines) or head in " ".join(left.split()) or width < 50, (number, text)
    assert "estimator" not in left and ("note" in left or not left)


def numbers_of(text):
    return re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e[+-]\d+)?(?![\w.])", text)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("command", ["check", "choose", "compare"])
def test_what_commands_print_fits(tmp_path, command, width):
    path = write(tmp_path)
    more = ["--snapshots", "0", "--draws", "20"] if command == "compare" else []
    arguments = [*given(command, path, ["pyro"], tmp_path / "out"), *more, "--estimator", "DisARM()"]
    wide, narrow = printed(400, *arguments), printed(width, *arguments)
    if command == "compare":
        # The second time nothing is measured again, and the numbers are the same.
        assert set(numbers_of(narrow)) <= set(numbers_of(wide))
    assert "…" not in narrow and "DisARM()" in narrow
    for line in narrow.splitlines():
        assert len(line.rstrip()) <= width or line.startswith(("written: ", "guide = ")), line
