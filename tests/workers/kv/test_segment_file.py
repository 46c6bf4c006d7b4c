import os
from pathlib import Path

import pytest

from penstock.workers.errors import WireError
from penstock.workers.kv.segment_file import Segment, read_block, read_head, write_segment

LAYOUT = b"m" * 32
SIZE = 96
BLOCKS = [(bytes([number]) * 32, bytes(range(number, number + SIZE))) for number in range(5)]


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    return write_segment(tmp_path / "0.kv", LAYOUT, BLOCKS)


def read_all(path: Path) -> list[tuple[bytes, bytes] | None]:
    """Every block that can be read, None for the others. Raises WireError where there is no segment."""
    segment = read_head(path, LAYOUT, SIZE)
    found: list[tuple[bytes, bytes] | None] = []
    for place, digest in enumerate(segment.digests):
        try:
            found.append((digest, read_block(segment, place)))
        except WireError:
            found.append(None)
    return found


def test_what_was_written_is_read(segment: Segment) -> None:
    assert read_head(segment.path, LAYOUT, SIZE) == segment
    assert read_all(segment.path) == BLOCKS
    assert segment.size == segment.path.stat().st_size
    assert [path.name for path in segment.path.parent.iterdir()] == ["0.kv"]


def test_one_wrong_byte_anywhere_is_never_read_as_a_block(segment: Segment) -> None:
    whole = segment.path.read_bytes()
    misses = 0
    for at in range(len(whole)):
        segment.path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            found = read_all(segment.path)
        except WireError:
            misses += 1
            continue
        assert found.count(None) == 1
        assert [block for block in found if block is not None] == [
            block for block, other in zip(BLOCKS, found, strict=True) if other is not None
        ]
        misses += 1
    assert misses == len(whole)


def test_a_file_cut_anywhere_is_no_segment(segment: Segment) -> None:
    whole = segment.path.read_bytes()
    for length in range(len(whole)):
        segment.path.write_bytes(whole[:length])
        with pytest.raises(WireError):
            read_head(segment.path, LAYOUT, SIZE)
        os.truncate(segment.path, 0)
    segment.path.write_bytes(whole + b"x")
    with pytest.raises(WireError, match="cut short"):
        read_head(segment.path, LAYOUT, SIZE)


def test_blocks_of_another_model_or_size_are_refused(segment: Segment) -> None:
    with pytest.raises(WireError, match="of this model"):
        read_head(segment.path, b"n" * 32, SIZE)
    with pytest.raises(WireError, match="of this model"):
        read_head(segment.path, LAYOUT, SIZE * 2)


def test_a_block_is_not_taken_for_its_neighbour(segment: Segment) -> None:
    """The bytes are those of a block that was written, but not of the one that is asked for."""
    whole = bytearray(segment.path.read_bytes())
    first = len(whole) - 5 * SIZE
    whole[first : first + SIZE] = BLOCKS[1][1]
    segment.path.write_bytes(whole)
    assert read_all(segment.path) == [None, *BLOCKS[1:]]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_segment(tmp_path / "0.kv", LAYOUT, BLOCKS)
    assert list(tmp_path.iterdir()) == []
