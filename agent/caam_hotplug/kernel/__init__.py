"""The kernel's interfaces, one module each: synchronous, without policy."""
