"""Start the program: `python3 measure COMMAND`, beside the directory `measure`."""

import sys
from pathlib import Path

if not __package__:
    # Python puts this directory on its path, and the imports need the one above it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from measure import command_line

sys.exit(command_line.main())
