"""Demonstrations -> adapter or checkpoint."""
