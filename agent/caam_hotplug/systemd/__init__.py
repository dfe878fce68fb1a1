"""The journal and the service manager's notifications."""
