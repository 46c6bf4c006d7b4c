"""Compiling once, and doing without: no compiler, a compiler that fails, a processor nobody foresaw."""

import stat

import pytest
import torch

from penstock.kernels import dispatch
from penstock.kernels.native import build, library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(build.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path / ".cache" / "penstock"


@pytest.fixture
def fresh():
    for cached in (library.load, library.function, dispatch.choose):
        cached.cache_clear()
    yield
    for cached in (library.load, library.function, dispatch.choose):
        cached.cache_clear()


def compiler(tmp_path, monkeypatch, script):
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(path))


def test_compiled_once_and_kept(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'echo x >> {tmp_path}/calls; for a; do last=$a; done; echo code > "$last"')
    level = build.machine_level()
    first = build.library_path(level)
    assert build.library_path(level) == first
    assert (tmp_path / "calls").read_text() == "x\n"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(p.name for p in cache.iterdir()) == sorted([first.name, "lock"])


def test_a_failing_compiler_leaves_torch_to_serve(cache, tmp_path, monkeypatch, fresh, caplog):
    compiler(tmp_path, monkeypatch, "echo 'no such flag' >&2; exit 1")
    assert dispatch.backend_for(torch.zeros(1)) is dispatch.CPU
    assert "no such flag" in caplog.text
    assert [p.name for p in cache.iterdir()] == ["lock"]


def test_no_compiler(cache, monkeypatch, fresh, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert dispatch.backend_for(torch.zeros(1)) is dispatch.CPU
    assert "no C++ compiler (g++, clang++, c++) is installed" in caplog.text


def test_a_folder_that_others_may_write_is_not_used(cache, tmp_path):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert build._cache_folder() == next((tmp_path / "tmp").iterdir())


def test_an_unknown_processor(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fpu vme\n")
    monkeypatch.setattr(build, "Path", lambda path: info if path == "/proc/cpuinfo" else tmp_path)
    with pytest.raises(build.BuildError, match="no instruction set"):
        build.machine_level()


def test_levels_are_ordered_by_what_they_need():
    x86 = [build.LEVELS[name][0] for name in ("avx512-bf16", "avx512")]
    assert x86[0] > x86[1]
