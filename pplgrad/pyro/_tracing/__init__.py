"""From a Pyro program to sites, costs, and what each of them depends on."""
