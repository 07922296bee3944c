"""`moeplan estimate`: a breakdown that adds up, the same as JSON, one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import ROOT
from moeplan.cli.app import run
from moeplan.embedded import MODEL

NINE_NODES = [
    "--model",
    "DeepSeek-V3",
    "--hardware",
    "H100",
    "--nodes",
    "9",
    "--gpus-per-node",
    "8",
    "--redundant",
    "32",
]


def estimate(*arguments: str) -> int:
    return run(["estimate", *arguments])


def figures(tmp_path: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    out = tmp_path / "estimate.json"
    assert estimate(*arguments, "--json", str(out)) == 0
    return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_nine_nodes_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3 decode on 9 x 8 H100, as text and as JSON."""
    facts = figures(tmp_path, *NINE_NODES, "--overlap")
    assert sum(o["exposed_ms"] for o in facts["operators"]) == pytest.approx(facts["step_ms"], rel=1e-12)
    assert facts["parallel"] == {"tp": 1, "dp": 72, "ep": 72, "pp": 1, "gpus": 72, "redundant": 32}
    assert facts["tpot_ms"] == facts["step_ms"] and facts["ttft_ms"] is None
    assert facts["tokens_per_s_per_gpu"] == pytest.approx(128 / facts["step_ms"] * 1e3)
    usd = facts["usd_per_gpu_hour"] / 3600 / facts["tokens_per_s_per_gpu"] * 1e6
    assert facts["usd_per_million_tokens"] == pytest.approx(usd)
    assert facts["routing"] == "uniform" and facts["dispatch"] == "pick" and facts["memory"]["fits"]
    text = capsys.readouterr().out
    assert "routing: uniform (no trace was given)" in text and "288 expert slots" in text
    lines = text.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("operator"))) + 2 :]
    shown = [line for line in table[: table.index("")] if not line.startswith(("step", "scale_up:"))]
    step = next(line for line in table if line.startswith("step"))
    assert len(shown) == len(facts["operators"]) and f"{facts['step_ms']:.3f}" in step
    assert f"{facts['tpot_ms']:.2f} ms" in text and "kWh per million tokens" in text


def test_the_page_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "guides" / "estimate.md").read_text(encoding="utf-8")
    block = page.split("```console\n")[1].split("```")[0]
    command, shown = block.split("\n", 1)
    assert run(command.removeprefix("$ moeplan ").split()) == 0
    assert capsys.readouterr().out == shown


def test_prefill_and_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefill = figures(tmp_path, *NINE_NODES, "--phase", "prefill", "--batch", "2", "--context", "4096")
    assert prefill["dispatch"] == "node" and prefill["tpot_ms"] is None
    assert prefill["tokens_per_s_per_gpu"] == pytest.approx(2 * 4096 / prefill["ttft_ms"] * 1e3)
    dense = figures(
        tmp_path,
        "--model",
        "llama-3.1-70b",
        "--hardware",
        "h200",
        "--tp",
        "4",
        "--kv-dtype",
        "fp8",
        "--weights-dtype",
        "fp8",
    )
    assert dense["parallel"]["gpus"] == 4 and dense["routing"] is None and dense["dispatch"] is None
    assert "routing" not in capsys.readouterr().out.split("Llama")[-1]


def test_flags_change_what_they_say(tmp_path: Path) -> None:
    plain = figures(tmp_path, *NINE_NODES)
    drafted = figures(tmp_path, *NINE_NODES, "--mtp", "1", "--accepted", "1.9")
    assert drafted["step_ms"] > plain["step_ms"] and drafted["tpot_ms"] < drafted["step_ms"]
    assert any(o["name"] == "drafts" for o in drafted["operators"])
    assert figures(tmp_path, *NINE_NODES, "--skew", "2")["load_ratio"] == pytest.approx(2)
    assert figures(tmp_path, *NINE_NODES, "--balanced")["load_ratio"] == 1
    assert figures(tmp_path, *NINE_NODES, "--dispatch", "allgather")["dispatch"] == "allgather"
    prices = tmp_path / "mine.json"
    prices.write_text('{"H100": {"usd_per_hour": 1.5}}', encoding="utf-8")
    cheap = figures(tmp_path, *NINE_NODES, "--hardware-file", str(prices))
    assert cheap["usd_per_million_tokens"] == pytest.approx(plain["usd_per_million_tokens"] / 2)
    own = figures(tmp_path, *NINE_NODES, "--usd-per-hour", "6")
    assert own["usd_per_million_tokens"] == pytest.approx(plain["usd_per_million_tokens"] * 2)


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--model", "DeepSeek-V3", "--hardware", "H100", "--tp", "8", "--batch", "8") == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_json_on_standard_output_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate(*NINE_NODES, "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"] == "DeepSeek-V3" and "operator" in captured.err


