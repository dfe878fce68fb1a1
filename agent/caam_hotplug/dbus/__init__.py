"""The agent on the system bus, and the client that asks it."""
