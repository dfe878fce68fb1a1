"""The test bed: a Debian guest with a simulated CAAM, restored from a saved state for each test."""
