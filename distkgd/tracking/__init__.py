"""Trackers of runs: MLflow, or none."""
