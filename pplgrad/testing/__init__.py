"""Proof of estimators: small programs in both libraries, and the expectation of an estimate over all that is random."""
