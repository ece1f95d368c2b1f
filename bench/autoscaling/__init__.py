"""Replica-hours and goodput of our autoscaler beside those of the peers, on the same traffic."""
