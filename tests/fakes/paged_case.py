"""A random paged KV storage and a ragged batch over it."""

from __future__ import annotations

import numpy as np
import torch

from penstock.kernels.ragged import RaggedBatch


class PagedCase:
    """A storage [B, L, C, H, P, D] and a batch whose tables name distinct, shuffled blocks; C = 1 for latent rows."""

    def __init__(self, rows, *, heads=2, group=3, dim=16, slots=4, layers=2, dtype=torch.float32, seed=0, parts=2):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        starts, counts = np.array(rows, np.int32).T
        widths = -(-(starts + counts) // slots)
        num_blocks = int(widths.sum()) + 3
        order = rng.permutation(num_blocks).astype(np.int32)
        self.tables = np.zeros((len(rows), int(widths.max()) + 1), np.int32)
        for row, width in enumerate(widths):
            self.tables[row, :width], order = order[:width], order[width:]
        self.unused = order
        self.batch = RaggedBatch(starts.copy(), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), self.tables)
        self.kv = torch.randn(num_blocks, layers, parts, heads, slots, dim).to(dtype)
        self.q = torch.randn(self.batch.num_tokens, heads * group, dim).to(dtype)
        self.new = torch.randn(self.batch.num_tokens, parts, heads, dim).to(dtype)
