"""Sums over coordinates, in bounded memory."""
