"""The bucket table: the usual sizes, those of the settings, and the bucket of a step."""

import pytest

from penstock.workers.graphs.buckets import BucketTable


def test_the_usual_sizes():
    sizes = BucketTable.of((), 256).sizes
    assert sizes[:6] == (1, 2, 4, 8, 16, 24)
    assert sizes[-1] == 256
    assert len(sizes) == 35


@pytest.mark.parametrize(
    ("given", "most", "sizes"),
    [
        ((), 1, (1,)),
        ((), 20, (1, 2, 4, 8, 16, 20)),
        ((), 512, BucketTable.of((), 256).sizes),
        ((64, 16, 16), 128, (16, 64)),
        ((64,), 32, (32,)),
        ((), 0, (0,)[:0]),
    ],
)
def test_sizes_within_the_most_rows(given, most, sizes):
    assert BucketTable.of(given, most).sizes == sizes


def test_the_bucket_of_a_step():
    table = BucketTable.of((), 40)
    assert [table.bucket_for(rows) for rows in (0, 1, 3, 8, 9, 40, 41)] == [None, 1, 4, 8, 16, 40, None]
    for rows in range(1, 41):
        bucket = table.bucket_for(rows)
        assert bucket is not None
        assert rows <= bucket <= max(2 * rows, rows + 7)
    assert BucketTable(()).bucket_for(1) is None
    assert (BucketTable(()).largest, table.largest) == (0, 40)
