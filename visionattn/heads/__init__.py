"""Heads: modules that turn the maps of a backbone, or an image, into a task's output."""
