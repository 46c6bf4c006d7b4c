"""The quantised formats: codes against torch's own casts, error of rounding, packing, empty and strange values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import quantize
from penstock.kernels.errors import KernelInputError
from penstock.kernels.packing import GROUP, QuantFormat

ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
LARGEST = {QuantFormat.INT8_CHANNEL: 127, QuantFormat.INT4_GROUP: 7}


def quantized(weight, form, bias=None, input_scale=None):
    return quantize.quantize_weight(weight, form, bias, input_scale)


def test_fp8_codes_are_those_of_torch_for_all_bf16_numbers():
    values = ALL_BF16.float()
    codes = quantize.fp8_codes(values, torch.ones(()))
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert codes.float()[values == float("inf")].tolist() == [448.0]


def test_int4_words_hold_every_code_at_every_place():
    codes = torch.stack([torch.arange(256).roll(shift) % 16 for shift in range(16)])
    assert set(codes[:, 0].tolist()) == set(range(16))
    words = quantize.pack_int4(codes)
    assert words.shape == (2, 16, 16)
    assert words.dtype == torch.int32
    assert torch.equal(quantize.unpack_int4(words).long(), codes - 8)
    # The order that the format promises: word i, nibble j is input 16 j + i of its group.
    assert int(words[1, 3, 5] >> (4 * 7)) & 15 == int(codes[3, 128 + 16 * 7 + 5])


@given(
    form=st.sampled_from(list(QuantFormat)),
    outputs=st.sampled_from([1, 5, 128, 130]),
    groups=st.integers(1, 3),
    odd=st.sampled_from([0, 1, 77]),
    spread=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rounding_error_is_half_a_step(form, outputs, groups, odd, spread, seed):
    torch.manual_seed(seed)
    inputs = GROUP * groups + (0 if form is QuantFormat.INT4_GROUP else odd)
    weight = torch.randn(outputs, inputs) * spread
    weight[0] = 0
    out = quantized(weight, form)
    decoded = quantize.decode_weight(out, torch.float64)
    assert decoded.shape == weight.shape
    error = (decoded - weight.double()).abs()
    assert (error[0] == 0).all()
    if form in LARGEST:
        shared = weight.view(outputs, -1, GROUP) if form is QuantFormat.INT4_GROUP else weight[:, None]
        step = shared.abs().amax(2, keepdim=True).double() / LARGEST[form]
        # Half a step, and what float32 loses of a code when it divides by the scale.
        assert (error.view(shared.shape) <= step * (0.5 + LARGEST[form] * 2.0**-23) + 2.0**-126).all()
    else:
        # Half of the last of three mantissa bits, or half of e4m3's smallest step under the largest scale.
        assert (error <= weight.double().abs() * 2**-4 + weight.abs().max().double() / 448 * 2**-10).all()


@pytest.mark.parametrize("form", [form for form in QuantFormat if form is not QuantFormat.INT4_GROUP])
def test_tokens_that_are_zero_or_strange(form):
    weight = quantized(torch.ones(3, 200), form)
    x = torch.ones(5, 200, dtype=torch.bfloat16)
    x[0], x[1, 7], x[2, 7] = 0, float("nan"), float("inf")
    codes, scales = quantize.quantize_tokens(x, weight)
    assert codes[0].float().count_nonzero() == 0
    assert scales[0].isfinite().all()
    for token in (1, 2):
        assert scales[token].isnan().any()
    assert codes[3].float().unique().tolist() == [127.0 if form is QuantFormat.INT8_CHANNEL else 448.0]


def test_a_fixed_scale_saturates_and_tells_of_nan():
    weight = quantized(torch.ones(3, 16), QuantFormat.FP8_TENSOR, input_scale=0.5)
    x = torch.tensor([[1.0, 1000.0, float("inf"), -float("inf")] * 4, [float("nan")] + [1.0] * 15])
    codes, scales = quantize.quantize_tokens(x, weight)
    assert codes[0, :4].float().tolist() == [2.0, 448.0, 448.0, -448.0]
    assert scales[0] == 0.5
    assert scales[1].isnan()


@pytest.mark.parametrize(
    ("weight", "form", "options", "argument"),
    [
        (torch.ones(3), QuantFormat.FP8_TENSOR, {}, "weight"),
        (torch.ones(3, 4, dtype=torch.int8), QuantFormat.FP8_TENSOR, {}, "weight"),
        (torch.ones(0, 4), QuantFormat.FP8_TENSOR, {}, "weight outputs"),
        (torch.ones(4, 0), QuantFormat.INT8_CHANNEL, {}, "weight inputs"),
        (torch.ones(3, 130), QuantFormat.INT4_GROUP, {}, "weight"),
        (torch.ones(1, 131_073), QuantFormat.INT8_CHANNEL, {}, "weight"),
        (torch.full((2, 2), float("nan")), QuantFormat.FP8_CHANNEL, {}, "weight"),
        (torch.ones(3, 4), "fp7", {}, "format"),
        (torch.ones(3, 4), QuantFormat.FP8_TENSOR, {"bias": torch.ones(4)}, "bias"),
        (torch.ones(3, 4), QuantFormat.FP8_TENSOR, {"input_scale": 0.0}, "input_scale"),
        (torch.ones(3, 4), QuantFormat.INT8_CHANNEL, {"input_scale": 1.0}, "input_scale"),
    ],
)
def test_what_cannot_be_served_is_told(weight, form, options, argument):
    with pytest.raises(KernelInputError) as told:
        quantized(weight, form, **options)
    assert (told.value.op, told.value.argument) == ("quantize_weight", argument)
