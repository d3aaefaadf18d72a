"""Weights without their zeros."""
