"""Makes demonstrations in simulators with scripted experts, and carries them out again."""
