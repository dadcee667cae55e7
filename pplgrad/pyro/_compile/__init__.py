"""Compiled training steps. Everything works without this package (`compile=False`)."""
