"""The D-Bus service and the commands that ask it, over a real bus of their own."""
