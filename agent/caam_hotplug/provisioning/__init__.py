"""Provisioning and migrating media: first a plan, then the act."""
