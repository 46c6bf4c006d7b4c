"""Shared by all tests: fakes are importable as `fakes.<name>`."""

import sys
from pathlib import Path

# Python 3.11 miscounts its parser's depth after some failures, and then cannot parse another module: what pytest's
# plugins import late is imported here, so that a failed test shows its own reason.
import hypothesis  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
