"""Runs: their configuration, their folder, and what carries them out."""
