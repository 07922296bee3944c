"""Serving: what a request waits for, what the memory holds, speculation, beams, prefill apart, cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moeplan.errors import UsageError
from moeplan.model.catalogue import load_model
from moeplan.perf.hardware import load_hardware
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.serving import aggregated, cost, disaggregated, prefill_seconds
from moeplan.perf.step_model import StepModel, Workload

H200 = load_hardware("H200")
LLAMA = StepModel(load_model("Llama-3.1-70B"), H200, ParallelLayout(tp=8), Precision("fp8"))
DEEPSEEK = StepModel(load_model("DeepSeek-V3"), H200, ParallelLayout(tp=8), Precision("fp8"))
CHAT = Workload(1024, 1024)


def test_aggregated_serving_shares_its_time() -> None:
    """A token waits for the others' prefills; one request alone waits for none."""
    alone, busy = aggregated(LLAMA, CHAT, 1), aggregated(LLAMA, CHAT, 64)
    assert alone.tpot_s == pytest.approx(float(alone.decode.seconds))
    assert busy.tpot_s > float(busy.decode.seconds)
    assert busy.output_per_s > 10 * alone.output_per_s
    assert busy.total_per_s == pytest.approx(2 * busy.output_per_s)
    longer = aggregated(LLAMA, Workload(8192, 1024), 64)
    assert longer.tpot_s > busy.tpot_s and longer.prefill_share > busy.prefill_share
    assert 0 < busy.prefill_share < 1


def test_mixed_steps_cost_less() -> None:
    mixed, apart = (aggregated(LLAMA, CHAT, 64, mixed=m) for m in (True, False))
    assert mixed.tpot_s < apart.tpot_s and mixed.ttft_s == pytest.approx(apart.ttft_s)


def test_requests_that_do_not_fit_wait() -> None:
    one = replace(LLAMA, parallel=ParallelLayout(tp=1))
    load = Workload(1024, 8192)
    few, many = aggregated(one, load, 8), aggregated(one, load, 256)
    assert few.running == 8 and many.running < 64
    assert many.ttft_s > 10 * few.ttft_s
    with pytest.raises(
        UsageError, match=r"Llama-3.1-70B with one request of 1536 tokens does not fit H100-SXM at tp 1"
    ):
        aggregated(replace(one, precision=Precision("bf16"), hardware=load_hardware("H100")), CHAT, 1)


def test_chunks_add_up_to_a_prompt() -> None:
    whole, chunks = prefill_seconds(LLAMA, 8192), prefill_seconds(LLAMA, 8192, chunk=2048)
    assert whole < chunks < 1.3 * whole
    assert prefill_seconds(LLAMA, 8192, decoding=(32, 2000)) < whole


def test_disaggregated_serving_keeps_tokens_apart_from_prefills() -> None:
    together = aggregated(LLAMA, Workload(8192, 1024), 32)
    apart = disaggregated(LLAMA, LLAMA, Workload(8192, 1024), 32, prefill_workers=2)
    assert apart.tpot_s < together.tpot_s and apart.gpus == 24
    assert apart.tpot_s == pytest.approx(float(apart.decode.seconds))
    starved = disaggregated(LLAMA, LLAMA, Workload(8192, 64), 64)  # one prefill worker cannot feed it
    assert starved.output_per_s * starved.gpus == pytest.approx(64 / prefill_seconds(LLAMA, 8192))


def test_speculation_pays_by_acceptance() -> None:
    plain = aggregated(DEEPSEEK, CHAT, 16)
    good, bad = (aggregated(DEEPSEEK, replace(CHAT, drafts=1, accepted=a), 16) for a in (1.9, 1.0))
    assert good.tpot_s < plain.tpot_s < bad.tpot_s
    free = aggregated(DEEPSEEK, replace(CHAT, drafts=1, accepted=1.9, module=False), 16)
    assert free.tpot_s < good.tpot_s


def test_beams_share_their_prompt() -> None:
    load = Workload(8000, 200)
    one, four = (aggregated(LLAMA, replace(load, beams=b), 16) for b in (1, 4))
    assert float(one.decode.seconds) < float(four.decode.seconds) < 2 * float(one.decode.seconds)
    assert four.decode.exposed("beam reorder") > 0
    sequences = LLAMA.decode(64, load.context)  # 64 requests without anything in common
    assert float(four.decode.seconds) < float(sequences.seconds)


def test_cost_of_tokens() -> None:
    """1,000 tokens a second: a million take 1,000 seconds."""
    usd, kwh = cost(H200.priced(3.6), 1000.0)
    assert usd == pytest.approx(1.0) and kwh == pytest.approx(0.7 * 1000 / 3600)
    assert cost(H200, 1000.0)[0] == pytest.approx(H200.usd_per_hour / 3.6)


@pytest.mark.parametrize(
    ("load", "line"),
    [
        ({"prompt": 0, "output": 1}, "must be at least 1"),
        ({"prompt": 1, "output": 1, "drafts": 1, "accepted": 2.5}, "a step with 1 drafts cannot yield 2.5 tokens"),
    ],
)
def test_impossible_loads(load: dict[str, float], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Workload(**load)  # type: ignore[arg-type]


def test_measured_servers(shared: Path) -> None:
    """H200, one worker of 8, DeepSeek-V3 on SGLang (InferenceX): no more error than docs/results/accuracy.md tells."""
    if not (shared / "measured" / "published_targets.csv").is_file():
        pytest.skip("../shared/measured is not on this machine")
    said = {4: 10.3, 8: 12.5, 16: 16.6, 32: 23.3, 64: 33.0}  # published_targets.csv, inferencex-h200-tp8-1k
    errors = sorted(abs(1e3 * aggregated(DEEPSEEK, CHAT, b, mixed=False).tpot_s / ms - 1) for b, ms in said.items())
    assert errors[2] < 0.30  # SGLang's own kernels are quicker than those fitted: see docs/results/accuracy.md
