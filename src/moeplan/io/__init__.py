"""Bounded, safe readers of files from elsewhere, and atomic writers."""
