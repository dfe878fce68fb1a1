"""Inputs from an attacker or from accident: each is read, or refused with a reason."""
