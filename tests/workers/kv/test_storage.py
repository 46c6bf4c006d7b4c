"""The shared memory file: layout, attaching, hostile headers, nothing left behind."""

import os
import subprocess
import sys

import numpy as np
import pytest

from penstock.workers.errors import ConfigError, WireError
from penstock.workers.kv import storage as storage_module
from penstock.workers.kv.storage import KVStorage, available_bytes


def test_attached_storage_sees_writes_and_cannot_write():
    owner = KVStorage.create(10, 96)
    reader = KVStorage.attach(owner.path)
    assert owner.data.shape == (10, 96)
    assert not owner.data.any()
    owner.data[3] = 7
    owner.generations[2] += np.uint64(5)
    assert (reader.data[3] == 7).all()
    assert reader.generations.tolist() == [0, 0, 5, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        reader.data[0, 0] = 1
    reader.close()
    owner.close()
    owner.close()


def test_data_starts_on_a_cache_line():
    for blocks in (1, 7, 8, 9):
        owner = KVStorage.create(blocks, 48)
        assert owner.data.ctypes.data % 64 == 0
        owner.close()


def test_another_process_can_attach_and_nothing_stays_after_the_owner():
    owner = KVStorage.create(4, 64)
    owner.data[2] = 9
    code = (
        "import sys; from penstock.workers.kv.storage import KVStorage\n"
        "print(int(KVStorage.attach(sys.argv[1]).data[2].sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code, owner.path], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(9 * 64), done.stderr
    path = owner.path
    owner.close()
    with pytest.raises(FileNotFoundError):
        KVStorage.attach(path)


def test_size_is_sealed():
    owner = KVStorage.create(4, 64)
    with pytest.raises(PermissionError):
        os.truncate(owner.path, 10)
    owner.close()


def test_too_large_a_pool_is_a_config_error():
    with pytest.raises(ConfigError, match="available") as raised:
        KVStorage.create(1 << 20, available_bytes())
    assert raised.value.key == "kv.memory_bytes"


@pytest.mark.parametrize(("blocks", "size"), [(0, 64), (4, 0), (-1, 64)])
def test_an_empty_pool_is_a_config_error(blocks, size):
    with pytest.raises(ConfigError, match="empty"):
        KVStorage.create(blocks, size)


def test_a_full_control_group_counts(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("1000\n")
    used.write_text("400\n")
    names = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    monkeypatch.setattr(storage_module, "Path", lambda name: names.get(name, tmp_path / "absent"))
    assert available_bytes() == 600


def _memory_file(content: bytes, size: int, seal: bool = True) -> int:
    import fcntl

    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, content, 0)
    if seal:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def _header(magic: bytes, *numbers: int) -> bytes:
    return magic + b"".join(number.to_bytes(8, "little") for number in numbers)


@pytest.mark.parametrize(
    ("content", "size", "seal"),
    [
        (b"", 0, True),
        (_header(b"NOTKV001", 1, 64, 128), 192, True),
        (_header(b"PSTKKV01", 1 << 60, 64, 128), 192, True),
        (_header(b"PSTKKV01", 1, 64, 64), 192, True),
        (_header(b"PSTKKV01", 2, 64, 128), 192, True),
        (_header(b"PSTKKV01", 1, 64, 128), 192, False),
    ],
)
def test_a_hostile_file_is_refused(content, size, seal):
    descriptor = _memory_file(content, size, seal)
    with pytest.raises(WireError, match="no KV storage"):
        KVStorage.attach(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def test_a_plain_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(_header(b"PSTKKV01", 1, 64, 128) + bytes(160))
    with pytest.raises(WireError, match="not"):
        KVStorage.attach(str(path))


def test_close_spares_views_that_others_hold():
    owner = KVStorage.create(4, 64)
    view = owner.data
    view[1] = 3
    owner.close()
    assert (view[1] == 3).all()
