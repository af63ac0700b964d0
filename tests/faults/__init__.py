"""Fault injection: small runs that are killed, stopped, starved and damaged."""
