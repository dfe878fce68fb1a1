"""Number of inputs that a test tries, and the count of those tried.

`make check` tries the same few hundred each time. `make fuzz`, or HYPOTHESIS_PROFILE=many, tries
20,000 new ones per target. pytest-timeout ends a hang and shows where it was.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROFILES: Final = {
    "check": settings(max_examples=100, derandomize=True, database=None),
    "many": settings(max_examples=20_000),
}
# Not loaded as Hypothesis's own profile: that is one for the whole run, and tests/unit has its own.
PROFILE: Final = os.environ.get("HYPOTHESIS_PROFILE", "check")
_SETTINGS: Final = settings(
    PROFILES[PROFILE],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TRIED: Final[Counter[str]] = Counter()
"""Inputs tried so far, by target."""

INPUT_FILES: Final = Path(tempfile.mkdtemp(prefix="caam-hotplug-fuzz-"))
"""Directory for inputs that must be files. It is no fixture: a test is a function of its input
alone, so that a coverage-guided fuzzer can call it too (tests/fuzz/guided.py)."""
atexit.register(shutil.rmtree, INPUT_FILES, ignore_errors=True)


def tries(target: str, /, **inputs: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Call the test with many inputs, and count them for the target."""

    def decorate(test: Callable[..., None]) -> Any:
        TRIED[target] = 0

        @wraps(test)
        def counted(**values: Any) -> None:
            TRIED[target] += 1
            test(**values)

        return settings(_SETTINGS)(given(**inputs)(counted))

    return decorate


_KEPT: Final = st.sampled_from([b"", b" ", b"\n", b"\0", b"\xff", b"0", b"-1", b"'", b'"', b"\\"])


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Draw a valid input with a few parts replaced, repeated, moved or cut off."""
    content = draw(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 24)))
        match draw(st.sampled_from(["replace", "repeat", "move", "flip", "cut"])):
            case "replace":
                content = content[:start] + draw(_KEPT | st.binary(max_size=8)) + content[end:]
            case "repeat":
                content = (
                    content[:end] + content[start:end] * draw(st.integers(1, 4)) + content[end:]
                )
            case "move":
                to = draw(st.integers(0, len(content)))
                part, rest = content[start:end], content[:start] + content[end:]
                content = rest[:to] + part + rest[to:]
            case "flip" if start < len(content):
                bit = 1 << draw(st.integers(0, 7))
                content = content[:start] + bytes([content[start] ^ bit]) + content[start + 1 :]
            case "cut":
                content = content[:start]
    return content


def put(path: Path, kind: str, content: bytes = b"") -> None:
    """Put a file of this kind at the path, in place of any other."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "file":
            path.write_bytes(content)
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link to itself":
            path.symlink_to(path.name)
        case "link to nowhere":
            path.symlink_to("nowhere")
        case "link to an endless device":
            path.symlink_to("/dev/zero")
        case "link to the file":
            other = path.with_suffix(".real")
            other.write_bytes(content)
            path.symlink_to(other.name)
        case "device":
            # 1:5 is /dev/zero; without the right to make nodes, a link must do.
            try:
                os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
            except PermissionError:
                path.symlink_to("/dev/zero")
        case "nothing":
            pass


KINDS: Final = st.sampled_from(
    [
        "file",
        "directory",
        "fifo",
        "link to itself",
        "link to nowhere",
        "link to an endless device",
        "link to the file",
        "device",
        "nothing",
    ]
)
