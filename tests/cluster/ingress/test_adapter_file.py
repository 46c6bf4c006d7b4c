"""The directory of adapters under those who write to it: several writers, and hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.adapters import listing, make_adapter, problem, replace_file, served, write_list

from penstock.cluster.ingress.adapter_file import FILE_NAME, MAX_ADAPTERS, change_entries, read_entries
from penstock.workers.errors import ConfigError
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from penstock.workers.model.config import DecoderConfig

pytestmark = pytest.mark.timeout(60)


def test_no_file_is_an_empty_list(home: Path) -> None:
    assert read_entries(home) == {}
    assert change_entries(home, lambda entries: entries.update(a="one")) == {"a": "one"}
    assert read_entries(home) == {"a": "one"}


def test_a_change_that_raises_leaves_the_file(home: Path) -> None:
    change_entries(home, lambda entries: entries.update(a="one"))
    before = (home / FILE_NAME).stat()
    with pytest.raises(ZeroDivisionError):
        change_entries(home, lambda entries: entries.update(b=str(1 // 0)))
    assert (home / FILE_NAME).stat() == before


def test_a_full_list(home: Path) -> None:
    write_list(home, {f"n{number}": "one" for number in range(MAX_ADAPTERS)})
    with pytest.raises(ConfigError, match="is full"):
        change_entries(home, lambda entries: entries.update(more="one"))
    assert len(read_entries(home)) == MAX_ADAPTERS


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from penstock.cluster.ingress.adapter_file import change_entries
for turn in range(30):
    change_entries(Path(sys.argv[1]), lambda entries: entries.update({f"n{sys.argv[2]}-{turn}": "one"}))
"""


def test_writers_in_several_processes_lose_no_entry(home: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(home), str(number)]) for number in range(2)]
    assert [writer.wait(50) for writer in writers] == [0, 0]
    assert len(read_entries(home)) == 60


def header(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def entry(**changes: Any) -> bytes:
    text = json.dumps({NAME: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512], **changes}}).encode()
    return header(len(text), text + bytes(512))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (b"", WEIGHTS_FILE),
        (header(1 << 63, b"{}"), WEIGHTS_FILE),
        (header(1 << 40, b"{}"), WEIGHTS_FILE),
        (header(2, b"{}"), "no tensor"),
        (header(4, b"nope"), WEIGHTS_FILE),
        (entry(data_offsets=[0, 1 << 40]), WEIGHTS_FILE),
        (entry(data_offsets=[-512, 0]), WEIGHTS_FILE),
        (entry(shape=[4, 33]), WEIGHTS_FILE),
        (entry(dtype="I8"), WEIGHTS_FILE),
        (entry(), "lora_B is missing"),
    ],
    ids=range(10),
)
def test_hostile_weights_cost_themselves_only(
    home: Path, tiny_config: DecoderConfig, weights: bytes, says: str
) -> None:
    replace_file(home / "one" / WEIGHTS_FILE, weights)
    adapters = listing(home, tiny_config, a="one", b="two")
    assert served(adapters) == ["b"]
    assert says in problem(adapters, "a")
    assert str(home) not in problem(adapters, "a")


def test_what_cannot_be_served_says_why(home: Path, tiny_config: DecoderConfig, tmp_path_factory: Any) -> None:
    make_adapter(home / "wide", tiny_config, rank=9)
    wrong = replace(tiny_config, hidden_size=64)
    make_adapter(home / "shapes", wrong)
    (home / "pickled").mkdir()
    (home / "pickled" / CONFIG_FILE).write_bytes((home / "one" / CONFIG_FILE).read_bytes())
    (home / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    outside = make_adapter(tmp_path_factory.mktemp("outside") / "x", tiny_config)
    (home / "link").symlink_to(outside)
    (home / "files").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (home / "files" / name).symlink_to(outside / name)
    folders = {"wide": "wide", "shapes": "shapes", "pickled": "pickled", "link": "link", "files": "files"}
    write_list(home, {**folders, "up": "../x", "root": "/etc", "url": "s3://x/y", "nul": "a\0b", "gone": "gone"})
    adapters = listing(home, tiny_config, a="one")
    assert served(adapters) == ["a"]
    says = {
        "wide": "above adapters.max_rank",
        "shapes": "of this model",
        "pickled": "pickled",
        "link": "leads out",
        "files": "leads out",
        **dict.fromkeys(("up", "root", "url", "nul"), "below the directory"),
        "gone": "no such folder",
    }
    for name, words in says.items():
        assert words in problem(adapters, name), name
    adapters.look()
