"""Timing tile sizes on the GPU that is there, and writing the best ones to files that tuned_files.py finds."""

from .run import tune
