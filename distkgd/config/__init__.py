"""Typed config nodes: fields, overrides, the stage."""
