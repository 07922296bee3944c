"""Placement files of the engines that serve: write, check, read back. `files` is the front door."""
