"""Random programs with an oracle of their own, and what hunts for wrong gradients with them: `python -m pplgrad.testing.fuzz`."""

from __future__ import annotations

from pplgrad.testing.fuzz.generate import FLAVOURS, random_program
from pplgrad.testing.fuzz.oracle import exact
from pplgrad.testing.fuzz.program import Program
from pplgrad.testing.fuzz.source import source

__all__ = ["FLAVOURS", "Program", "exact", "random_program", "source"]
