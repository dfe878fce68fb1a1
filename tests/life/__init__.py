"""Lives over a fake kernel, and the proof that it is like the real one."""
