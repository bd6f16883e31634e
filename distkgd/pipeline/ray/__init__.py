"""Plans and sweeps on Ray; the only importer of ray."""
