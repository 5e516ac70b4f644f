"""A run's report, written from its files."""
