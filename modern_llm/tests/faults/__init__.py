"""Faults injected into real training processes, and the table of what became of them."""
