"""The list of ahead-of-time cases: of every kernel module, named once, with every argument accounted for."""

import pytest

pytest.importorskip("triton")

from penstock.kernels.gpu import aot, norm
from penstock.kernels.gpu.aot import AotCase, all_cases


def test_every_argument_of_every_case_has_a_type_or_a_value():
    cases = all_cases()
    assert len(cases) > 50
    for name, case in cases.items():
        arguments = set(case.kernel.arg_names)
        assert case.signature.keys() | case.constexprs.keys() == arguments, name
        assert not case.signature.keys() & case.constexprs.keys(), name
        assert set(case.aligned()) <= case.signature.keys(), name


@pytest.mark.parametrize(
    "module",
    [
        "activation",
        "attention_cases",
        "int4_gemm",
        "kv_blocks",
        "linear",
        "norm",
        "philox",
        "quantized_linear",
        "rotary",
    ],
)
def test_modules_with_kernels_have_cases(module):
    assert [name for name in all_cases() if name.startswith(f"{module}/")]


def test_all_pointers_are_aligned_unless_told_otherwise():
    case = AotCase("x", None, {"a": "*fp32", "n": "i32"})
    assert case.aligned() == ("a",)
    assert AotCase("x", None, {"a": "*fp32", "n": "i32"}, divisible=("n",)).aligned() == ("n",)


def test_a_name_taken_twice_is_refused(monkeypatch):
    monkeypatch.setattr(norm, "AOT_CASES", (*norm.AOT_CASES, norm.AOT_CASES[0]))
    with pytest.raises(ValueError, match="two ahead-of-time cases"):
        aot.all_cases()
