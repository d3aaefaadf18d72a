"""Structures that go as wholes, before the blocks are walked: experts, and whole blocks."""
