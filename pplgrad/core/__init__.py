"""The ground floor: what every other part stands on. Imports nothing above, neither torch nor jax."""
