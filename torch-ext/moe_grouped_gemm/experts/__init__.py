"""The layer on a GPU, whatever its weights: forward.py and backward.py ask weights/ for the GEMMs, ops.py makes torch
ops of them. Gates and norms that are not ours, and adapters on a CPU, are composed of the ops in blocks.py."""
