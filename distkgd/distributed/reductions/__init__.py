"""Sums over candidates that are spread over ranks."""
