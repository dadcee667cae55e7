"""Processes of their own for tests, without what takes most of their time and is not what is tested: the page of a study, and imports."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager

PAGELESS = """
import sys
from types import SimpleNamespace
# In the place of what writes pages, and of all that it imports.
sys.modules["pplgrad.lab.report"] = SimpleNamespace(write_report=lambda out: out / "report.html", command_line=" ".join)
from pplgrad.lab.__main__ import main
main()
"""
COMMAND = [sys.executable, "-W", "ignore", "-c", PAGELESS]
"""The command line in a process of its own, in which studies have no page."""

FORKING = """
import importlib, json, os, sys, traceback

module, function, *before = sys.argv[1:]
for name in before:
    importlib.import_module(name)
called = getattr(importlib.import_module(module), function)
for line in sys.stdin:
    given, environment = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    try:
        os.environ.update(environment)
        called(*given)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
"""


@contextmanager
def forks(module, function, *before):
    """Give what calls a function in a process of its own, with words and an environment, and returns the process's exit code.

    Each is a fork of one process, which has imported the function's module and those to be imported `before` it, and run nothing.
    """
    command = [sys.executable, "-W", "ignore", "-c", FORKING, module, function, *before]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with tempfile.TemporaryDirectory() as cache:
        # What JAX compiles for the first fork serves the others, which compile the same.
        known = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        known["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        with subprocess.Popen(command, env={**os.environ, **known}, **pipes) as process:

            def call(*given, **environment):
                process.stdin.write(json.dumps([list(map(os.fspath, given)), environment]) + "\n")
                return int(process.stdout.readline())

            yield call
            process.stdin.close()
