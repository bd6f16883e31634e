"""Sweeps: many trials on Ray, one table."""
