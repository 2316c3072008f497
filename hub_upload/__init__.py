"""Checkpoint -> Hub: convert what others wrote, export what was trained, prove it, describe it, upload it."""
