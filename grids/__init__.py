"""What the figures need: their cells and settings, jobs here or on SLURM, the report."""
