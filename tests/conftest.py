"""Settings of all tests."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.covering import left_out
from tests.durations import Recorder, recorded

# Programs of users that are checked or run by themselves, in processes of their own.
collect_ignore_glob = ["extras.py", "typed/*"]

with suppress(PackageNotFoundError):
    if version("jaxlib").startswith(
        "0.10."
    ):  # A process that is given a flag that another version does not know ends at once.
        # Compiling dominates the JAX tests, which run each small function once: let XLA hurry. Set before JAX is imported.
        # At level 0 without fusion emitters XLA's AVX code (jaxlib 0.10) makes NaN of some finite gradients; its SSE code does not.
        os.environ.setdefault(
            "XLA_FLAGS",
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
            "--xla_cpu_max_isa=SSE4_2 --xla_cpu_parallel_codegen_split_count=1",
        )


def pytest_addoption(parser):
    parser.addoption(
        "--all-cases", action="store_true", help="Run every case, not those that `make test` has time for."
    )
    parser.addoption("--most-cases", type=int, default=0, help="Run at most so many cases of each test function.")
    parser.addoption("--record-durations", action="store_true", help="Write what tests took into tests/durations.json.")


COMPILED = "PPLGRAD_TESTS_COMPILED"
"""The variable that tells the processes of one run where they keep what JAX compiles."""


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os.environ[COMPILED] = folder = tempfile.mkdtemp(prefix="pplgrad-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(trylast=True)  # After what -m and -k deselect, so that what remains is covered.
def pytest_collection_modifyitems(config, items):
    """Leave out the cases of a grid that its cover does not need, unless all are asked for, or one by its name."""
    named = any("[" in given for given in config.args)
    every, most = config.getoption("--all-cases") or named, 0 if named else config.getoption("--most-cases")
    out = left_out(items, every, most, recorded())
    config.hook.pytest_deselected(items=[items[number] for number in sorted(out)])
    items[:] = [item for number, item in enumerate(items) if number not in out]


def pytest_collection_finish(session):
    """Spare the garbage collector what was imported, and call it less often: tracing makes many short-lived objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    if "jax" in sys.modules:
        _keep_what_jax_compiles(session.config)
        _share_the_context_of_modules(session.config)


def _keep_what_jax_compiles(config):
    """Let JAX keep on disk what it compiles: many tests compile the same small functions, and all do once it has let go of them.

    The processes of a run share what they keep if each file appears in one piece, as JAX does not write it; else each has its own.
    """
    jax, folder = sys.modules["jax"], os.environ[COMPILED]
    if not _write_in_one_piece(config):
        folder = tempfile.mkdtemp(dir=folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _write_in_one_piece(config):
    """Let JAX's cache on disk put its files into their places when they are whole; return whether that could be arranged."""
    try:
        from jax._src.lru_cache import _CACHE_SUFFIX, LRUCache
    except ImportError:
        return False
    before = LRUCache.put

    def put(self, key, value):
        place, part = (os.path.join(self.path, f"{key}{end}") for end in (_CACHE_SUFFIX, f".{os.getpid()}"))
        with open(part, "wb") as file:
            file.write(value)
        os.replace(part, place)

    LRUCache.put = put
    config.add_cleanup(lambda: setattr(LRUCache, "put", before))
    return True


contexts = []
"""The MLIR context of all modules that JAX lowers, once there is one."""


def _share_the_context_of_modules(config):
    """Let JAX lower all of its modules in one MLIR context.

    A context of its own for each of them, which a cache of JAX keeps, took a fifth of the time of a file of tests and most of its memory.
    What is lowered while another module is, as a constant that it needs, has one of its own: it would become a part of that module.
    """
    with suppress(ImportError, AttributeError):  # Private: without it, each module has its own.
        from jax._src.interpreters import mlir

        make = mlir.make_ir_context

        def shared():
            try:
                inside = mlir.ir.Context.current is not None
            except ValueError:
                inside = False
            if inside:
                return make()
            if not contexts:
                contexts.append(make())
            return contexts[0]

        mlir.make_ir_context = shared
        config.add_cleanup(lambda: setattr(mlir, "make_ir_context", make))


MOST_MEMORY = 1.75e9
"""Bytes that a process may hold before it lets go of what earlier tests have compiled."""

LEAST_GAIN = 2e8
"""Bytes that must have come since the last time, so that what is held in any case does not make each test compile anew."""

held = [0.0]


def pytest_runtest_teardown(item, nextitem):
    """Close the figures that a test has left open, since matplotlib warns at the twentieth of a process.

    Let go of what JAX has compiled where it is too much: nothing but time depends on it.
    """
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    if nextitem is None or "jax" not in sys.modules or _resident() <= max(MOST_MEMORY, held[0] + LEAST_GAIN):
        return
    sys.modules["jax"].clear_caches()
    contexts.clear()
    gc.collect()
    with suppress(OSError, AttributeError):  # A C library without it keeps what was freed for itself.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    held[0] = _resident()


def _resident():
    """Return how many bytes of memory the process holds, 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
