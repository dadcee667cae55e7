"""Settings of all tests."""

import os

# Compiling dominates the JAX tests, which run each small function once: let XLA hurry. Set before JAX is imported.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
