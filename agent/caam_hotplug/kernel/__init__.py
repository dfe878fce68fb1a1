"""One C library or kernel interface a module, no policy."""
