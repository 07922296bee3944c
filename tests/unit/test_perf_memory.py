"""Memory: weights, KV cache and activations against known figures, and against themselves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import PlanError, UsageError
from moeplan.model.catalogue import load_model, model_names
from moeplan.model.parameters import parameters
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import (
    MemoryModel,
    ParallelLayout,
    Precision,
    activation_bytes,
    check_parallel,
    expert_bytes,
    kv_bytes,
    kv_bytes_per_token,
    weight_bytes,
)
from moeplan.replay.tabulate import RowFigures

V3, LLAMA, OSS = load_model("DeepSeek-V3"), load_model("Llama-3.1-70B"), load_model("gpt-oss-120b")


# --- KV cache


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("DeepSeek-V3", 61 * (512 + 64) * 2), ("Kimi-K2", 61 * 576 * 2), ("DeepSeek-V2-Lite", 27 * 576 * 2),
        ("Llama-3.1-8B", 131072), ("Llama-3.1-70B", 327680), ("Llama-3.1-405B", 516096),
        ("Qwen3-235B-A22B", 94 * 2 * 4 * 128 * 2), ("gpt-oss-120b", 36 * 2 * 8 * 64 * 2),
        ("GPT-3-175B", 96 * 2 * 12288 * 2), ("Qwen3.5-397B-A17B", 15 * 2 * 2 * 256 * 2),
    ],
)  # fmt: skip
def test_kv_bytes_per_token(name: str, per_token: int) -> None:
    """DeepSeek-V3's 70,272 (70.272 KB) and Llama-3.1-405B's 516,096 are those of arXiv 2505.09343, table 1."""
    assert kv_bytes_per_token(load_model(name)) == per_token
    assert kv_bytes_per_token(load_model(name), "fp8") == per_token / 2


def test_kv_over_tensor_parallel_ranks() -> None:
    """GQA splits down to one KV head a rank, MLA not at all."""
    assert [kv_bytes_per_token(LLAMA, tp=tp) for tp in (1, 8, 16, 64)] == [327680, 40960, 40960, 40960]
    assert [kv_bytes_per_token(V3, tp=tp) for tp in (1, 8, 128)] == [70272] * 3


def test_windows_bound_the_cache() -> None:
    layer = 2 * 8 * 64 * 2
    assert kv_bytes(OSS, 100) == 36 * 100 * layer
    assert kv_bytes(OSS, 10_000) == (18 * 10_000 + 18 * 128) * layer
    scout = load_model("Llama-4-Scout")
    assert kv_bytes(scout, 100_000) == (12 * 100_000 + 36 * 8192) * 2 * 8 * 128 * 2


def test_linear_attention_keeps_a_state() -> None:
    qwen = load_model("Qwen3.5-397B-A17B")
    state = 45 * (64 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 64 * 128) * 2)
    assert kv_bytes(qwen, 0) == state
    assert kv_bytes(qwen, 1000) == state + 1000 * kv_bytes_per_token(qwen)


# --- weights


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_published_checkpoint_sizes(name: str, gib: float) -> None:
    """Table 1 of gpt-oss's card (arXiv 2508.10925): MXFP4 experts, all else bf16."""
    spec = load_model(name)
    assert weight_bytes(spec, ParallelLayout(), Precision.of_checkpoint(spec)).sum() / 2**30 == pytest.approx(
        gib, abs=0.05
    )


@pytest.mark.parametrize("name", model_names())
def test_one_gpu_holds_every_parameter(name: str) -> None:
    spec = load_model(name)
    assert weight_bytes(spec, ParallelLayout(), Precision()).sum() == pytest.approx(
        2 * parameters(spec).total, rel=1e-12
    )
    mtp = weight_bytes(spec, ParallelLayout(), Precision(), mtp=True).sum()
    assert mtp == pytest.approx(2 * (parameters(spec).total + parameters(spec).mtp), rel=1e-12)


def test_deepseek_v3_on_72_gpus() -> None:
    """EP72 with 32 redundant experts: 4 slots of 44 MB in each of 58 layers; attention whole on every rank."""
    parallel, precision = ParallelLayout(dp=72, ep=72, redundant=32), Precision.of_checkpoint(V3)
    attention, ffn, experts, redundant, vocabulary, _ = weight_bytes(V3, parallel, precision)[0]
    one = 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert expert_bytes(V3, "fp8") == one
    assert expert_bytes(OSS, "mxfp4") == 3 * 2880**2 * (0.5 + 1 / 32) + 3 * 2880 * 2
    assert experts + redundant == pytest.approx(58 * 4 * one) and redundant == pytest.approx(58 * 32 / 72 * one)
    assert attention == pytest.approx(61 * 187.1e6, rel=1e-3)  # 187 M weights of MLA a layer
    assert ffn == pytest.approx((3 * 3 * 7168 * 18432 + 58 * 3 * 7168 * 2048) * (1 + 4 / 128**2))
    assert vocabulary == 2 * 129280 * 7168 * 2


