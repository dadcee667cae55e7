"""A Pyro program run again: branches, enumeration, wake-sleep, monitored steps."""
