"""Ranking, metrics, predictions."""
