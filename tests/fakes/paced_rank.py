"""A rank that sleeps before every layer of experts, `paced_rank.py SECONDS`, so that few cores hold many ranks."""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor

from penstock.workers import expert_ranks
from penstock.workers.parallel.expert_parallel import ExpertParallel
from penstock.workers.process import main

LAYER_S = float(sys.argv[1])


class PacedExperts(ExpertParallel):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        time.sleep(LAYER_S)
        return super().forward(*args, **kwargs)


if __name__ == "__main__":
    expert_ranks.ExpertParallel = PacedExperts  # type: ignore[misc]
    sys.exit(main())
