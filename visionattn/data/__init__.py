"""Datasets, transforms and samplers; every random choice is a function of (seed, epoch, position)."""
