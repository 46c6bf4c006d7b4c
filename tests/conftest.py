"""Shared by all tests: fakes are importable as `fakes.<name>`."""

import os
import sys
from pathlib import Path

# Python 3.11 miscounts its parser's depth after some failures, and then cannot parse another module: what pytest's
# plugins import late is imported here, so that a failed test shows its own reason.
import grpc.aio
import hypothesis  # noqa: F401

# Without a card Triton's interpreter runs the GPU kernels. Triton reads this once, when the first of transformers,
# torch's compiler or a test imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))

# Whichever test's garbage holds grpc's last server would take grpc's own thread down with it, from wherever it is
# collected, and may wait for that thread for ever. A reference of ours lets it stay, as it does in a real process.
grpc.aio.init_grpc_aio()
