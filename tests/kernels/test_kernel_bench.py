"""The benchmark's arithmetic and its table, on cases small enough for a test; and that all ops it times are native."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from luthier.errors import ConfigError
from luthier.kernels import attention, bench, elementwise, head, native, quantize, registry
from luthier.kernels.bench_cases import (
    Case,
    attention_case,
    elementwise_cases,
    factor_cases,
    head_case,
    linear_cases,
    quantize_case,
    stored,
)
from luthier.kernels.frozen_linear import dequantize
from luthier.kernels.memory import keep_freed_memory
from luthier.kernels.storage import KINDS

NATIVE_OPS = {
    quantize: ("nf4_quantize", "gguf_quantize"),
    elementwise: (
        "rms_norm",
        "rms_norm_backward",
        "layer_norm",
        "layer_norm_backward",
        "rotary",
        "rotary_",
        "gated",
        "gated_backward",
    ),
    head: ("linear_cross_entropy",),
    attention: ("packed_attention", "packed_attention_backward"),
}


def test_every_expected_op_is_registered_with_a_native_version():
    registered = {op.name: op.has_native for op in registry.registered_ops()}
    for names in NATIVE_OPS.values():
        for name in names:
            assert registered[name], name


def test_a_row_holds_rate_share_and_ratios():
    bounds = bench.Bounds()
    calls = []
    case = Case("op", "1x1", "f32", 1e6, "fma", lambda: calls.append(1), {"other": lambda: None}, 2e6, 1e9, {"other": 1e9})
    row = bench.measure(case, bounds, 3)
    assert calls
    assert row["rate"] == pytest.approx(1e6 / row["seconds"])
    assert row["share"] > 0
    assert bench.missed_target(row)
    assert json.dumps(row)


def test_each_row_is_handed_over_as_soon_as_it_is_there():
    kept = []

    def broken() -> Case:
        raise RuntimeError(str(len(kept)))

    cases = [lambda: Case("op", "1x1", "f32", 1.0, None, lambda: None), broken]
    with pytest.raises(RuntimeError, match="1"):
        bench.run_cases(cases, pairs=1, keep=kept.append)
    assert kept[0]["op"] == "op"


def test_targets_are_shares_rates_or_ratios():
    row = {"bound": "fma", "share": 0.8, "rate": 1.0, "target": 0.8, "ratios": {"torch": 1.3}, "peer_targets": {"torch": 1.25}}
    assert not bench.missed_target(row)
    assert bench.missed_target({**row, "target": 0.81})
    assert bench.missed_target({**row, "peer_targets": {"torch": 1.4}})
    assert not bench.missed_target({**row, "bound": None, "share": None, "target": 1.0})


def test_all_kinds_of_cases_run_and_print():
    makers = [*linear_cases(1, 256, 256, "nf4"), *linear_cases(20, 256, 256, "q4_k"), *elementwise_cases(8, 64)]
    makers += factor_cases(20, 64, 96)
    makers += [lambda: attention_case((5, 4)), lambda: head_case(3, 50, 64, "q8_0"), lambda: quantize_case(4, 64, "NF4")]
    rows = []
    for make in makers:
        case = make()
        case.run()
        for peer in case.peers.values():
            peer()
        rows.append(
            {**vars(case), "op": case.name, "seconds": 1e-3, "rate": case.work * 1e3, "share": 0.5, "ratios": {"torch": 2.0}}
        )
    result = {"threads": 2, "instruction_set": "avx2", "bounds": {"fma": 2e11, "read": 2e10, "copy": 2e10}, "rows": rows}
    text = bench.as_text(result)
    assert len(text.splitlines()) == 2 + len(rows)
    assert "multiply-adds 200 GFLOP/s, read 20.0 GB/s" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_can_be_had_in_every_storage(kind):
    weight = torch.randn(3, 256)
    storage = stored(weight, kind)
    assert dequantize(storage).shape == (3, 256)
    assert kind.startswith("q5") or float((dequantize(storage) - weight).norm() / weight.norm()) < 0.12


def test_no_case_holds_tensors_before_it_is_built():
    for case in elementwise_cases(10**6, 10**6):  # 4 TB each
        assert not any(isinstance(value, torch.Tensor) for value in (*case.args, *case.keywords.values()))


def test_without_native_kernels_the_benchmark_says_so():
    with native.forced("reference"), pytest.raises(ConfigError, match="need the native kernels"):
        bench.Bounds().now("fma")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
def test_glibc_keeps_freed_memory():
    assert keep_freed_memory()
