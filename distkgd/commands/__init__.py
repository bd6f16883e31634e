"""The subcommands of `distkgd`: what each takes and says; each does its work by a function of the folders below."""
