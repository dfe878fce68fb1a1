"""The timeline that `run --trace` writes."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.daemon import timeline
from caam_hotplug.volume.worker import Observe, Threads, Worker, unobserved


def events(file: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(file.read_text()) if event]


def test_a_call_is_in_the_file_with_its_thread_and_duration(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    begun = time.monotonic()
    with timeline.written_to(file) as written, written.observe("mount"):
        pass
    ended = time.monotonic()
    (span,) = [event for event in events(file) if event["name"] == "mount"]
    assert span["ph"] == "X"
    assert begun * 1e6 <= span["ts"] <= span["ts"] + span["dur"] <= ended * 1e6
    names = [event["args"]["name"] for event in events(file) if event["ph"] == "M"]
    assert names == [threading.current_thread().name]


def test_calls_that_are_waited_for_overlap_on_a_line_for_each_worker(tmp_path: Path) -> None:
    with timeline.written_to(tmp_path / "trace") as written:
        first = written.observe("mount", "volume 9-1")
        second = written.observe("mount", "volume 10-1")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
    waits = [(e["ph"], e["id"]) for e in events(tmp_path / "trace") if e.get("cat") == "waiting"]
    workers = ["volume 9-1", "volume 10-1"]
    assert waits == [(phase, worker) for phase in "be" for worker in workers]


def test_a_worker_reports_its_calls_to_the_observer(tmp_path: Path) -> None:
    async def work(observe: Observe) -> int:
        worker = Worker("volume 9-1", 10.0, Threads(observe=observe))
        return await worker.run("count", int, "7", late=lambda _why: None)

    with timeline.written_to(tmp_path / "trace") as written:
        assert asyncio.run(work(written.observe)) == 7
    seen = [(event["ph"], event["name"]) for event in events(tmp_path / "trace")]
    assert [phase for phase, name in seen if name == "count"] == ["b", "X", "e"]


def test_the_start_is_in_it_and_every_module_that_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_of_a_test.py").write_text("import this_is_part_of_it\n")
    (tmp_path / "this_is_part_of_it.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with timeline.written_to(tmp_path / "trace"):
        import a_module_of_a_test  # type: ignore[import-not-found]  # noqa: F401
    seen = {event["name"]: event for event in events(tmp_path / "trace")}
    outer, inner = seen["import a_module_of_a_test"], seen["import this_is_part_of_it"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert seen["start Python"]["ts"] <= time.monotonic() * 1e6


def test_without_a_file_nothing_is_noted_and_no_import_is_watched() -> None:
    assert unobserved("mount") is unobserved("mount", "volume 9-1")
    assert not [finder for finder in sys.meta_path if isinstance(finder, timeline._Imports)]


def test_a_file_whose_writer_was_killed_can_be_closed_by_a_reader(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with timeline.written_to(file) as written:
        written.note("i", "plugged", time.monotonic())
        written.write()
        cut = file.read_text()
    assert json.loads(f"{cut.rstrip().rstrip(',')}]")[-1]["name"] == "plugged"


def test_the_file_is_a_new_one_and_the_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    with timeline.written_to(file):
        pass
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for there in (file, tmp_path / "link"):
        with pytest.raises(FileExistsError), timeline.written_to(there):
            pass
