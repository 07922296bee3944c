"""Sizing: the smallest cluster for a use, what stops a smaller one, what would help, and the verb."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.cli.app import run
from moeplan.model.catalogue import load_model
from moeplan.perf.cluster_search import SizingSettings, cluster_sizes, smallest_cluster
from moeplan.perf.hardware import load_hardware
from moeplan.perf.layouts import can_overlap, parallels
from moeplan.perf.memory import ParallelLayout, Precision
from moeplan.perf.sensitivity import KNOBS, changed, elasticities, improvements, needs
from moeplan.perf.serving import aggregated, holds
from moeplan.perf.step_model import StepModel, StepOptions, Workload
from moeplan.perf.use_cases import USE_CASES, UseCase

LLAMA, DEEPSEEK = load_model("Llama-3.1-70B"), load_model("DeepSeek-V3")
H100, H200, GB200 = load_hardware("H100"), load_hardware("H200"), load_hardware("GB200")
FP8 = Precision("fp8")


def test_the_use_cases_are_the_papers() -> None:
    lengths = {name: (case.prompt, case.output, case.beams) for name, case in USE_CASES.items()}
    assert lengths == {
        "qa": (1000, 200, 4), "summarise": (15000, 1000, 4), "chat": (2048, 128, 2), "code": (20000, 50, 4)
    }  # fmt: skip
    assert all("GenZ" in case.source for case in USE_CASES.values())


def test_sizes_grow_from_parts_of_a_node() -> None:
    assert cluster_sizes(8, 100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 72, 96]
    assert cluster_sizes(72, 300) == [1, 2, 4, 8, 16, 32, 64, 72, 144, 216, 288]


@pytest.mark.parametrize(("name", "case"), [("Llama-3.1-70B", "summarise"), ("DeepSeek-V3", "code")])
def test_the_smallest_is_found(name: str, case: str) -> None:
    """Every layout of every smaller size, one by one, misses the limits or the memory."""
    spec, use = load_model(name), USE_CASES[case]
    precision = Precision.of_checkpoint(spec)
    answer = smallest_cluster(spec, H200, use, precision)
    assert answer.meets and answer.step_model is not None and answer.serving is not None and answer.full is not None
    gpus = answer.step_model.parallel.gpus
    assert use.miss(answer.serving) <= 1 and use.miss(answer.full) <= 1
    assert answer.batch <= answer.max_batch <= holds(answer.step_model, use.workload)
    for fewer in (n for n in cluster_sizes(8, gpus) if n < gpus):
        for parallel in parallels(spec, fewer, 8):
            layout = StepModel(spec, H200, parallel, precision, StepOptions(gpus_per_node=8))
            for overlap in (False, True) if can_overlap(layout) else (False,):
                tried = replace(layout, options=replace(layout.options, overlap=overlap))
                assert holds(tried, use.workload) < 1 or use.miss(aggregated(tried, use.workload, 1)) > 1
    assert answer.smaller == max(n for n in cluster_sizes(8, gpus) if n < gpus) and answer.why


def test_full_is_as_full_as_it_gets() -> None:
    answer = smallest_cluster(LLAMA, GB200, USE_CASES["qa"], Precision("bf16"))
    assert answer.step_model is not None and answer.limited_by == "TPOT"
    assert USE_CASES["qa"].miss(aggregated(answer.step_model, answer.case.workload, answer.max_batch)) <= 1
    assert USE_CASES["qa"].miss(aggregated(answer.step_model, answer.case.workload, answer.max_batch + 1)) > 1


def test_more_requests_need_more() -> None:
    loose = UseCase("own", 2000, 500, 1, 2.0, 0.05, "")
    few, many = (smallest_cluster(LLAMA, H100, loose, FP8, SizingSettings(n)) for n in (1, 400))
    assert few.step_model is not None and many.step_model is not None
    assert few.step_model.parallel.gpus < many.step_model.parallel.gpus
    assert many.batch * many.step_model.parallel.dp >= 400


def test_memory_stops_what_does_not_fit() -> None:
    answer = smallest_cluster(
        load_model("MoE-100T"), load_hardware("TPU-v5e"), USE_CASES["qa"], FP8, SizingSettings(max_gpus=1024)
    )
    assert (
        not answer.meets and answer.step_model is None and answer.why.startswith("memory: ") and answer.memory_ratio > 5
    )
    answer = smallest_cluster(DEEPSEEK, H200, USE_CASES["summarise"], FP8)
    assert answer.smaller == 4 and answer.why.startswith("memory: ")


def test_a_near_miss_says_so() -> None:
    answer = smallest_cluster(DEEPSEEK, H200, replace(USE_CASES["qa"], tpot_s=0.0105), FP8, SizingSettings(max_gpus=64))
    assert not answer.meets and answer.step_model is not None and answer.close
    assert answer.full is None and 1 < answer.miss < 1.15


SETUPS = [
    StepModel(LLAMA, H100, ParallelLayout(tp=8), Precision("bf16")),
    StepModel(DEEPSEEK, H200, ParallelLayout(dp=16, ep=16), FP8),
    StepModel(DEEPSEEK, H100, ParallelLayout(tp=8, pp=2), FP8),
    StepModel(DEEPSEEK, GB200, ParallelLayout(dp=32, ep=32), FP8, StepOptions(overlap=True)),
]


@pytest.mark.parametrize("layout", SETUPS)
def test_elasticities_add_up(layout: StepModel) -> None:
    """Everything twice as quick makes a step twice as quick: rates and times add up to one."""
    table = elasticities(layout, Workload(4000, 500), 4)
    assert list(table) == list(KNOBS)
    for what in ("ttft", "tpot"):
        worse = sum(table[knob][what] for knob in ("scale_up_latency", "scale_out_latency", "overhead"))
        better = sum(row[what] for row in table.values()) - worse
        assert worse - better == pytest.approx(1, abs=0.03)
        assert all(table[knob][what] <= 1e-9 for knob in ("flops", "memory_bandwidth", "scale_up_bandwidth"))
    held = [holds(changed(layout, "capacity", by), Workload(4000, 500)) for by in (1.0, 1.02)]
    assert table["capacity"]["requests"] == pytest.approx((held[1] / held[0] - 1) / 0.02, rel=0.1)
    assert table["capacity"]["ttft"] == table["capacity"]["tpot"] == 0


def test_improvements_are_just_enough() -> None:
    layout, use = SETUPS[0], UseCase("own", 4000, 500, 1, 0.25, 0.0095, "")
    within = [lambda serving: use.miss(serving) <= 1]
    found = improvements(layout, use.workload, 4, within[0])
    assert use.miss(aggregated(layout, use.workload, 4)) > 1
    factor = found["memory_bandwidth"]
    assert factor is not None and factor > 1.01
    for by, enough in ((factor, True), (factor / 1.02, False)):
        assert (use.miss(aggregated(changed(layout, "memory_bandwidth", by), use.workload, 4)) <= 1) is enough
    assert found["hardware"] is not None and found["hardware"] <= factor
    assert found["all"] is not None and found["all"] <= found["hardware"] * 1.01
    alone, _, everything = needs(found)
    assert f"memory bandwidth {factor:.2f}x higher" in alone and everything.endswith("x faster")
    assert needs({"flops": None, "hardware": None, "all": None}) == (
        "none of them alone", "not even 1,000x faster", "not even 1,000x faster"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "machine"), [("Llama-3.1-70B", "H200,GB200"), ("DeepSeek-V3", "GB200"), ("MoE-100T", "GB300")]
)
def test_the_four_use_cases_are_answered(
    name: str, machine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a cluster and why not a smaller one, or with what would be needed."""
    data = tmp_path / "size.json"
    flags = ["--model", name, "--use-case", "all", "--hardware", machine, "--weights-dtype", "fp8", "--sensitivity"]
    status = run(["size", *flags, "--max-gpus", "1152", "--json", str(data)])
    text, facts = capsys.readouterr().out, json.loads(data.read_text())
    met = [any(a["meets"] for a in case["hardware"].values()) for case in facts["use_cases"].values()]
    assert list(facts["use_cases"]) == list(USE_CASES) and status == (0 if all(met) else 1)
    assert text.count("sensitivity: per cent of change") == 4
    for case in facts["use_cases"].values():
        for answer in case["hardware"].values():
            assert set(answer["elasticities"]) == set(KNOBS)
            if not answer["meets"]:
                assert answer["would_need"]
            elif answer["cluster"]["gpus"] > 1:
                assert answer["smaller"]["why"]


