"""Stand-ins for the kernel, kept honest by the contract suite that runs against both."""
