"""The units of the service manager that a rule wants told of its volumes."""

from __future__ import annotations

from typing import Protocol


class Units(Protocol):
    """The service manager, as far as a volume's life needs it.

    Neither raises: what a unit does or does not do changes nothing for the volume, and is logged.
    """

    def start(self, unit: str) -> None:
        """The service manager is asked to start the unit; nobody waits for that."""
        ...

    async def finish(self, unit: str, within_s: float) -> None:
        """The unit was started and has come to its end, failed, or had its time."""
        ...
