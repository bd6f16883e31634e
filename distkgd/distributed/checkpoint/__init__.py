"""Checkpoints and tables on disk: rows, not ranks."""