ONE_NODE = ["--model", "DeepSeek-V3", "--hardware", "H100"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "deepseek-v9", "--hardware", "H100"], 'unknown model "deepseek-v9"; near it: '),
        (["--model", "DeepSeek-V3", "--hardware", "H999"], 'unknown hardware "H999"; the catalogue has A100'),
        ([*ONE_NODE, "--nodes", "9"], "256 experts and 0 redundant slots do not divide over ep 72; redundant 32 does"),
        ([*ONE_NODE, "--tp", "3"], "tp 3 x pp 1 does not divide the 8 GPUs"),
        ([*ONE_NODE, "--gpus-per-node", "8", "--tp", "2", "--dp", "2"], "tp 2 x dp 2 x pp 1 = 4 GPUs, but there are 8"),
        (
            ["--model", "Llama-3.1-70B", "--hardware", "H100", "--tp", "5", "--dp", "1"],
            "tp 5 does not divide the 64 heads",
        ),
        (["--model", "Llama-3.1-70B", "--hardware", "H100", "--tp", "8", "--ep", "8"], "Llama-3.1-70B has no experts"),
        ([*ONE_NODE, "--ep", "4", "--dispatch", "pick"], "dispatch pick needs whole experts"),
        ([*ONE_NODE, "--kv-dtype", "int4"], 'unknown dtype "int4" for kv'),
        ([*ONE_NODE, "--batch", "0"], "batch and context must be at least 1"),
        ([*ONE_NODE, "--skew", "0.5"], "skew 0.5 is below 1"),
        ([*ONE_NODE, "--skew", "9"], "skew 9 is more than the 8 GPUs that share the experts"),
        ([*ONE_NODE, "--mtp", "1", "--accepted", "3"], "a step with 1 drafts cannot yield 3 tokens"),
        ([*ONE_NODE, "--mtp", "1", "--phase", "prefill"], "draft tokens are of decode"),
        ([*ONE_NODE, "--usd-per-hour", "-1"], "a price of -1 is negative"),
        ([*ONE_NODE, "--tp", "8", "--overlap"], "two-batch overlap hides dispatch and combine, and here is neither"),
        (["--model", "gpt-oss-120b", "--hardware", "H100", "--phase", "encode"], 'Invalid value "encode" for --phase'),
    ],
)
def test_what_cannot_be_gets_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert estimate(*arguments, "--json", str(out)) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1 and not out.exists()


def test_a_configuration_with_missing_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "hidden_size": 4096}', encoding="utf-8")
    assert estimate("--model", str(path), "--hardware", "H100") == 2
    said = capsys.readouterr().err
    assert "config.json" in said and "is missing" in said and said.count("\n") == 1


# ---- real routing


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plans of the embedded trace: linear, eplb, paper-unbalanced."""
    folder = tmp_path_factory.mktemp("plans")
    where = ["--nodes", "4", "--gpus-per-node", "2", "--redundant", "8"]
    for name in ("linear", "eplb", "paper-unbalanced"):
        assert run(["plan", "embedded", *where, "--strategy", name, "-o", str(folder / name)]) == 0
    return folder


def real(plan: Path, *more: str) -> list[str]:
    return ["--trace", "embedded", "--plan", str(plan), "--hardware", "H100", *more]


@pytest.mark.slow
def test_real_routing_is_that_of_a_replay(plans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same steps, counted and timed as `replay --hardware` does; and uniform routing beside it."""
    facts = figures(tmp_path, *real(plans / "eplb"))
    text = capsys.readouterr().out
    table = tmp_path / "replay.json"
    flags = ["--plan", str(plans / "eplb"), "--hardware", "H100", "--steps", "50", "--json", str(table)]
    assert run(["evaluate", "embedded", *flags]) == 0
    said = json.loads(table.read_text(encoding="utf-8"))["strategies"]["eplb"]
    assert facts["step_ms"] == pytest.approx(said["modelled_step_ms"]["value"])
    assert facts["real"]["local_share"] == pytest.approx(1 - said["remote_share"]["value"])
    assert facts["load_ratio"] == pytest.approx(said["gpu_load_ratio"]["value"], rel=1e-6)
    assert facts["real"]["experts_per_gpu"] == pytest.approx(said["experts_per_gpu"]["value"])
    assert sum(o["exposed_ms"] for o in facts["operators"]) == pytest.approx(facts["step_ms"], rel=1e-12)
    assert facts["routing"] == "real" and facts["real"]["fitted_on_this_trace"]
    assert facts["parallel"] == {"tp": 2, "dp": 4, "ep": 8, "pp": 1, "gpus": 8, "redundant": 8}
    assert "routing: real, 50 steps of embedded" in text and "note: the plan was fitted on this trace" in text
    flat = figures(
        tmp_path, "--model", str(MODEL), "--hardware", "H100", "--nodes", "4", "--gpus-per-node", "2", "--tp", "2",
        "--redundant", "8",
    )  # fmt: skip
    assert facts["real"]["uniform"]["step_ms"] == pytest.approx(flat["step_ms"]) and flat["routing"] == "uniform"


