"""The disk tier and what goes wrong on disks. A full one is a real small tmpfs where the tests may mount one."""

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from penstock.workers.kv import disk_tier, segment_file
from penstock.workers.kv.disk_tier import DiskTier

SIZE = 4096


def digest(number: int) -> bytes:
    return number.to_bytes(32, "little")


def blocks(*numbers: int) -> list[tuple[bytes, bytes]]:
    return [(digest(number), number.to_bytes(2, "little") * (SIZE // 2)) for number in numbers]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def opened(root: Path, disk_bytes: int = 1 << 30, model: str = "model", clock: Clock | None = None) -> DiskTier:
    tier = DiskTier(root, model, SIZE, disk_bytes, lambda _: None, clock or Clock())
    tier.open()
    return tier


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_blocks_outlive_the_worker(tmp_path: Path) -> None:
    before = descriptors()
    with closing(opened(tmp_path)) as tier:
        assert tier.write(blocks(1, 2))
        assert tier.write(blocks(3))
        assert tier.written == 3 * SIZE
    heard: list[bytes] = []
    again = DiskTier(tmp_path, "model", SIZE, 1 << 30, heard.append)
    again.open()
    assert sorted(b"".join(heard)[at : at + 32] for at in (0, 32, 64)) == sorted(digest(n) for n in (1, 2, 3))
    assert [again.read(digest(number)) for number in (1, 2, 3)] == [data for _, data in blocks(1, 2, 3)]
    assert again.read(digest(4)) is None
    assert again.write(blocks(5))
    again.close()
    assert again.errors == 0
    assert descriptors() == before


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    heard: list[bytes] = []
    tier = DiskTier(tmp_path, "model", SIZE, 3 * (SIZE + 256), heard.append)
    tier.open()
    for number in (1, 2, 3):
        assert tier.write(blocks(number))
    assert tier.read(digest(1)) is not None
    assert tier.write(blocks(4))
    assert [number for number in range(1, 5) if digest(number) in tier] == [1, 3, 4]
    assert tier.evictions == 1
    assert heard[-2:] == [digest(2), digest(4)]
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))
    assert size <= 3 * (SIZE + 256)
    tier.close()
    smaller = opened(tmp_path, 2 * (SIZE + 256))
    assert [number for number in range(1, 5) if digest(number) in smaller] == [3, 4], "the newest stay"
    assert len(list(tmp_path.rglob("*.kv"))) == 2
    smaller.close()


def test_two_workers_of_one_model_share_nothing_and_others_models_rests_go(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.write(blocks(1))
    second.write(blocks(2))
    assert digest(2) not in first
    stranger = opened(tmp_path, model="another model")
    assert digest(1) not in stranger
    assert stranger.write(blocks(3))
    assert len(list(tmp_path.iterdir())) == 3, "what running workers hold stays"
    stranger.close()
    second.close()
    third = opened(tmp_path)
    assert digest(2) in third
    assert len(list(tmp_path.iterdir())) == 2, "nobody serves the other model any more"
    first.close()
    third.close()


def test_files_that_are_no_segments_are_removed_at_the_start(tmp_path: Path) -> None:
    with closing(opened(tmp_path)) as tier:
        tier.write(blocks(1))
        tier.write(blocks(2))
    directory = next(tmp_path.iterdir())
    damaged = min(directory.glob("*.kv"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (directory / "00000000000000ff.part").write_bytes(b"half")
    (directory / "00000000000000fe.kv").write_bytes(b"nothing")
    with closing(opened(tmp_path)) as again:
        assert digest(1) not in again
        assert again.read(digest(2)) == blocks(2)[0][1]
        assert len(list(directory.glob("*"))) == 2  # one segment and the lock
        assert again.write(blocks(3)), "numbers go on behind all that were there"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = shutil.which("mount")
    if (
        os.geteuid()
        or mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("a tmpfs cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tier = opened(small_disk, clock=clock)
    wrote = [tier.write(blocks(*range(number, number + 40))) for number in range(0, 400, 40)]
    assert wrote == [True] * wrote.count(True) + [False] * wrote.count(False)
    assert 0 < wrote.count(True) < 10
    assert tier.errors == 1, "after the first failure none is tried"
    kept = 40 * wrote.count(True)
    assert [tier.read(digest(number)) for number in range(kept)] == [data for _, data in blocks(*range(kept))]
    assert list(small_disk.rglob("*.part")) == []
    clock.now = 61.0
    assert not tier.write(blocks(*range(500, 540)))
    assert tier.errors == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "one clear line"
    assert "No space left" in caplog.text
    for path in small_disk.rglob("*.kv"):
        path.unlink()
    clock.now = 122.0
    assert tier.write(blocks(1000)), "the tier serves again once there is room"
    assert tier.read(digest(0)) is None
    tier.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = opened(tmp_path)
    assert tier.write(blocks(1, 2))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(segment_file.os, "write", refuse)
        assert not tier.write(blocks(3))
    assert tier.read(digest(1)) is not None
    with monkeypatch.context() as patched:
        patched.setattr(segment_file.os, "pread", refuse)
        assert tier.read(digest(1)) is None
    assert digest(1) not in tier
    assert digest(2) not in tier, "the file goes as a whole"
    assert tier.errors == 2
    assert len(caplog.records) == 1
    tier.close()


def test_the_directory_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "kv"
    tier = opened(root)
    assert tier.write(blocks(1))
    shutil.rmtree(root)
    assert tier.read(digest(1)) is None
    assert not tier.write(blocks(2))
    assert tier.errors == 2
    assert len(caplog.records) == 1
    tier.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    tier = opened(tmp_path / "file" / "below")
    assert not tier.write(blocks(1))
    assert tier.read(digest(1)) is None
    assert tier.errors == 1
    assert len(caplog.records) == 1
    tier.close()


def test_damage_is_a_miss(tmp_path: Path) -> None:
    for at in range(0, 3 * SIZE, 97):
        root = tmp_path / str(at)
        with closing(opened(root)) as tier:
            tier.write(blocks(1, 2, 3))
            path = next(root.rglob("*.kv"))
            whole = bytearray(path.read_bytes())
            whole[len(whole) - 3 * SIZE + at] ^= 0x10
            path.write_bytes(whole)
            number = 1 + at // SIZE
            others = [other for other in (1, 2, 3) if other != number]
            assert [tier.read(digest(other)) for other in others] == [data for _, data in blocks(*others)]
            assert tier.read(digest(number)) is None
            assert tier.errors == 1
        shutil.rmtree(root)


def test_the_look_at_an_old_directory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(opened(tmp_path)) as tier:
        for number in range(10):
            tier.write(blocks(number))
    clock = Clock()

    def slow(path: Path, layout: bytes, block_bytes: int) -> segment_file.Segment:
        clock.now += 2.0
        return segment_file.read_head(path, layout, block_bytes)

    monkeypatch.setattr(disk_tier, "read_head", slow)
    with closing(opened(tmp_path, clock=clock)) as again:
        assert sorted(number for number in range(10) if digest(number) in again) == [7, 8, 9]
