"""The plan that provisions a medium, and its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import shown
from caam_hotplug.formats import blobs
from caam_hotplug.model import Volume
from caam_hotplug.provisioning import rule_file
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.provision_stage import EarlierRun, FoundKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvisionPlan:
    """The steps to take, and everything that they rely on."""

    options: ProvisionOptions
    blob_directory: Path
    disk: Volume
    earlier: EarlierRun | None
    """The work to go on with. None if the medium is to be made from the beginning."""
    erased_content: str | None
    keys: FoundKeys
    rule: rule_file.RulePlan
    notes: tuple[str, ...]
    """What the user is to know before anything is done."""

    @property
    def blob_file(self) -> Path:
        """The path of the medium's blob."""
        return self.blob_directory / self.options.blob_name

    def lines(self) -> Iterator[str]:
        """Yield the plan as text: a heading, then the steps."""
        medium = f"{self.disk.node}: {self.options.label}"
        if self.earlier is None:
            yield f"{medium} would be made in these steps:"
        elif self.earlier.is_finished:
            yield f"{medium} was made before; its key is in {self.blob_file}. Steps:"
        else:
            yield f"{medium} was begun before, and would be finished in these steps:"
        for step in self._steps():
            yield f"- {step}"

    def _steps(self) -> Iterator[str]:
        options, crypt = self.options, self.options.rule.crypt
        if self.earlier is None:
            yield from self._key_steps()
            content = self.erased_content
            found = "looks blank" if content is None else f"holds {content}"
            yield f"erase {self.disk.node}, which {found}"
            yield "write a partition table with one partition, marked as not finished"
        if self.earlier is None or not self.earlier.is_finished:
            yield (
                f"make the filesystem {options.filesystem}, encrypted with {options.cipher} in "
                f"sectors of {crypt.sector_size} bytes"
            )
        rule = self.rule.step()
        if rule is not None:
            yield rule
        if options.rule_file is not None:
            yield "have a running agent read the rules"
        yield f"write the label {options.label} to the partition table"

    def _key_steps(self) -> Iterator[str]:
        options, file = self.options, self.options.recovery_file
        if file is None:
            yield f"make a key of {options.key_bytes} bytes"
        elif self.keys.recovery is None:
            yield f"make a key of {options.key_bytes} bytes, and write it to {shown(file)}"
        else:
            yield f"read the key from {shown(file)}"
        if self.keys.blob.is_unsettled:
            yield f"remove {self.blob_file}, which an interrupted run made for no medium"
        yield f"seal the key as {blobs.key_of(options.method.backend)}, and write {self.blob_file}"
