"""The plan that provisions a partition of a disk in use, and its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import shown
from caam_hotplug.formats import blobs
from caam_hotplug.kernel.table_entry import TableEntry
from caam_hotplug.model import Volume
from caam_hotplug.provisioning import partition_record, rule_file
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.partition_record import Record
from caam_hotplug.provisioning.provision_stage import FoundKeys


@dataclass(frozen=True, slots=True)
class Anew:
    """No earlier run is gone on with."""


@dataclass(frozen=True, slots=True)
class Begun:
    """An earlier run has begun, and its record says with which key."""

    record: Record
    is_formatted: bool
    """Whether the filesystem is whole, under the record's key."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The partition was made before."""

    blob: blobs.Blob


Stage = Anew | Begun | Finished


def erases(stage: Stage) -> bool:
    """Whether a run that goes on from there writes to the partition itself."""
    match stage:
        case Begun(is_formatted=is_formatted):
            return not is_formatted
    return isinstance(stage, Anew)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionPlan:
    """The steps to take, and everything that they rely on."""

    options: ProvisionOptions
    blob_directory: Path
    volume: Volume
    entry: TableEntry
    stage: Stage
    content: str | None
    """What would be erased. None if the partition reads as blank."""
    keys: FoundKeys
    rule: rule_file.RulePlan
    has_label: bool
    """Whether the table has room for the label."""
    notes: tuple[str, ...]
    """What the user is to know before anything is done."""

    @property
    def blob_file(self) -> Path:
        """The path of the partition's blob."""
        return self.blob_directory / self.options.blob_name

    @property
    def record_file(self) -> Path:
        """The path of the record of what is not finished."""
        return partition_record.file(self.blob_directory, self.options.blob_name)

    @property
    def erases(self) -> bool:
        """Whether the partition itself is written to, and not just its entry in the table."""
        return erases(self.stage)

    def lines(self) -> Iterator[str]:
        """Yield the plan as text: a heading, then the steps."""
        name = f"{self.volume.node}: {self.options.label}"
        match self.stage:
            case Anew():
                yield f"{name} would be made in these steps:"
            case Begun():
                yield f"{name} was begun before, and would be finished in these steps:"
            case Finished():
                yield f"{name} was made before; its key is in {self.blob_file}. Steps:"
        for step in self._steps():
            yield f"- {step}"

    def _steps(self) -> Iterator[str]:
        options, stage = self.options, self.stage
        if isinstance(stage, Anew):
            yield from self._key_steps()
        if self.erases:
            found = "looks blank" if self.content is None else f"holds {self.content}"
            yield f"erase {self.volume.node}, which {found}"
            label = f" and the label {options.label}" if self.has_label else ""
            yield f"give it the partition type of one that is not finished{label}"
            yield (
                f"make the filesystem {options.filesystem}, encrypted with {options.cipher} in "
                f"sectors of {options.rule.crypt.sector_size} bytes"
            )
        if self.erases or not self.keys.blob.exists:
            yield f"write {self.blob_file}"
        rule = self.rule.step()
        if rule is not None:
            yield rule
        if options.rule_file is not None:
            yield "have a running agent read the rules"
        if not isinstance(stage, Finished):
            yield "write the type of Linux data to its entry in the partition table"
            yield f"remove {self.record_file}"

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
        kind = blobs.key_of(options.method.backend)
        yield f"seal the key as {kind}, and write it to {self.record_file}"
