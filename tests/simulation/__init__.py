"""Deterministic simulation: the real service and adapter over a client library and a cluster that are simulated."""
