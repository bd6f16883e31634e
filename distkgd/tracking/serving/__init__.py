"""Finished models in MLflow's registry and behind its endpoint. MLflow is imported inside functions only."""