def test_a_better_plan_has_less_load_and_less_time(plans: Path, tmp_path: Path) -> None:
    """At a batch that the host does not hold up."""
    linear, eplb = (figures(tmp_path, *real(plans / name, "--batch", "8")) for name in ("linear", "eplb"))
    assert eplb["load_ratio"] < linear["load_ratio"] and eplb["idle_share"] < linear["idle_share"]
    assert eplb["step_ms"] < linear["step_ms"] and linear["batch"] == 8
    halves = figures(tmp_path, *real(plans / "eplb", "--batch", "8", "--overlap"))
    assert halves["overlap"] and halves["step_ms"] != eplb["step_ms"]


@pytest.mark.parametrize(("nodes", "deployment"), [("1", "nodes"), ("2", "gpus")])
def test_real_routing_of_other_deployments(nodes: str, deployment: str, tmp_path: Path) -> None:
    """One node: tokens do not travel; a GPU as home: as many data-parallel ranks as GPUs."""
    plan = tmp_path / "plan"
    where = [
        "--nodes",
        nodes,
        "--gpus-per-node",
        "4",
        "--deployment",
        deployment,
        "--strategy",
        "linear",
        "-o",
        str(plan),
    ]
    assert run(["plan", "embedded", *where]) == 0
    facts = figures(tmp_path, *real(plan, "--batch", "4"))
    assert facts["dispatch"] == (None if nodes == "1" else "pick")
    assert (facts["parallel"]["tp"], facts["parallel"]["dp"]) == ((4, 1) if nodes == "1" else (1, 8))
    assert sum(o["exposed_ms"] for o in facts["operators"]) == pytest.approx(facts["step_ms"], rel=1e-12)
    assert nodes != "1" or facts["real"]["local_share"] == 1


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--nodes", "4"], "--nodes does not go with --plan"),
        (["--gpus-per-node", "2"], "--gpus-per-node does not go with --plan"),
        (["--phase", "prefill"], "--phase does not go with --plan"),
        (["--mtp", "1"], "--mtp does not go with --plan"),
        (["--batch", "100000"], "that are live at a time; leave --batch out, or give 1 to "),
        (["--model", "gpt-oss-20b"], "the trace and gpt-oss-20b differ in hidden size"),
        (["--without-layers", "1"], "the trace and the plan differ in layers"),
        (["--dispatch", "gpu", "--context", "0"], "--context 0 is not positive"),
    ],
)
def test_what_real_routing_cannot_have(
    plans: Path, more: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert estimate(*real(plans / "linear", *more)) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_real_routing_needs_both_and_equal_groups(plans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--trace", "embedded", "--hardware", "H100") == 2
    assert "--trace and --plan go together" in capsys.readouterr().err
    assert estimate(*real(plans / "nothing")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert estimate(*real(plans / "paper-unbalanced")) == 2
    assert "groups of unlike size" in capsys.readouterr().err
    assert estimate("--hardware", "H100") == 2
    assert "--model is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_pages(plans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert estimate(*real(plans / "linear", "-o", str(page))) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<figure>") == 3 and "http:" not in html
    assert "Routing is real" in html and "This plan: " in html and "<th" in html
    assert estimate(*NINE_NODES, "--phase", "prefill", "--batch", "2", "--overlap", "-o", str(page)) == 0
    html = page.read_text(encoding="utf-8")
    assert "TTFT against the skew of expert load" in html and "Routing is uniform" in html
    assert estimate("--model", "Llama-3.1-70B", "--hardware", "H100", "--tp", "8", "-o", str(page)) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<figure>") == 2 and "skew" not in html and "uniform" not in html
    assert "wrote " in capsys.readouterr().out
    assert estimate(*NINE_NODES, "-o", "/nowhere/page.html") == 2
