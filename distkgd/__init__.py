"""Distil large knowledge-graph-embedding models into small ones, sharded over ranks."""

__version__ = "0.1.0"
