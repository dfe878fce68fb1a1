"""One fuzz test under Atheris, whose inputs follow the branches that earlier ones reached.

    .venv/bin/pip install atheris      # not among the dev packages: large, few platforms
    PYTHONPATH=agent:tests .venv/bin/python -m fuzz.guided \
        test_blobs:test_a_file_is_read_exactly_if_it_has_a_blobs_form -max_total_time=60

All after the test's name goes to libFuzzer. It ends at the first failure, or at its limit.
"""

from __future__ import annotations

import importlib
import sys

import atheris


def main() -> None:
    """Fuzz until a failure or the end of the given time. Does not return."""
    module, _, test = sys.argv.pop(1).partition(":")
    with atheris.instrument_imports(include=["caam_hotplug"]):
        one = getattr(importlib.import_module(f"fuzz.{module}"), test)
    atheris.Setup(sys.argv, one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
