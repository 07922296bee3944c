"""Serving over time: requests of a trace as they arrive, under several policies."""
