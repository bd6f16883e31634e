"""A whole run: its config, its stages, their order."""
