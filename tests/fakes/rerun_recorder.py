"""Stands in for CUDA graphs on the CPU: a replay runs the same work again, over the same buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.workers.graphs.capture import Work


@dataclass
class Rerun:
    """A recording; `replays` counts."""

    work: Work
    replays: int = 0

    def replay(self) -> None:
        """Run the work."""
        self.replays += 1
        self.work()


@dataclass
class RerunRecorder:
    """Records by running once; with `failing`, raises as torch does for work that cannot be recorded."""

    failing: bool = False
    recordings: list[Rerun] = field(default_factory=list)

    def record(self, work: Work) -> Rerun:
        """See `Recorder.record`."""
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        self.recordings.append(Rerun(work))
        return self.recordings[-1]
