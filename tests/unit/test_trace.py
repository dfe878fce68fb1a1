"""The timeline that `run --trace` writes."""

from __future__ import annotations

import json
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug import trace


def events(file: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(file.read_text()) if event]


def test_what_is_done_is_in_the_file_with_its_thread_and_how_long_it_took(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    begun = time.monotonic()
    with trace.written_to(file), trace.span("mount", volume="9-1"):
        pass
    ended = time.monotonic()
    (span,) = [event for event in events(file) if event["name"] == "mount"]
    assert (span["ph"], span["args"]) == ("X", {"volume": "9-1"})
    assert begun * 1e6 <= span["ts"] <= span["ts"] + span["dur"] <= ended * 1e6
    names = [event["args"]["name"] for event in events(file) if event["ph"] == "M"]
    assert names == [threading.current_thread().name]


def test_steps_of_several_volumes_overlap_on_lines_of_their_own(tmp_path: Path) -> None:
    with trace.written_to(tmp_path / "trace"):
        first, second = trace.step("mount", "9-1"), trace.step("mount", "10-1")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
    steps = [(e["ph"], e["id"]) for e in events(tmp_path / "trace") if e.get("cat") == "step"]
    assert steps == [("b", "9-1"), ("b", "10-1"), ("e", "9-1"), ("e", "10-1")]


def test_the_start_is_in_it_and_every_module_that_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_of_a_test.py").write_text("import this_is_part_of_it\n")
    (tmp_path / "this_is_part_of_it.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with trace.written_to(tmp_path / "trace"):
        import a_module_of_a_test  # type: ignore[import-not-found]  # noqa: F401
    told = {event["name"]: event for event in events(tmp_path / "trace")}
    outer, inner = told["import a_module_of_a_test"], told["import this_is_part_of_it"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert told["start Python"]["ts"] <= time.monotonic() * 1e6


def test_without_a_file_nothing_is_noted_and_no_import_is_watched() -> None:
    assert trace.span("mount") is trace.step("mount", "9-1")
    assert not [finder for finder in sys.meta_path if isinstance(finder, trace._Imports)]


def test_a_file_whose_writer_was_killed_can_be_closed_by_a_reader(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with trace.written_to(file):
        trace.mark("plugged")
        trace._running[0].write()
        cut = file.read_text()
    assert json.loads(f"{cut.rstrip().rstrip(',')}]")[-1]["name"] == "plugged"


def test_the_file_is_a_new_one_and_the_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with trace.written_to(file):
        pass
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for there in (file, tmp_path / "link"):
        with pytest.raises(FileExistsError), trace.written_to(there):
            pass
