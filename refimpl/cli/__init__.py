"""One file per command: parsing, printing, exit codes, nothing else."""
