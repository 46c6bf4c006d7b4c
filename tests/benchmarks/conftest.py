"""The benchmarks are scripts: what they share is importable from their own folder, here as when they are run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
