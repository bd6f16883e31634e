"""The launchers: parse, build, call."""
