"""Peers, hand-written versions and pplgrad on the same work: `make bench` (minutes) and `make bench-full` (two hours).

Every contestant runs in a process of its own, and those of a work take turns on one core. What is found is added to one tidy file
after each work, so that a suite that was interrupted goes on where it stopped; tables and picture are made of that file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

import click
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

from benchmarks import of_estimators
from benchmarks.contestants import CONTESTANTS
from benchmarks.picture import draw
from benchmarks.shared import ROOT
from benchmarks.tables import beside_another, markdown
from benchmarks.turns import IN, Found, Rules, race
from benchmarks.works import Work, arrays
from pplgrad.estimators.registry import every_estimator
from pplgrad.lab.tasks import write_atomically

UNITS = {"step_ms": "ms", "peak_mib": "MiB", "imported_mib": "MiB"}
FILE = "bench.parquet"


@dataclass(frozen=True)
class Cell:
    """Contestants that take turns on one work."""

    work: Work
    contestants: tuple[str, ...]
    limit_s: float


EVERYONE = tuple(CONTESTANTS)
OF_KEYS = tuple(name for name in EVERYONE if name.endswith(" keys"))
"""They take part where sites are drawn one after the other."""
PLAIN = tuple(name for name in EVERYONE if not name.endswith("gradient only") and name not in OF_KEYS)
CORE = tuple(
    name for name in PLAIN if name not in ("Storchastic", "PyTorch by hand compiled") and "TraceEnum_ELBO" not in name
)
IN_NUMPYRO = tuple(name for name in PLAIN if name.startswith(("NumPyro", "JAX")) and "TraceEnum_ELBO" not in name)
LONG = (
    *("Pyro Trace_ELBO", "Pyro TraceGraph_ELBO", "Pyro TraceGrad_ELBO", "Pyro TraceGrad_ELBO compiled"),
    *("Pyro TraceGrad_ELBO compiled, joint optimizer", "PyTorch by hand", "NumPyro TraceGrad_ELBO", "JAX by hand"),
)


def quick() -> list[Cell]:
    """Return what `make bench` measures."""
    short = tuple(name for name in EVERYONE if name != "NumPyro TraceEnum_ELBO")
    return [
        Cell(Work("sbn", 200), PLAIN, 60),
        Cell(Work("sbn", 50), CORE, 60),
        Cell(Work("sbn", 200, layers=2, particles=10), LONG, 60),
        Cell(Work("chain", 10), short, 60),
        Cell(Work("chain", 50), (*CORE, *OF_KEYS), 90),
        Cell(Work("chain", 200), (*LONG, "NumPyro Trace_ELBO", *OF_KEYS), 400),
        Cell(Work("scan", 200), ("Pyro Trace_ELBO", "Pyro TraceGrad_ELBO", *IN_NUMPYRO, *OF_KEYS), 60),
        *estimators(),
    ]


def full() -> list[Cell]:
    """Return what `make bench-full` measures."""
    cells = [
        Cell(Work("sbn", latents, layers, particles), PLAIN, 120)
        for particles in (1, 10, 100)
        for layers in (1, 2)
        for latents in (50, 200)
    ]
    cells.append(Cell(Work("plate", 200, batch=10_000), PLAIN, 120))
    cells += estimators()
    # The longest come last; at 1,000 sites many have to be given up.
    loops = (*PLAIN, *OF_KEYS)
    sizes = ((10, EVERYONE, 120), (50, EVERYONE, 120), (200, loops, 240), (1000, loops, 120))
    cells += [Cell(Work(kind, length), who, limit_s) for length, who, limit_s in sizes for kind in ("scan", "chain")]
    return cells


ELSEWHERE = (
    "CountDifference",
    "DReG",
    "Enumerate",
    "IMLE",
    "ImplicitReparam",
    "Mirrored",
    "Reparam",
    "SIMPLE",
    "StratifiedMixture",
)
ELSEWHERE += ("SumAndSample", "TruncatedGumbelSoftmax", "UnorderedSet")
"""Estimators that a belief network of 200 Bernoulli latents has no place for."""


def estimators() -> list[Cell]:
    """Return each estimator on the belief network: what a user gets, its limit, and the versions by hand."""
    names = [
        "default",
        *(f"{type(one).__name__}()" for one in every_estimator() if type(one).__name__ not in ELSEWHERE),
    ]
    texts = {name: Work("sbn", 200) for name in names}
    texts |= {
        "REBAR(learn=False)": Work("sbn", 200),
        "ScoreFunction(baseline=LeaveOneOut())": Work("sbn", 200, particles=2),
    }
    return [Cell(work, who, 180) for work, who in of_estimators.cells(texts)]


SUITES = {"quick": quick, "full": full, "estimators": estimators}


@click.command(help=__doc__)
@click.option("--suite", type=click.Choice(list(SUITES)), default="quick", show_default=True)
@click.option("--work", "patterns", multiple=True, help="Only works that match, such as 'sbn*' or 'chain 50'.")
@click.option("--contestant", "names", multiple=True, help="Only contestants that match, such as 'Pyro *'.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Another checkout, beside this one.",
)
@click.option("--turns", default=20, show_default=True, help="Turns of each contestant.")
@click.option("--seconds", default=1.5, show_default=True, help="Measuring time of each contestant on a work.")
@click.option("--limit", type=float, help="Seconds until the first step after which a contestant is given up.")
@click.option("--memory", default=8.0, show_default=True, help="GiB above which a contestant is given up.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=ROOT / "results" / "bench")
def main(
    suite: str,
    patterns: tuple[str, ...],
    names: tuple[str, ...],
    against: Path | None,
    turns: int,
    seconds: float,
    limit: float | None,
    memory: float,
    seed: int,
    out: Path,
) -> None:
    cells = chosen(SUITES[suite](), patterns, names)
    if against is not None:
        cells = [both for both in (beside(cell, against) for cell in cells) if both.contestants]
    if not cells:
        raise click.UsageError("No work has a contestant that matches; see --suite, --work and --contestant.")
    found = measured(cells, turns, seconds, seed, out, limit, memory)
    if against is not None:
        (out / "against.md").write_text(text := beside_another(found))
        click.echo(text)
    else:
        report(found, out)


def chosen(cells: list[Cell], patterns: tuple[str, ...], names: tuple[str, ...]) -> list[Cell]:
    """Return the cells and contestants that match, all without a pattern."""
    found = []
    for cell in cells:
        left = tuple(n for n in cell.contestants if not names or any(fnmatchcase(n, pattern) for pattern in names))
        if left and (not patterns or any(fnmatchcase(cell.work.name, pattern) for pattern in patterns)):
            found.append(Cell(cell.work, left, cell.limit_s))
    return found


def beside(cell: Cell, folder: Path) -> Cell:
    """Return a cell with the contestants of pplgrad, and those of another checkout beside them."""
    ours = [name for name in cell.contestants if "TraceGrad_ELBO" in name]
    both = [name for one in ours for name in (one, f"{one}{IN}{folder.resolve()}")]
    return Cell(cell.work, tuple(both), cell.limit_s)


def digest(cell: Cell, rules: Rules, seed: int) -> str:
    """Return a name for all that decides a cell's numbers: what is measured, how, and by which code."""
    sources = hashlib.sha256()
    for root in sorted({ROOT, *(Path(name.partition(IN)[2]) for name in cell.contestants if IN in name)}):
        for path in sorted(
            [*(root / "pplgrad").rglob("*.py"), *(root / "benchmarks").glob("*.py"), root / "models/sbn.py"]
        ):
            sources.update(path.read_bytes())
    about = [asdict(cell), asdict(rules), seed, sources.hexdigest(), machine()]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def machine() -> dict[str, str]:
    """Return what a reader of timings wants to know of the machine."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = named[0] if named else processor
    return {"processor": processor, "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}"}


def measured(
    cells: Sequence[Cell],
    turns: int,
    seconds: float,
    seed: int,
    out: Path,
    limit: float | None = None,
    memory: float = Rules.limit_gib,
) -> pd.DataFrame:
    """Measure cells one after the other; return what was found of them, in their order. A cell's own limit stands unless one is given."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = []
    for cell in (bar := tqdm(cells, unit="work")):
        bar.set_postfix_str(cell.work.name)
        rules = Rules(turns, seconds, cell.limit_s if limit is None else limit, memory)
        measure(cell, rules, seed, out)
        wanted.append(digest(cell, rules, seed))
    frame = pd.read_parquet(out / FILE)
    found = frame[frame["cell"].isin(wanted)]
    return found.sort_values("cell", key=lambda names: names.map(wanted.index), kind="stable")


