"""Unlock and mount encrypted removable media with keys sealed by the NXP CAAM."""

__version__ = "0.1.0"
