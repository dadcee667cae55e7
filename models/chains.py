"""Loops over time for programs of both libraries: NumPyro's `scan`, and a Python loop that numbers the sites in Pyro."""


def scan_in_numpyro(step, carry, xs):
    """Run `step(name, carry, x) -> (carry, y)` over the leading dimension of the arrays xs; return the last carry and the ys."""
    from numpyro.contrib.control_flow import scan

    return scan(lambda carry, x: step(lambda site: site, carry, x), carry, xs)


def loop_in_pyro(step, carry, xs, times=range):
    """Do the same with sites `z_0`, `z_1`, … in the place of `z`."""
    import torch

    ys = []
    for t in times(len(xs[0])):
        carry, y = step(lambda site, t=t: f"{site}_{t}", carry, tuple(x[t] for x in xs))
        ys.append(y)
    return carry, None if ys[0] is None else torch.stack(ys)


def markov_in_pyro(step, carry, xs):
    """Do the same where a step reads no draw but the one before it: a chain that is summed out, as `scan` sums it."""
    import pyro

    return loop_in_pyro(step, carry, xs, lambda length: pyro.markov(range(length)))
