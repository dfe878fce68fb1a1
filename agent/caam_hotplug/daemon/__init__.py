"""The agent as a whole: start, events, one lifecycle per volume, stop."""
