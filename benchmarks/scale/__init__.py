"""Consensus distance and wall time of 16 to 4,096 replicas, computed."""
