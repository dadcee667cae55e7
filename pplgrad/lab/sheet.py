"""A table that fits the terminal: fewer columns where it is narrow, and never a name or a number that is cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED = 200
"""The width where there is no terminal, unless COLUMNS says another."""
_GAP = 3
_LEAST = 4
"""Columns below which a table is none: each row is then a block of lines."""
_PROSE = 24
"""The width to which text is not squeezed for the sake of one more column."""


def screen() -> Console:
    """Return what prints on standard output, as wide as the terminal."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    columns = os.environ.get("COLUMNS", "")
    return Console(highlight=False, width=int(columns) if columns.isdigit() and int(columns) > 0 else PIPED)


@dataclass(frozen=True)
class Sheet:
    """A table of text cells.

    `numbers` are the heads of columns that never wrap; other cells wrap between words. `first` are the heads by importance: where the
    terminal is too narrow, those at its end are left out, and those that it does not name go before.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()
    first: Sequence[str] = ()
    title: str = ""
    more: str = "--json has all"

    def show(self, console: Console | None = None) -> None:
        """Print the table, or a block of lines for each row where not even the first columns fit."""
        console = console or screen()
        shown = self._shown(console.width)
        if len(shown) < min(_LEAST, len(self.heads)):
            self._show_blocks(console)
            return
        widths = self._widths(shown, console.width)
        table = Table(
            title=self.title or None, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title_justify="left"
        )
        wrapped = 0
        for place in shown:
            right = self.heads[place] in self.numbers
            table.add_column(
                Text(self.heads[place]), width=widths[place], no_wrap=False, justify="right" if right else "left"
            )
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in shown))
            wrapped += any(cell_len(row[place]) > widths[place] for place in shown)
        # Many rows of several lines need something between them.
        table.leading = int(4 * wrapped > len(self.rows))
        console.print(table)
        if left := [head for place, head in enumerate(self.heads) if place not in shown]:
            hint = f"; {self.more}" if self.more else ""
            console.print(Text(f"Too narrow for: {'; '.join(filter(None, left))} (a wider terminal shows them{hint})."))

    def _shown(self, width: int) -> list[int]:
        """Return the columns that fit, the most important ones first to stay."""
        order = sorted(range(len(self.heads)), key=self._rank)

        def too_wide(of: Callable[[int], int]) -> bool:
            return sum(map(of, order)) + _GAP * (len(order) - 1) > width

        while len(order) > _LEAST and too_wide(lambda place: max(self._least(place), min(self._most(place), _PROSE))):
            order.pop()
        while len(order) > 1 and too_wide(self._least):
            order.pop()
        return sorted(order) if self._least(order[0]) <= width else []

    def _rank(self, place: int) -> int:
        head = self.heads[place]
        return self.first.index(head) if head in self.first else -1

    def _least(self, place: int) -> int:
        """Return the width of a column below which something would be cut."""
        whole = self.heads[place] in self.numbers
        cells = (word for row in self.rows for word in ([row[place]] if whole else row[place].split()))
        return max(map(cell_len, [*cells, *self.heads[place].split(), ""]))

    def _most(self, place: int) -> int:
        """Return the width of a column in which nothing wraps."""
        return max(cell_len(text) for text in [self.heads[place], *(row[place] for row in self.rows)])

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int]:
        """Return the columns' widths: what is left goes to the cells that wrap most."""
        widths = {place: self._least(place) for place in shown}
        wanted = {place: self._most(place) for place in shown}
        rest = width - sum(widths.values()) - _GAP * (len(shown) - 1)
        while rest > 0:
            place = max(shown, key=lambda p: wanted[p] / max(widths[p], 1))
            if wanted[place] <= widths[place]:
                break
            widths[place] += 1
            rest -= 1
        return widths

    def _show_blocks(self, console: Console) -> None:
        if self.title:
            show_lines([self.title, ""], console)
        for row in self.rows:
            show_lines([f"{head}: {text}" for head, text in zip(self.heads, row, strict=True) if text], console)
            console.print()


def show_lines(lines: Iterable[str], console: Console | None = None) -> None:
    """Print text that wraps between words; a line with a word that is longer is left to the terminal."""
    console = console or screen()
    for line in lines:
        longest = max(map(cell_len, line.split()), default=0)
        console.print(Text(line), soft_wrap=longest > console.width)
