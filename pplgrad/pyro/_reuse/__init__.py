"""When the dependencies of a Pyro program may be used again: guards on the Python state that it reads."""
