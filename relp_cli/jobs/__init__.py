"""Batch jobs: a grid of cells, and the processes and machines that share them."""
