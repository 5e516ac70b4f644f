"""Stages as SLURM jobs: how long they take, and the lines for sbatch."""
