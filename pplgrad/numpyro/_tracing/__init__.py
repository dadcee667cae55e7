"""From a NumPyro program to sites, costs, and what each of them depends on."""
