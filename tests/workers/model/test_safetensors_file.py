"""Our safetensors reader: the library's files are read alike, and no header gets past the checks."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from penstock.workers.errors import ModelError
from penstock.workers.model import safetensors_header
from penstock.workers.model.safetensors_file import SafetensorsFile


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_reads_what_the_library_writes(tmp_path, dtype):
    tensors = {
        "a": torch.arange(12).view(3, 4).to(dtype),
        "b.c": torch.ones(2).to(dtype),
        "none": torch.empty(0, 3).to(dtype),
    }
    tensors["scalar"] = torch.tensor(1).to(dtype)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor)
        assert file.read(name).dtype == dtype


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    SafetensorsFile(path).read("a").zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header: "),
        (b"[]", b"", "header is not an object"),
        (b'{"a": 1, "a": 2}', b"", "the same key stands twice"),
        (b"[" * 100_000, b"", "header: "),
        ({"a": entry(end=12)}, bytes(8), "a: data_offsets \\[0, 12\\] are not inside"),
        ({"a": entry(begin=8, end=0)}, bytes(8), "a: data_offsets"),
        ({"a": entry(begin=-8, end=0)}, bytes(8), "a: data_offsets"),
        ({"a": entry(shape=(3,))}, bytes(8), "a: shape and dtype make 12 bytes, data_offsets 8"),
        ({"a": entry(shape=(2**61, 8, 2**61), end=0)}, bytes(8), "a: shape is beyond"),
        ({"a": entry(shape=(0, 3, 2**62 - 1), end=0)}, b"", "a: shape is beyond"),
        ({"a": entry(shape=(2**63,), end=0)}, bytes(8), "a: shape must be a list"),
        ({"a": entry(shape=(1,) * 9, end=4)}, bytes(4), "a: shape must be a list of at most 8"),
        ({"a": entry(shape=(True, 2))}, bytes(8), "a: shape must be a list"),
        ({"a": entry(dtype="F8")}, bytes(8), "a: dtype 'F8' is not supported"),
        ({"a": entry(dtype=[])}, bytes(8), "a: dtype"),
        ({"a": {**entry(), "x": 1}}, bytes(8), "a: expected exactly"),
        ({"a": 1}, b"", "a: expected exactly"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), "b: overlaps"),
        ({"a": entry(), "b": entry()}, bytes(8), "b: overlaps"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20), "b: leaves a gap"),
        ({"a": entry()}, bytes(12), "tensors end at byte 8 of 12"),
    ],
)
def test_hostile_headers(tmp_path, header, data, message):
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than"),
        (b"\x01\x00", "shorter than"),
        (struct.pack("<Q", 2**63), "above"),
        (struct.pack("<Q", (100 << 20) + 1), "above"),
        (struct.pack("<Q", 1000) + b"{}", "goes past the end"),
    ],
)
def test_hostile_lengths(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_missing_file_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsFile(tmp_path / "absent.safetensors")


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 1)
    path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry(begin=8, end=16)}, bytes(16))
    with pytest.raises(ModelError, match="2 tensors are above 1"):
        SafetensorsFile(path)


def test_the_digest_sees_shapes_and_weights(tmp_path):
    tensors = {"a": torch.zeros(8), "b": torch.zeros(4)}
    digests = []
    for change in ({}, {"b": torch.ones(4)}, {"a": torch.zeros(2, 4)}, {}):
        save_file({**tensors, **change}, tmp_path / "x.safetensors")
        digests.append(SafetensorsFile(tmp_path / "x.safetensors").digest)
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@given(position=st.integers(0, 400), flip=st.integers(1, 255), cut=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_damaged_files_are_refused_or_read_within_bounds(tmp_path_factory, position, flip, cut):
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= flip
    path.write_bytes(data[: len(data) - cut % 40 * (cut % 2)])
    try:
        file = SafetensorsFile(path)
    except ModelError:
        return
    for name, found in file.entries.items():
        assert file.read(name).nbytes == found.end - found.begin
