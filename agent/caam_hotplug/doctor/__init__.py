"""Why it does not work on this board: everything the agent needs, looked at one by one."""
