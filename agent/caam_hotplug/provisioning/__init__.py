"""Making media, and moving them from one kind of key to another."""
