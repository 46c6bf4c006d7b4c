"""Triton products with quantised weights against float64 of the same codes; quantiser and decoder bit for bit."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fakes.quantized_exact import ROUNDING, exact
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import quantize
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import int4_gemm, matrix_tiles
from penstock.kernels.gpu import quantized_linear as gpu
from penstock.kernels.gpu.quantize_tokens import quantize_tokens
from penstock.kernels.packing import GROUP, QuantFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_TOKENS = [form for form in QuantFormat if form is not QuantFormat.INT4_GROUP]
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@triton.jit
def encode_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, matrix_tiles.encode_e4m3(tl.load(x + i).to(tl.float32)))


@triton.jit
def decode_kernel(codes, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, matrix_tiles.decode_e4m3(tl.load(codes + i), out.dtype.element_ty))


@triton.jit
def nibble_kernel(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, int4_gemm.numbers_of(i, out.dtype.element_ty))


def test_e4m3_codes_are_those_of_torch_for_all_bf16_numbers():
    x = ALL_BF16.to(DEVICE)
    out = torch.empty(65536, dtype=torch.uint8, device=DEVICE)
    encode_kernel[(16,)](x, out, 4096)
    expected = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    nan = x.isnan()
    assert torch.equal(out[~nan], expected.view(torch.uint8)[~nan])
    assert out.view(torch.float8_e4m3fn).float()[nan].isnan().all()


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_e4m3_codes_are_decoded_exactly(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, dtype=dtype, device=DEVICE)
    decode_kernel[(1,)](codes, out, 256)
    expected = codes.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(out.nan_to_num(1000.0), expected.nan_to_num(1000.0))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_int4_codes_become_numbers_exactly(dtype):
    out = torch.empty(16, dtype=dtype, device=DEVICE)
    nibble_kernel[(1,)](out, 16)
    assert out.tolist() == list(range(-8, 8))


@given(
    form=st.sampled_from(WITH_TOKENS),
    tokens=st.sampled_from([0, 1, 7]),
    inputs=st.sampled_from([1, 130, 5000]),
    dtype=st.sampled_from(list(ROUNDING)),
    fixed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_tokens_get_the_codes_that_the_format_says(form, tokens, inputs, dtype, fixed, seed):
    torch.manual_seed(seed)
    fixed = fixed and form in (QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL)
    weight = quantize.quantize_weight(torch.ones(2, inputs, device=DEVICE), form, None, 0.01 if fixed else None)
    x = (torch.randn(tokens, inputs, device=DEVICE) * 10.0 ** torch.randint(-6, 4, (tokens, 1), device=DEVICE)).to(
        dtype
    )
    if tokens > 5:
        x[1], x[2, 0], x[3, 0] = 0, float("nan"), float("inf")
    codes, scales = quantize_tokens(x, weight)
    expected_codes, expected_scales = quantize.quantize_tokens(x, weight)
    fine = ~expected_scales.isnan()
    assert torch.equal(scales.isnan(), ~fine)
    assert torch.equal(scales[fine], expected_scales[fine])
    whole = fine if fine.dim() == 1 else fine.all(1)
    assert codes.dtype == expected_codes.dtype
    assert torch.equal(codes.view(torch.uint8)[whole], expected_codes.view(torch.uint8)[whole])


@given(
    form=st.sampled_from(list(QuantFormat)),
    native=st.booleans(),
    tokens=st.sampled_from([0, 1, 7, 16, 65]),
    groups=st.sampled_from([1, 3, 9]),
    odd=st.sampled_from([0, 5]),
    outputs=st.sampled_from([1, 24, 130]),
    dtype=st.sampled_from(list(ROUNDING)),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_against_float64_of_the_codes(form, native, tokens, groups, odd, outputs, dtype, with_bias, seed):
    torch.manual_seed(seed)
    inputs = GROUP * groups + (0 if form is QuantFormat.INT4_GROUP else odd)
    x = torch.randn(tokens, inputs, device=DEVICE).to(dtype)
    weight = torch.randn(outputs, inputs, device=DEVICE).to(dtype)
    weight[0], x[-1:] = 0, 0
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if with_bias else None
    packed = gpu.quantize_weight(weight, form, bias)
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":  # both ways to the tensor cores: e4m3 as it is, and decoded
            patch.setattr(gpu, "_knows_e4m3", lambda device: native)
        out = gpu.quantized_linear(x, packed)
    expected, bound = exact(x, packed)
    assert (out.shape, out.dtype) == ((tokens, outputs), dtype)
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("form", [QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_vendors_product_for_many_tokens(form, with_bias, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(gpu, "_knows_e4m3", lambda device: True)
    x, weight = torch.randn(70, 64, device=DEVICE).bfloat16(), torch.randn(32, 64, device=DEVICE).bfloat16()
    bias = torch.randn(32, device=DEVICE) if with_bias else None
    packed, calls = gpu.quantize_weight(weight, form, bias), []
    served = torch._scaled_mm

    def watched(*arguments, **options):
        calls.append(options)
        return served(*arguments, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    out = gpu.quantized_linear(x, packed)
    expected, bound = exact(x, packed)
    assert len(calls) == 1
    # The bias is rounded to bfloat16, and added to a rounded product.
    assert ((out.double() - expected).abs() <= bound + 2**-8 * (expected.abs() + 4)).all()
    gpu.quantized_linear(x.float(), packed)
    assert len(calls) == 1


@pytest.mark.parametrize("form", list(QuantFormat))
def test_a_token_does_not_depend_on_its_neighbours(form):
    torch.manual_seed(0)
    packed = gpu.quantize_weight(torch.randn(40, 640, device=DEVICE), form)
    x = torch.randn(16, 640, device=DEVICE)
    together = gpu.quantized_linear(x, packed)
    x[3:] = float("nan")
    assert torch.equal(gpu.quantized_linear(x, packed)[:3], together[:3])
    assert torch.equal(gpu.quantized_linear(x[:1], packed), together[:1])


@pytest.mark.parametrize("form", WITH_TOKENS)
def test_a_strange_token_spoils_its_own_row_only(form):
    torch.manual_seed(0)
    x = torch.randn(3, 200, device=DEVICE)
    packed = gpu.quantize_weight(torch.randn(8, 200, device=DEVICE), form)
    clean = gpu.quantized_linear(x, packed)
    for strange in (float("nan"), float("inf")):
        x[1, 150] = strange
        out = gpu.quantized_linear(x, packed)
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_rows_of_a_wider_tensor():
    torch.manual_seed(0)
    wide = torch.randn(4, 400, device=DEVICE)
    for form in QuantFormat:
        packed = gpu.quantize_weight(torch.randn(8, 256, device=DEVICE), form)
        assert torch.equal(
            gpu.quantized_linear(wide[:, 100:356], packed),
            gpu.quantized_linear(wide[:, 100:356].contiguous(), packed),
        )


def test_wrong_inputs_are_told():
    packed = gpu.quantize_weight(torch.randn(8, 128, device=DEVICE), QuantFormat.FP8_CHANNEL)
    for x in (
        torch.randn(3, 127, device=DEVICE),
        torch.randn(128, device=DEVICE),
        torch.randn(3, 128).double().to(DEVICE),
    ):
        with pytest.raises(KernelInputError, match="quantized_linear: x"):
            gpu.quantized_linear(x, packed)
