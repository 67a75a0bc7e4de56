"""Chains: how stages are wired, and the plan of one call."""
