"""Operator times and their constants: physical limits, monotony, refusals; errors on the measured check part."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.errors import FormatError, UsageError
from moeplan.perf.attention import (
    Heads,
    MlaShape,
    attention_decode,
    attention_prefill,
)
from moeplan.perf.constants import FILE, Constants, load_constants
from moeplan.perf.hardware import load_hardware
from moeplan.perf.operators import FORMATS, UNITS, Device, Time, elementwise, expert_gemm, gemm

H100 = load_hardware("H100")
DEVICE = Device(H100)
SIZES = st.integers(1, 20000)
GROUPED = Heads(32, 8, 128)
KINDS = [kind for kind, form in FORMATS.items() if form.rate in H100.flops]


def bound(time: Time) -> object:
    """What would take longest alone, of each time."""
    longest = np.argmax(np.stack(np.broadcast_arrays(*time.parts.values())), axis=0)
    return np.array(list(time.parts))[longest].tolist()


@settings(max_examples=60, deadline=None)
@given(m=SIZES, n=SIZES, k=SIZES, kind=st.sampled_from(KINDS))
def test_gemm_never_beats_the_hardware(m: int, n: int, k: int, kind: str) -> None:
    time, form = gemm(DEVICE, m, n, k, kind), FORMATS[kind]
    assert time.seconds >= 2 * m * n * k / H100.flops[form.rate]
    assert time.seconds >= form.weight_bytes * n * k / H100.memory_bytes_per_s
    assert time.seconds <= 1.001 * sum(time.parts.values())


def test_gemm_by_hand() -> None:
    """One fp8_block tile: 64 rows, 32 columns is the least work; memory and launch as the formula says."""
    fit, form = load_constants().gemm_fp8_block, FORMATS["fp8_block"]
    m, n, k = 64, 32, 4096
    operations = 2 * 64 * 32 / (H100.flops["fp8"] / UNITS * fit.compute)
    loads = (64 * form.input_bytes + 32 * form.weight_bytes) / (H100.flops["bf16"] / UNITS * fit.feed)
    compute = (k + fit.fill) * max(operations, loads)
    compute *= 1 + fit.throttle * compute / (compute + 1e-3)
    memory = (form.input_bytes * m * k + form.weight_bytes * n * k + 2 * m * n) / (H100.memory_bytes_per_s * fit.memory)
    convert = (2 + 2 * form.input_bytes) * m * k / (H100.memory_bytes_per_s * fit.quantise)
    both = (compute**fit.overlap + memory**fit.overlap) ** (1 / fit.overlap)
    assert gemm(DEVICE, m, n, k, "fp8_block").seconds == pytest.approx(fit.launch_s + convert + both)


def test_gemm_broadcasts_and_names_what_bounds_it() -> None:
    time = gemm(DEVICE, np.array([1, 64, 8192]), 7168, 7168)
    assert time.seconds.shape == (3,)
    assert bound(time) == ["memory", "memory", "compute"]
    alone = [gemm(DEVICE, m, 7168, 7168).seconds for m in (1, 64, 8192)]
    np.testing.assert_allclose(time.seconds, alone)
    assert bound(gemm(DEVICE, 1, 64, 64)) == "overhead"


def test_a_tile_more_is_a_wave_more() -> None:
    """132 tiles of 128 x 128 fill the units once; the 133rd starts a second wave."""
    full = gemm(DEVICE, 128 * 12, 128 * 11, 16384, "fp8").parts["compute"]
    more = gemm(DEVICE, 128 * 12, 128 * 11 + 1, 16384, "fp8").parts["compute"]
    assert more > 1.9 * full


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 64), tokens=st.integers(1, 8192), context=st.integers(0, 8192), heads=st.sampled_from([8, 32])
)
def test_prefill_respects_the_peak_and_grows_with_context(batch: int, tokens: int, context: int, heads: int) -> None:
    pairs = tokens * context + tokens * tokens / 2
    time = attention_prefill(DEVICE, Heads(heads, 8, 128), batch, tokens, context=context)
    assert time.seconds >= 4 * batch * heads * pairs * 128 / H100.flops["bf16"]
    assert attention_prefill(DEVICE, Heads(heads, 8, 128), batch, tokens, context=context + 512).seconds > time.seconds


def test_chunks_cost_no_less_than_the_whole() -> None:
    whole = attention_prefill(DEVICE, GROUPED, 1, 8192).seconds
    chunks = sum(attention_prefill(DEVICE, GROUPED, 1, 2048, context=at).seconds for at in range(0, 8192, 2048))
    assert whole < chunks < 1.6 * whole


def test_a_window_bounds_prefill_and_decode() -> None:
    windowed = dataclasses.replace(GROUPED, window=1024)
    assert attention_prefill(DEVICE, windowed, 1, 16384).seconds < 0.3 * (
        attention_prefill(DEVICE, GROUPED, 1, 16384).seconds
    )
    assert attention_decode(DEVICE, windowed, 64, 16384).seconds == pytest.approx(
        attention_decode(DEVICE, GROUPED, 64, 1024).seconds
    )


def test_decode_reads_the_cache() -> None:
    read = 64 * 8192 * 8 * 128 * 2 * 2 / H100.memory_bytes_per_s
    assert read < attention_decode(DEVICE, GROUPED, 64, 8192).seconds < 1.3 * read
    half = attention_decode(DEVICE, GROUPED, 64, 8192, kv_dtype="fp8").seconds
    assert half < attention_decode(DEVICE, GROUPED, 64, 8192).seconds
    small = Heads(8, 1, 128), 8, 4096
    assert attention_decode(DEVICE, *small, warm=True).seconds < attention_decode(DEVICE, *small).seconds


def test_speculated_tokens_cost_less_than_steps() -> None:
    one = attention_decode(DEVICE, MlaShape(heads=16), 64, 4096).seconds
    assert one <= attention_decode(DEVICE, MlaShape(heads=16), 64, 4096, tokens=3).seconds < 1.5 * one
    assert attention_decode(DEVICE, MlaShape(heads=16), 64, 4096, kv_dtype="fp8").seconds > one  # converted first


def test_mla_blocks_hold_their_kernels() -> None:
    from mla_blocks import mla_layer_decode, mla_layer_prefill

    shape = MlaShape(heads=16)
    assert (
        mla_layer_decode(DEVICE, shape, 64, 4096).seconds
        > attention_decode(DEVICE, MlaShape(heads=16), 64, 4096).seconds
    )
    part = mla_layer_decode(DEVICE, shape, 64, 4096, down=False).seconds
    assert part < mla_layer_decode(DEVICE, shape, 64, 4096).seconds
    graph, host = (mla_layer_prefill(DEVICE, shape, 1, 128, graph=g) for g in (True, False))
    assert graph.seconds < host.seconds
    assert bound(host) == "host"


@settings(max_examples=40, deadline=None)
@given(picks=st.integers(1, 20000), experts=st.integers(1, 32), kernel=st.sampled_from(["deepgemm", "cutlass"]))
def test_experts_read_each_weight_once_and_grow_with_picks(picks: int, experts: int, kernel: str) -> None:
    time = expert_gemm(DEVICE, picks, experts, 7168, 2048, kernel=kernel).seconds
    assert time >= experts * 3 * 7168 * 2048 / H100.memory_bytes_per_s
    assert time >= picks * 6 * 7168 * 2048 / H100.flops["fp8"]
    assert expert_gemm(DEVICE, picks + 1, experts, 7168, 2048, kernel=kernel).seconds > time
    assert expert_gemm(DEVICE, picks, experts + 1, 7168, 2048, kernel=kernel).seconds > time


def test_times_add_up() -> None:
    from mla_blocks import total

    a, b = elementwise(DEVICE, 1e9), gemm(DEVICE, 16, 1024, 1024)
    both = total(a, b * 2)
    assert both.seconds == pytest.approx(a.seconds + 2 * b.seconds)
    assert both.parts["memory"] == pytest.approx(a.parts["memory"] + 2 * b.parts["memory"])


def test_dtypes_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"dtype fp16x is unknown; use one of bf16, "):
        gemm(DEVICE, 1, 1, 1, "fp16x")
    with pytest.raises(UsageError, match=r"H100-SXM does not compute in fp4; use one of bf16, fp8"):
        gemm(DEVICE, 1, 1, 1, "fp4")
    with pytest.raises(UsageError, match="expert kernel triton is unknown; use deepgemm, contiguous or cutlass"):
        expert_gemm(DEVICE, 1, 1, 64, 64, kernel="triton")


# ----------------------------------------------------------------------------------------------------------------------
# Constants


def test_shipped_constants_are_described() -> None:
    data = json.loads(FILE.read_text())
    assert "aiconfigurator-core 0.12.0" in data["attribution"] and "Apache-2.0" in data["attribution"]
    assert set(data["groups"]) == set(Constants.groups())
    for group in data["groups"].values():
        assert group["split"] and all(v["unit"] and v["meaning"] for v in group["values"].values())
        assert group["median_error"] is None or group["median_error"]["check"] < 0.15


def test_the_catalogue_still_says_what_the_shares_refer_to() -> None:
    """Where it fails: the catalogue's H100 or H200 changed, so refit by benchmarks/time_fit.py."""
    for name, figures in json.loads(FILE.read_text())["hardware"].items():
        now = dataclasses.asdict(load_hardware(name))
        assert {key: now[key] for key in figures} == figures


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: d["groups"].pop("gemm_fp8"), "groups.gemm_fp8 is missing"),
        (lambda d: d["groups"].update(extra={}), "unknown key groups.extra"),
        (lambda d: d["groups"]["gemm_fp8"]["values"].pop("memory"), "gemm_fp8.values.memory is missing"),
        (
            lambda d: d["groups"]["gemm_fp8"]["values"]["memory"].update(value="fast"),
            "memory.value is fast, not a number",
        ),
        (lambda d: d["groups"]["gemm_fp8"]["values"]["memory"].update(value=-1), "memory.value is -1, not a number"),
        (lambda d: d["groups"]["gemm_fp8"]["values"]["memory"].update(value=0), "memory is 0, and is divided by"),
        (lambda d: d.update(version=2), "is not moeplan-constants version 1"),
        (lambda d: d.update(groups=[]), "groups is a list, not an object"),
    ],
)
def test_bad_constants_name_the_place(tmp_path: Path, spoil, says: str) -> None:  # type: ignore[no-untyped-def]
    data = json.loads(FILE.read_text())
    spoil(data)
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        load_constants(path)
    assert says in caught.value.line() and str(path) in caught.value.line() and "\n" not in caught.value.line()


def test_constants_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_constants(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": ')
    with pytest.raises(FormatError, match="invalid or truncated JSON"):
        load_constants(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("table", "args", "bar"),
    [("gemm_table", ("fp8_block",), 0.15), ("decode_table", ("bf16",), 0.15), ("prefill_table", ("bf16",), 0.15),
     ("mla_table", (), 0.15), ("deepgemm_table", (), 0.12)],
)  # fmt: skip
def test_measured_kernels_are_met(shared: Path, table: str, args: tuple[str, ...], bar: float) -> None:
    """The check part, H200: rows that no fit saw."""
    import time_tables

    measured = getattr(time_tables, table)("h200", *args)
    assert np.median(abs(measured.errors(load_constants())[~measured.fitted])) <= bar
