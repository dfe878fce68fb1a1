"""The journal and the notifications to the service manager."""
