"""One stage: job, loop, log."""
