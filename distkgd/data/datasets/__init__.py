"""Data sets by name: public ones, Python's standard library, made ones."""
