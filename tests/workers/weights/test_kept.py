"""The copy that a taker keeps: it has what was written, nothing else, and no name."""

import os
import random
from pathlib import Path

import pytest

from penstock.workers.errors import ModelError
from penstock.workers.weights.kept import Kept
from penstock.workers.weights.runs import Run


def test_stretches_grow_together(tmp_path: Path) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        kept, here = Kept(str(tmp_path), 200), [False] * 200
        for _ in range(30):
            begin = chance.randrange(190)
            run = Run(begin, chance.randrange(1, 10))
            kept.write(run, memoryview(bytes([seed]) * run.length))
            here[run.begin : run.end] = [True] * run.length
            for _ in range(20):
                first, last = sorted(chance.sample(range(201), 2))
                assert kept.has(Run(first, last - first)) == all(here[first:last])
        os.close(kept.descriptor)


def test_columns_are_here_for_who_asks_the_same(tmp_path: Path) -> None:
    kept, columns = Kept(str(tmp_path), 100), Run(10, 2, 10, 4)
    kept.write(columns, memoryview(b"aabbccdd"))
    assert os.pread(kept.descriptor, 34, 8) == b"\0\0aa" + b"".join(b"\0" * 8 + pair for pair in (b"bb", b"cc", b"dd"))
    assert kept.has(columns)
    assert not kept.has(Run(10, 2, 10, 3))
    kept.write(Run(0, 50), memoryview(bytes(50)))
    assert kept.has(Run(10, 2, 10, 3)), "all of it lies within a stretch that is here"
    assert list(tmp_path.iterdir()) == []
    os.close(kept.descriptor)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    kept = Kept(str(tmp_path), 100)
    os.close(kept.descriptor)
    kept.descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(ModelError, match=r"weights.copy_dir.*No space left"):
        kept.write(Run(0, 1), memoryview(b"a"))
    assert not kept.has(Run(0, 1))
    os.close(kept.descriptor)
