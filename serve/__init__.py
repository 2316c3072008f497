"""Checkpoint -> robot."""
