from __future__ import annotations

import subprocess
import sys


def test_a_process_that_refuses_huge_pages_gets_none() -> None:
    program = (
        "from caam_hotplug.kernel import memory; memory.refuse_huge_pages(); "
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "\nTHP_enabled:\t0\n" in done.stdout
