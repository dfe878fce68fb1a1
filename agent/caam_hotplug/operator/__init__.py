"""The commands that ask the running agent, over D-Bus."""
