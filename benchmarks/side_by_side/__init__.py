"""Side-by-side measurements against published packages, as ratios of one run, and beside what the machine could do."""
