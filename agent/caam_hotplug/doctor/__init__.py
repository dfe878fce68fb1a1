"""Why it does not work on this board."""
