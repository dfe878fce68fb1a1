"""The agent's service on the system bus, and its client."""