def measure(cell: Cell, rules: Rules, seed: int, out: Path) -> None:
    """Measure a cell and add it to the tidy file, unless it is there."""
    name = digest(cell, rules, seed)
    known = pd.read_parquet(out / FILE) if (out / FILE).exists() else pd.DataFrame()
    if len(known) and name in set(known["cell"]):
        return
    found = race(list(cell.contestants), cell.work, arrays(cell.work, seed), seed, rules)
    frame = pd.concat([known, tidy(cell.work, found, seed, name)], ignore_index=True)
    write_atomically(out / FILE, frame.to_parquet(index=False))


def tidy(work: Work, found: list[Found], seed: int, cell: str) -> pd.DataFrame:
    """Return one row for each number, and one with the reason for each contestant that has none."""
    shared = {**asdict(work), "work": work.name, "cell": cell, "seed": seed, **machine()}
    shared |= {
        "flags": os.environ["XLA_FLAGS"],
        "commit": commit(),
        "date": datetime.now(UTC).isoformat("T", "seconds"),
    }
    rows = []
    for one in found:
        about = {**shared, "contestant": one.contestant, "versions": json.dumps(one.versions, sort_keys=True)}
        about |= {"status": one.status, "reason": one.reason, "note": one.note}
        numbers = [("step_ms", turn, value) for turn, value in one.turns.items()]
        numbers += [(quantity, i, value) for quantity, values in one.numbers.items() for i, value in enumerate(values)]
        for quantity, turn, value in numbers or [(None, None, None)]:
            rows.append({**about, "quantity": quantity, "turn": turn, "value": value})
    frame = pd.DataFrame(rows).astype({"turn": "Int64", "value": float, "quantity": "string"})
    frame["unit"] = frame["quantity"].map(lambda q: UNITS.get(q, "s"), na_action="ignore").astype("string")
    return frame


def commit() -> str:
    """Return the commit that is measured, if this is a checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def report(frame: pd.DataFrame, out: Path) -> None:
    """Print the tables, write them, and draw the picture."""
    text = markdown(frame)
    (out / "bench.md").write_text(text)
    if (console := Console()).is_terminal:
        console.print(Markdown(text))
    else:
        click.echo(text)
    files = [out / name for name in (FILE, "bench.md")] + draw(frame, out)
    click.echo("written: " + ", ".join(str(path) for path in files))


if __name__ == "__main__":
    main()
