"""Keys: sealed, stored, loaded into the kernel."""
