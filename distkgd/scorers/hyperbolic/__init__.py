"""Scorers with biases: isometries of Euclidean space and of the Poincaré ball."""
