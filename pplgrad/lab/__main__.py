"""`python -m pplgrad.lab`."""

from pplgrad.lab.cli import main

main(prog_name="pplgrad")