def test_layouts_hold_the_same_model() -> None:
    """tp, ep and pp split without loss what they split; dp repeats the attention."""
    precision = Precision(weights="fp8", experts="fp4")
    whole = weight_bytes(V3, ParallelLayout(), precision)[0]
    for parallel in (
        ParallelLayout(tp=8, ep=8),
        ParallelLayout(tp=8),
        ParallelLayout(tp=8, ep=2),
        ParallelLayout(dp=8, ep=8),
        ParallelLayout(tp=2, dp=4, ep=4),
    ):
        one = weight_bytes(V3, parallel, precision)[0]
        assert one[2] * parallel.gpus == pytest.approx(whole[2])  # experts
        assert one[1] * parallel.tp == pytest.approx(whole[1])
        assert one[0] * parallel.tp >= whole[0]
    staged = weight_bytes(V3, ParallelLayout(pp=4), precision)
    assert staged.shape == (4, 6) and staged.sum(axis=0) == pytest.approx(whole)
    tied = load_model("GPT-3-175B")  # the last stage needs its own copy of the matrix
    extra = (
        weight_bytes(tied, ParallelLayout(pp=2), Precision()).sum()
        - weight_bytes(tied, ParallelLayout(), Precision()).sum()
    )
    assert extra == 50257 * 12288 * 2


def test_dtypes_are_apart() -> None:
    bf16, int4 = (weight_bytes(V3, ParallelLayout(), Precision(experts=e))[0] for e in ("bf16", "int4"))
    assert int4[2] / bf16[2] == pytest.approx((0.5 + 2 / 128) / 2) and (int4[[0, 1, 4, 5]] == bf16[[0, 1, 4, 5]]).all()
    with pytest.raises(UsageError, match='unknown dtype "fp6" for kv; use fp32, bf16, fp8, int8, fp4'):
        Precision(kv="fp6")
    with pytest.raises(UsageError, match="does not tell its weights' dtype"):
        Precision.of_checkpoint(replace(V3, checkpoint=None))


