"""Shared by all tests: fakes are importable as `fakes.<name>`."""

import os
import sys
from pathlib import Path

# Python 3.11 miscounts its parser's depth after some failures, and then cannot parse another module: what pytest's
# plugins import late is imported here, so that a failed test shows its own reason.
import hypothesis  # noqa: F401

# Without a card Triton's interpreter runs the GPU kernels. Triton reads this once, when the first of transformers,
# torch's compiler or a test imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))
