"""Figures are read from what the tools print, and a listing without them is refused."""

import pytest

pytest.importorskip("triton")

from penstock.kernels.gpu.resource_usage import ResourceUsage, parse_amdgcn, parse_cuobjdump

CUDA = """
Resource usage:
 Common:
  GLOBAL:0
 Function some_kernel:
  REG:168 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMD = """
amdhsa.kernels:
  - .agpr_count:     4
    .group_segment_fixed_size: 2048
    .sgpr_spill_count: 1
    .vgpr_count:     96
    .vgpr_spill_count: 3
"""


def test_cuobjdump():
    assert parse_cuobjdump(CUDA, 0) == ResourceUsage(168, 24, 1024)
    assert parse_cuobjdump(CUDA, 65536) == ResourceUsage(168, 24, 65536)


def test_amdgcn():
    assert parse_amdgcn(AMD, 0) == ResourceUsage(96, 12, 2048)
    assert parse_amdgcn(AMD, 4096).shared_bytes == 4096


@pytest.mark.parametrize("text", ["", "Function some_kernel:\n  REG:12 STACK:0"])
def test_a_listing_without_figures_is_refused(text):
    with pytest.raises(ValueError, match="no resource usage"):
        parse_cuobjdump(text, 0)
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        parse_amdgcn(text, 0)