@pytest.mark.parametrize(
    ("spec", "parallel", "said"),
    [
        (V3, ParallelLayout(tp=3), "tp 3 does not divide the 128 heads of DeepSeek-V3; 2 or 4 does"),
        (V3, ParallelLayout(tp=10**9), "does not divide the 128 heads"),
        (V3, ParallelLayout(dp=8, ep=3), "ep 3 does not divide tp x dp = 8; 2 or 4 does"),
        (
            V3,
            ParallelLayout(dp=72, ep=72),
            "256 experts and 0 redundant slots do not divide over ep 72; redundant 32 does",
        ),
        (V3, ParallelLayout(dp=72, ep=72, redundant=40), "redundant 32 or 104 does"),
        (V3, ParallelLayout(pp=62), "pp 62 is more than the 61 layers"),
        (V3, ParallelLayout(dp=0), "dp is 0; give at least 1"),
        (V3, ParallelLayout(redundant=-1), "redundant is -1"),
        (V3, ParallelLayout(dp=9, ep=1), "tp x dp / ep 9 does not divide the width 2048 of an expert"),
        (LLAMA, ParallelLayout(dp=8, ep=8), "Llama-3.1-70B has no experts; leave ep at 1"),
        (load_model("Llama-4-Scout"), ParallelLayout(tp=5), "tp 5 fits not the 8 KV heads"),
    ],
)
def test_impossible_layouts(spec: Any, parallel: ParallelLayout, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_parallel(spec, parallel)
    assert said in caught.value.line() and "\n" not in caught.value.line()


# --- what fits


def test_known_fits() -> None:
    h100, bf16 = load_hardware("H100"), Precision()
    assert not MemoryModel(LLAMA, h100, ParallelLayout(tp=1), bf16).need(0, 0).fits  # 141 GB of weights
    assert MemoryModel(LLAMA, h100, ParallelLayout(tp=4), bf16).need(16, 4096).fits
    assert MemoryModel(OSS, h100, ParallelLayout(), Precision.of_checkpoint(OSS)).need(8, 4096).fits  # its card says so
    fp8 = Precision.of_checkpoint(V3)
    assert not MemoryModel(V3, h100, ParallelLayout(tp=8, ep=8), fp8).need(1, 1024).fits
    assert MemoryModel(V3, load_hardware("H200"), ParallelLayout(tp=8, ep=8), fp8).need(1, 1024).fits
    assert MemoryModel(LLAMA, h100, ParallelLayout(), bf16).largest_batch(4096) == 0


def test_parts_add_up() -> None:
    parallel = ParallelLayout(dp=72, ep=72, redundant=32)
    m = MemoryModel(V3, load_hardware("H100"), parallel, Precision.of_checkpoint(V3)).need(128, 4096)
    assert m.used == sum(m.weights.values()) + m.kv + m.activations
    assert m.kv == 128 * 4096 * 70272 and m.fits == (m.used <= 0.9 * m.capacity)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["DeepSeek-V3", "Llama-3.1-70B", "gpt-oss-120b", "Qwen3.5-397B-A17B", "Mixtral-8x7B"]),
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 3]),
    st.sampled_from(["bf16", "fp8"]), st.integers(0, 40_000), st.integers(0, 20_000), st.booleans(),
)  # fmt: skip
def test_largest_batch_is_the_largest(
    name: str, tp: int, dp: int, pp: int, kv: str, context: int, prefill: int, mtp: bool
) -> None:
    spec, h = load_model(name), load_hardware("B200")
    layout = ParallelLayout(tp=tp, dp=dp, ep=1 if spec.moe is None else min(tp * dp, 8), pp=pp)
    precision = Precision(weights="fp8", kv=kv)
    model = MemoryModel(spec, h, layout, precision, mtp)
    try:
        best = model.largest_batch(context, prefill)
    except PlanError:
        return
    assert model.need(best, context, prefill).fits or best == 0
    assert not model.need(best + 1, context, prefill).fits


def test_bad_counts() -> None:
    h = load_hardware("H100")
    for usable, context, prefill in ((0.9, -1, 0), (0.0, 1, 0), (1.1, 1, 0), (0.9, 1, -1)):
        model = MemoryModel(V3, h, ParallelLayout(), Precision(), usable=usable)
        with pytest.raises(UsageError, match="below 0, or a usable share"):
            model.largest_batch(context, prefill)
        with pytest.raises(UsageError, match="below 0, or a usable share"):
            model.need(1, context, prefill)


def test_activations() -> None:
    """Llama-3.1-70B, tp 8: two hidden states; gate, up, product of 28,672 / 8; float32 logits of 128,256 / 8."""
    token, row = activation_bytes(LLAMA, ParallelLayout(tp=8), Precision())
    assert (token, row) == ((2 * 8192 + 3 * 28672 / 8) * 2, 128256 / 8 * 4)
    token, _ = activation_bytes(V3, ParallelLayout(dp=64, ep=64), Precision())  # 8 picks a token come in as 8 go out
    assert token == (2 * 7168 + 8 * (2 * 7168 + 3 * 2048) + 3 * 2048) * 2


# --- redundant experts


def test_redundant_experts_lower_the_batch() -> None:
    """The `kv_tokens_lost` of a comparison are the tokens by which the largest batch falls."""
    h, precision = load_hardware("H200"), Precision.of_checkpoint(V3)
    batches = [
        MemoryModel(V3, h, ParallelLayout(dp=64, ep=64, redundant=r), precision).largest_batch(1) for r in (0, 64)
    ]
    task = SimpleNamespace(cluster=SimpleNamespace(num_gpus=64, gpus_per_group=1), redundant=64)
    shape = V3.override(expert_bytes=round(expert_bytes(V3, "fp8")), kv_bytes_per_token=70272).moe_shape()
    run = SimpleNamespace(requests=SimpleNamespace(shape=shape), task=task)
    lost = RowFigures._memory(SimpleNamespace(run=run))["kv_tokens_lost"].value  # type: ignore[arg-type]
    token, row = activation_bytes(V3, ParallelLayout(dp=64, ep=64), precision)
    assert batches[0] - batches[1] == pytest.approx(lost * 70272 / (70272 + token + row), abs=1)


def test_weights_are_kept_from_change() -> None:
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(weight_bytes(V3, ParallelLayout(), Precision()))[0, 0] = 0
