"""Seeded synthetic workloads and their presets."""
