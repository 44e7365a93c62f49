"""Pruning jobs on tiers, for the agent and for `ckptctl prune`."""
