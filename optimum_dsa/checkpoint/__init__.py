"""Folders of weights: written, read, converted, described and checked."""
