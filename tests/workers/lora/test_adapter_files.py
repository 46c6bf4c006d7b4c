"""An adapter's folder is served exactly, or refused by a plain message; nothing outside the directory is touched."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.adapters import make_adapter, replace_file, safetensors_bytes

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.errors import AdapterError, ConfigError
from penstock.workers.lora.adapter_config import parse_adapter_config
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, read_adapter
from penstock.workers.lora.projections import adaptable
from penstock.workers.model.config import read_config

CONFIG = read_config(EMBEDDED_MODEL)
PLACES = adaptable(CONFIG)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def read(home: Path, folder: str = "a", max_rank: int = 8) -> AdapterFiles:
    return read_adapter(home, folder, PLACES, max_rank)


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    make_adapter(tmp_path / "deep/a", rank=4, alpha=8)
    found = read(tmp_path, "deep/a")
    assert set(found.updates) == set(PLACES)
    assert {(update.rank, update.scale) for update in found.updates.values()} == {(4, 2.0)}
    size = PLACES[0, "down_proj"]
    update = found.updates[0, "down_proj"]
    assert (update.a.shape, update.b.shape) == ((4, size.inputs), (size.outputs, 4))
    assert read(tmp_path, "deep/a").revision == found.revision


def test_any_other_content_is_another_revision(tmp_path: Path) -> None:
    revisions = set()
    for changed in ({}, {"seed": 1}, {"alpha": 9}, {"more": {"inference_mode": True}}):
        make_adapter(tmp_path / "a", **changed)
        revisions.add(read(tmp_path).revision)
    assert len(revisions) == 4


@pytest.mark.parametrize(
    ("more", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 6}}, 1.5),
        ({"alpha_pattern": {"proj": 6, "layers.1.self_attn.q_proj": 7}}, 2.0),
        ({"lora_alpha": None}, None),
    ],
)
def test_the_scale_is_that_of_peft(tmp_path: Path, more: dict[str, Any], scale: float | None) -> None:
    make_adapter(tmp_path / "a", rank=4, alpha=8, modules=("q_proj",), layers=(0,), more=more)
    if scale is None:
        with pytest.raises(AdapterError, match="lora_alpha"):
            read(tmp_path)
    else:
        assert read(tmp_path).updates[0, "q_proj"].scale == scale


def test_ranks_may_differ_by_pattern(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", rank=2, modules=("v_proj",), more={"r": 7, "rank_pattern": {"v_proj": 2}})
    assert {update.rank for update in read(tmp_path).updates.values()} == {2}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"r": 9}, "above adapters.max_rank 8"),
        ({"r": 0}, "rank"),
        ({"r": True}, "rank"),
        ({"r": 4.0}, "rank"),
        ({"r": 3}, "of this model and rank"),
        ({"rank_pattern": {"q_proj": 100}}, "above adapters.max_rank"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expressions"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_what_would_be_served_wrongly_is_refused_by_name(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    make_adapter(tmp_path / "a", more=more)
    with pytest.raises(AdapterError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"r": NaN}', b"[" * 100_000, b'{"r": 1e400}'])
def test_a_configuration_that_is_none(text: bytes) -> None:
    with pytest.raises(AdapterError, match="where"):
        parse_adapter_config(text, "where", 8)


def _header(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _renamed(old: str, new: str) -> Any:
    def change(data: bytes) -> bytes:
        header, rest = _header(data)
        return _with({name.replace(old, new): value for name, value in header.items()}, rest)

    return change


def _offset_past_the_end(data: bytes) -> bytes:
    header, rest = _header(data)
    last = max(name for name in header if name != "__metadata__")
    header[last]["data_offsets"][1] += 1 << 40
    return _with(header, rest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "not inside"),
        (lambda data: b"", "shorter"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "header length"),
        (lambda data: (len(data) * 2).to_bytes(8, "little") + data[8:], "past the end"),
        (_offset_past_the_end, "not inside"),
        (lambda data: data + b"\0", "cut or padded"),
        (_renamed("layers.0.", "layers.77."), "layers.77"),
        (_renamed("self_attn.q_proj", "self_attn.rotary_proj"), "rotary_proj"),
        (_renamed("q_proj.lora_B", "q_proj.lora_magnitude_vector"), "magnitude"),
        (_renamed("base_model.model.model", "base_model.model.lm_head"), "adapters change only"),
    ],
)
def test_weights_that_are_damaged_or_not_for_this_model(tmp_path: Path, change: Any, words: str) -> None:
    path = make_adapter(tmp_path / "a") / WEIGHTS_FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AdapterError, match=words):
        read(tmp_path)


def test_one_half_alone_wrong_shapes_and_wrong_dtypes(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", rank=2)
    size = PLACES[0, "q_proj"]
    a, b = np.zeros((2, size.inputs), np.float32), np.zeros((size.outputs, 2), np.float32)
    for arrays, words in (
        ({f"{Q}.lora_A.weight": a}, "lora_A and lora_B"),
        ({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b[1:]}, "lora_B is"),
        ({f"{Q}.lora_A.weight": a[:, 1:], f"{Q}.lora_B.weight": b}, "lora_A is"),
        ({f"{Q}.lora_A.weight": a, f"{Q.replace('model.model.model', 'model.model')}.lora_A.weight": a}, "twice"),
        ({}, "no tensor"),
    ):
        replace_file(folder / WEIGHTS_FILE, safetensors_bytes(arrays))
        with pytest.raises(AdapterError, match=words):
            read(tmp_path)
    data = safetensors_bytes({f"{Q}.lora_A.weight": a}).replace(b'"F32"', b'"I32"')
    replace_file(folder / WEIGHTS_FILE, data)
    with pytest.raises(AdapterError, match="I32"):
        read(tmp_path)


@pytest.mark.parametrize(
    "folder",
    ["", ".", "..", "../a", "a/..", "/etc", "a//b", "a\0b", "a b", "x" * 200, "/".join("abcdefghi"), "http://h/a"],
)
def test_folders_that_are_no_folders(tmp_path: Path, folder: str) -> None:
    with pytest.raises(AdapterError, match="path of letters"):
        read(tmp_path, folder)


def test_links_lead_nowhere_else(tmp_path: Path) -> None:
    outside = make_adapter(tmp_path / "outside")
    home = tmp_path / "home"
    make_adapter(home / "a")
    (home / "link").symlink_to(outside)
    (home / "fine").symlink_to(home / "a")
    with pytest.raises(AdapterError, match="leads out"):
        read(home, "link")
    assert read(home, "fine").revision == read(home, "a").revision
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (home / "a" / name).unlink()
        (home / "a" / name).symlink_to(outside / name)
        with pytest.raises(AdapterError, match="leads out"):
            read(home)
        (home / "a" / name).unlink()
        replace_file(home / "a" / name, (outside / name).read_bytes())


def test_what_is_no_file_and_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read(tmp_path)
    folder = make_adapter(tmp_path / "a")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        read(tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match="pickled"):
        read(tmp_path)
    os.mkfifo(folder / WEIGHTS_FILE)  # must not be waited for
    with pytest.raises(AdapterError):
        read(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()
    with pytest.raises(AdapterError):
        read(tmp_path)


def test_a_file_larger_than_any_that_fits_is_not_read(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a") / WEIGHTS_FILE
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(AdapterError, match="more than"):
        read(tmp_path)


def test_a_reader_beside_a_careless_writer_knows_what_it_got(tmp_path: Path) -> None:
    """The writer overwrites in place, cuts and grows the file: whatever is read, its revision is of those bytes."""
    folder = make_adapter(tmp_path / "a", rank=4)
    whole = {read(tmp_path).revision: (folder / WEIGHTS_FILE).read_bytes()}
    make_adapter(tmp_path / "b", rank=4, seed=5)
    whole[read(tmp_path, "b").revision] = (tmp_path / "b" / WEIGHTS_FILE).read_bytes()
    contents = list(whole.values())
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            with (folder / WEIGHTS_FILE).open("r+b") as file:
                file.truncate(len(contents[0]) // (1 + number % 3))
                file.write(contents[number % 2])
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for _ in range(400):
            try:
                found = read(tmp_path)
            except AdapterError:
                refused += 1
            else:
                assert whole.get(found.revision, found.data) == found.data
                assert (found.revision in whole) == (bytes(found.data) in contents)
    finally:
        stop.set()
        writer.join()
    assert refused > 0


def test_models_whose_adapters_are_not_served() -> None:
    latent: Any = object()
    with pytest.raises(ConfigError, match="latent"):
        adaptable(replace(CONFIG, latent=latent))
