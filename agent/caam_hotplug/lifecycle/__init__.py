"""How a volume lives: what it holds, in which order, and how it lets go."""
