"""Custom ops of the `teal` library, one a file. Importing an op's module registers it and does nothing else."""
