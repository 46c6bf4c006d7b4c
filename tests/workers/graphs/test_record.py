"""The start-up record: round trip, every stale key part, and files that are none."""

import dataclasses
import json
import logging

import pytest

from penstock.workers.graphs.record import RecordKey, StartRecord, read_record, write_record
from penstock.workers.graphs.traffic import BucketFigures

KEY = RecordKey(
    "abc123",
    "NVIDIA H100 80GB",
    "550.54.15",
    (("torch", "2.13.0"), ("triton", "3.6.0")),
    "f" * 32,
    0.9,
    (256, 2048, 256),
)
RECORD = StartRecord(
    KEY,
    1234,
    5678,
    {8: BucketFigures(100, 0.01, 0.002), 16: BucketFigures(1, 0.02, None)},
    {"paged_decode": {"num_warps": 4}},
)
OTHERS = {
    "model": "abc124",
    "device": "NVIDIA H200",
    "driver": "560.1",
    "libraries": (("torch", "2.13.1"), ("triton", "3.6.0")),
    "layout_id": "e" * 32,
    "utilization": 0.8,
    "limits": (256, 4096, 256),
}


def test_round_trip(tmp_path):
    assert write_record(tmp_path / "new" / "folder", RECORD)
    found = read_record(tmp_path / "new" / "folder", KEY)
    assert found is not None
    assert dataclasses.asdict(found) == dataclasses.asdict(RECORD)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["abc123-NVIDIA-H100-80GB.json"]


def test_none_is_there(tmp_path):
    assert read_record(tmp_path, KEY) is None
    assert read_record(tmp_path / "nowhere", KEY) is None


def test_every_part_of_the_key_is_tried():
    assert set(OTHERS) == {part.name for part in dataclasses.fields(RecordKey)}


@pytest.mark.parametrize("part", OTHERS)
def test_a_stale_record_is_ignored_and_the_part_is_named(tmp_path, part, caplog):
    write_record(tmp_path, RECORD)
    key = dataclasses.replace(KEY, **{part: OTHERS[part]})
    (tmp_path / KEY.file_name).rename(tmp_path / key.file_name)  # even under the other's name
    with caplog.at_level(logging.INFO):
        assert read_record(tmp_path, key) is None
    assert f"{part} differs" in caplog.text


def damage(**changes):
    raw = json.loads(json.dumps({"format": 1, **dataclasses.asdict(RECORD)}))
    return json.dumps({**raw, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '"text"',
        "[" * 5000,
        damage(format=2),
        damage(key={}),
        damage(key=None),
        damage(num_blocks=-1),
        damage(num_blocks="12"),
        damage(num_blocks=True),
        damage(step_bytes=1.5),
        damage(traffic=[]),
        damage(traffic={"8": {"steps": 1}}),
        damage(traffic={"8": {"steps": -1, "eager_s": None, "replay_s": None}}),
        damage(traffic={"8": {"steps": float("inf"), "eager_s": None, "replay_s": None}}),
        damage(traffic={"-8": {"steps": 1, "eager_s": None, "replay_s": None}}),
        damage(traffic={str(n): {"steps": 1, "eager_s": None, "replay_s": None} for n in range(5000)}),
        damage(tuned={"a": 3}),
        "x" * (2 << 20),
    ],
)
def test_what_is_no_record_is_ignored(tmp_path, text, caplog):
    (tmp_path / KEY.file_name).write_text(text)
    assert read_record(tmp_path, KEY) is None
    assert "is ignored" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not write_record(blocked, RECORD)
    assert "cannot be written" in caplog.text


def test_a_writer_replaces_the_whole(tmp_path):
    write_record(tmp_path, RECORD)
    write_record(tmp_path, dataclasses.replace(RECORD, num_blocks=7))
    found = read_record(tmp_path, KEY)
    assert found is not None
    assert found.num_blocks == 7
    assert len(list(tmp_path.iterdir())) == 1
