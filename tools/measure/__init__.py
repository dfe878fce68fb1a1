"""Measurements that the owner of a board takes there."""