@pytest.mark.slow
def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "size.html"
    flags = ["--use-case", "qa", "--hardware", "H100,GB200,TPU-v5e", "--max-gpus", "32", "--sensitivity"]
    assert run(["size", "--model", "Llama-3.1-70B", *flags, "-o", str(page)]) == 0
    html = page.read_text()
    assert "Bottlenecks of qa" in html and "Hardware that qa would need" in html and html.count("<figure>") == 2
    assert html.count("<td>TPOT</td>") == 3 and "http:" not in html


@pytest.mark.slow
def test_limits_and_lengths_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--prompt-tokens", "4000", "--output-tokens", "500", "--ttft", "1000", "--tpot", "25"]
    assert run(["size", "--model", "gpt-oss-120b", "--hardware", "H200", *own]) == 0
    assert "your use case: 4,000 tokens in, 500 out, 1 beam;" in capsys.readouterr().out
    assert run(["size", "--model", "gpt-oss-120b", "--hardware", "H200", "--use-case", "qa", "--tpot", "0.1"]) == 1
    out = capsys.readouterr().out
    assert "none" in out and "or as given" in out and "; would meet the limits with: " in out


@pytest.mark.slow
def test_drafts_shorten_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["size", "--model", "DeepSeek-V3", "--hardware", "H200", "--use-case", "summarise", "--json", "-"]
    tpot = []
    for more in ([], ["--mtp", "1"]):
        assert run([*flags, *more]) == 0
        answer = json.loads(capsys.readouterr().out)["use_cases"]["summarise"]["hardware"]["H200-SXM"]
        tpot.append(answer["tpot_ms"])
    assert tpot[1] < tpot[0]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "no use case given"),
        (["--prompt-tokens", "100"], "no use case given"),
        (["--use-case", "qa", "--ttft", "-1"], "ttft -1 is not above 0"),
        (["--use-case", "qa", "--concurrency", "0"], "requests and max_gpus must be at least 1"),
        (["--use-case", "qa", "--mtp", "1"], "no MTP (NextN) layers"),
        (["--use-case", "qa", "--hardware", "H100,nothing"], 'unknown hardware "nothing"'),
        (["--use-case", "qa", "--kv-dtype", "fp4"], "no attention kernel is modelled for fp4"),
        (["--use-case", "qa", "--usd-per-hour", "2"], "a price is of one kind of hardware"),
        (["--use-case", "nothing"], "nothing"),
        (["--use-case", "qa", "--model", "Llama-9"], 'unknown model "Llama-9"; near it: '),
        (["--use-case", "qa", "--model", "{config}"], "config.json: num_hidden_layers is missing; add it"),
        (["--use-case", "qa", "--hardware", "Mine", "--hardware-file", "{machine}"], "memory_bytes is missing; docs/"),
    ],
)
def test_bad_input_gets_one_line(
    flags: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, machine = tmp_path / "config.json", tmp_path / "machine.json"
    config.write_text('{"model_type": "llama", "hidden_size": 4096}', encoding="utf-8")
    machine.write_text('{"Mine": {"flops": {"bf16": 1e15}}}', encoding="utf-8")
    given = [flag.format(config=config, machine=machine) for flag in flags]
    model = [] if "--model" in given else ["--model", "Llama-3.1-70B"]
    assert run(["size", *model, *given]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_docs_show_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The quick ones of the examples in docs/guides/size-a-cluster.md."""
    page = (ROOT / "docs" / "guides" / "size-a-cluster.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0].split("\n", 1) for block in page.split("```console\n")[1:]]
    quick = ("--use-case summarise", "--use-case chat", "Llama-3.1-70B --use-case all")
    shown = {command: text for command, text in blocks if "size" in command and any(q in command for q in quick)}
    assert len(shown) == 3
    for command, text in shown.items():
        assert run(command.removeprefix("$ moeplan ").split()) == 0
        assert capsys.readouterr().out.rstrip() == text.rstrip()
