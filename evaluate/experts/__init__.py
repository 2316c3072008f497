"""Scripted experts that read the simulator: they make demonstrations, label states, and bound what is possible."""
