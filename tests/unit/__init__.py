"""What needs no event loop, no root and no other machine; files mirror the agent's modules."""
