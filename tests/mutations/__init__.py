"""Seeded faults in the kernels, and whether the tests see them."""
