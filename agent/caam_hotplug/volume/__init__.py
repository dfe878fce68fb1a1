"""One volume, from arrival to departure: key, mapping, mount, release."""
