"""A NumPyro program run again: branches, enumeration, wake-sleep, monitored steps."""
