"""Placement files of the engines that serve: write, check, read back. Start at `exporting` and `checking`."""
