"""Replay: exact accounting of plans on traces, and the comparison of strategies on held-out requests."""
