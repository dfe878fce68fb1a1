"""Inputs of an attacker, and of accident: any of them is read or refused in words."""
