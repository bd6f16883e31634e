"""The doors for torchrun and Ray: each is the subcommand of `distkgd` of its name."""
