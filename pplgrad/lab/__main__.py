"""`pplgrad`, and `python -m pplgrad.lab`."""

from __future__ import annotations

import sys

from pplgrad import __version__


def main() -> None:
    """Run the command line; the version is known without the extra `research`, which all else needs."""
    if sys.argv[1:] == ["--version"]:
        print(f"pplgrad, version {__version__}")
        return
    from pplgrad.lab.cli import main as commands

    commands(prog_name="pplgrad")


if __name__ == "__main__":
    main()
