"""Batched evaluation of a traced program. Everything works without this package (`fuse=False`)."""
