"""Reproducing the paper: every figure as runs on many seeds, with intervals, a verdict and a table.

A figure says which runs it needs, a sweep has them done and keeps each as a file, and what is shown is computed from
the files alone.
"""
