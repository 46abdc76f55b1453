"""Adapters that make the backbones usable in other frameworks."""
