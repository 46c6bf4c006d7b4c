"""Captured steps: a decode step of a given number of rows is recorded once and replayed without launching kernels."""
