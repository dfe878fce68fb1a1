"""Bytes and texts that others read or write, no I/O."""
