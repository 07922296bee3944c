"""The catalogue of hardware, and a user's own file of its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.errors import FormatError, UsageError
from moeplan.perf.hardware import REQUIRED, hardware_names, load_hardware


@pytest.mark.parametrize("name", hardware_names())
def test_hardware_entries(name: str) -> None:
    h = load_hardware(name)
    assert set(h.sources) == set(REQUIRED)
    assert h.flops["bf16"] > 1e14 and h.memory_bytes > 1.6e10 and h.memory_bytes_per_s > 8e11
    assert h.scale_up.bytes_per_s > h.scale_out.bytes_per_s > 1e9
    assert h.sources["usd_per_hour"].startswith("assumption")
    assert h.flops.get("fp4", 1e99) > h.flops.get("fp8", 0) >= h.flops["bf16"] or "fp8" not in h.flops


def test_hardware_facts() -> None:
    assert load_hardware("gb200").scale_up_size == 72
    assert (
        load_hardware("H800").scale_up.bytes_per_s == 200e9 and load_hardware("h100_sxm").scale_up.bytes_per_s == 450e9
    )
    assert "fp8" not in load_hardware("A100").flops and "fp4" not in load_hardware("H200").flops
    for name in ("h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300", "MI300X", "v5e", "TPU v6e"):
        assert load_hardware(name)


def test_unknown_hardware_names_the_near_ones() -> None:
    with pytest.raises(UsageError, match=r'unknown hardware "H1000"; near it: .*H100-SXM'):
        load_hardware("H1000")
    with pytest.raises(UsageError, match="the catalogue has A100"):
        load_hardware("")


def test_own_hardware(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"h100-sxm": {"usd_per_hour": 1.5}}))
    ours, theirs = load_hardware("H100", path), load_hardware("H100")
    assert ours.usd_per_hour == 1.5 and ours.flops == theirs.flops and str(path) in ours.sources["usd_per_hour"]
    assert ours.sources["flops"] == theirs.sources["flops"] and theirs.usd_per_hour == 3.0
    new = {
        "flops": {"bf16": 1e15}, "memory_bytes": 1e11, "memory_bytes_per_s": 1e13, "scale_up_size": 4, "watts": 500,
        "scale_up": {"bytes_per_s": 1e11, "latency_s": 1e-6}, "scale_out": {"bytes_per_s": 1e10, "latency_s": 1e-6},
        "usd_per_hour": 2,
    }  # fmt: skip
    path.write_text(json.dumps({"Mine": new | {"aliases": ["m1"], "sources": {"watts": "my bill"}}}))
    assert load_hardware("M1", path).sources["watts"] == "my bill" and "Mine" in hardware_names(path)
    for change, said in (
        ({"watts": None}, "Mine: watts is missing"),
        ({"watts": "500"}, "Mine: watts is 500, not a number"),
        ({"watts": float("nan")}, "watts is nan"),
        ({"memory": 1e11}, "unknown key memory"),
        ({"flops": {"bf17": 1e15}}, "unknown key flops.bf17"),
        ({"flops": {}}, "flops is empty"),
        ({"scale_up": 1e11}, "scale_up is 100000000000.0, not an object"),
        ({"scale_up": {"bytes_per_s": 1e11}}, "scale_up.latency_s is missing"),
        ({"scale_up_size": 0}, "scale_up_size is 0"),
        ({"sources": ["x"]}, "sources is"),
        ({"aliases": [1]}, "aliases[0] is 1, not text"),
    ):
        path.write_text(json.dumps({"Mine": new | change}))
        with pytest.raises(FormatError) as caught:
            load_hardware("Mine", path)
        assert said in caught.value.line() and str(path) in caught.value.line()
    path.write_text('{"Mine": 3}')
    with pytest.raises(FormatError, match="Mine: is 3, not an object"):
        load_hardware("H100", path)
