"""What prompts alone give of the gain that the prefill's own routing gives; calibration, and time.

    python benchmarks/prediction.py [--set gpt-oss-20b] [--signature-tokens 48] [--scaling 1000] [--json FILE] [--page]

Real sets are read from ../shared/traces (NAME.npz, and NAME.prompt-tokens.npz with `tokens` and `offsets`), or from a
trace that keeps prompts (--trace). Plans are those of `moeplan compare`, for 8 nodes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeplan import Cluster, EvaluationSettings, compare, open_trace, read_requests
from moeplan.importers.arrays import import_arrays
from moeplan.importers.options import ImportOptions
from moeplan.planning import RequestSet
from moeplan.planning.assignment import equal_groups
from moeplan.planning.plan import PlanningTask
from moeplan.planning.prediction import Prediction
from moeplan.planning.predictor import PromptPredictor
from moeplan.planning.prompt_router import chosen_share, prompt_router
from moeplan.planning.prompt_text import GroupScores, PromptText
from moeplan.planning.router import LinearRouter
from moeplan.planning.solver import solve
from moeplan.replay.evaluator import EvaluationRun
from moeplan.trace.prompts import PromptFeatures, PromptPolicy
from moeplan.trace.retention import RetentionPolicy

REAL = Path(__file__).parents[2] / "shared" / "traces"
ROWS = ("domain", "prompt-tokens", "previous-turn", "prefill", "oracle")
CLUSTER, REDUNDANT = Cluster(8, 1), (0, 8)
PAGE = Path(__file__).parents[1] / "docs" / "concepts" / "prediction.md"


def real_trace(name: str, folder: Path, signature_tokens: int | None = 48) -> RequestSet:
    """A real set with its prompts, imported."""
    prompts = np.load(REAL / f"{name}.prompt-tokens.npz")
    with np.load(REAL / f"{name}.npz") as arrays:
        together = {key: arrays[key] for key in arrays.files}
    together |= {"prompt_tokens": prompts["tokens"], "prompt_offsets": prompts["offsets"]}
    np.savez(folder / "together.npz", **together)
    options = ImportOptions(retention=RetentionPolicy(prompts=PromptPolicy("ids")))
    import_arrays(folder / "together.npz", folder / "trace", options)
    return read_requests(open_trace(folder / "trace"), signature_tokens=signature_tokens)


def shares_of_prefill(requests: RequestSet, redundant: int, folds: int) -> dict[str, float]:
    """Gain of each row against `linear`, as a share of the gain of `prefill`; under "gain", that gain itself."""
    settings = EvaluationSettings(folds=folds, steps=20)
    table = compare(requests, CLUSTER, ("moeplan",), redundant=redundant, settings=settings)
    value = {row.name: row.figures["remote_share"].value or np.nan for row in table.rows}
    gain = {
        kind: 1 - value[name] / value["linear"]
        for kind in ROWS
        if (name := "moeplan" if kind == "prefill" else f"moeplan/{kind}") in value
    }
    return {kind: own / gain["prefill"] for kind, own in gain.items()} | {"gain": gain["prefill"]}


def calibration(requests: RequestSet, redundant: int, folds: int) -> list[tuple[float, float]]:
    """(expected, realised) local share of held-out requests, in each decile of what was expected, over all folds."""
    task, expected, real = PlanningTask(CLUSTER, redundant), [], []
    run = EvaluationRun.split(requests, task, EvaluationSettings(folds=folds), "{} fit requests are too few", "")
    for fold, (fit, test) in enumerate(run.parts):
        plan = solve(requests.problem(task, fit), "moeplan", fold)
        local = plan.routes.local_share
        prediction = Prediction.fit(requests, fit).calibrated(requests, fit, plan.router, local)
        scores = prompt_router(plan.router, local).scores(prediction.expected_use(requests, test, "prompt-tokens"))
        score, share = chosen_share(scores, equal_groups(scores), local, requests.use[test])
        assert prediction.calibration is not None
        expected.append(prediction.calibration.expected(score))
        real.append(share)
    together, true = np.concatenate(expected), np.concatenate(real)
    parts = np.array_split(np.argsort(together, kind="stable"), 10)
    return [(float(together[part].mean()), float(true[part].mean())) for part in parts]


def microseconds(requests: RequestSet, tokens: int = 1000, groups: int = 8) -> dict[str, float]:
    """Percentiles of the time from a prompt's token ids to scores of groups, and of a further turn of 50 tokens."""
    assert requests.prompts is not None
    predictor = PromptPredictor.fit(requests.prompts, requests.use)
    rng = np.random.default_rng(0)
    weights = rng.random((groups, predictor.mean.size), dtype=np.float32)
    scores = GroupScores.of(predictor, LinearRouter(weights, np.zeros(groups)))
    prompt = rng.choice(requests.prompts.tokens, tokens + 50).astype(np.uint32)
    whole, further = [], []
    for turn in range(2200):
        start = time.perf_counter()
        text = PromptText(predictor).append_ids(prompt[:tokens])
        scores.scores(text.coordinates)
        middle = time.perf_counter()
        scores.scores(text.append_ids(prompt[tokens:]).coordinates)
        if turn >= 200:
            whole.append(middle - start)
            further.append(time.perf_counter() - middle)
    return {
        f"{name}, {percentile} %": 1e6 * float(np.percentile(times, percentile))
        for name, times in ((f"{tokens} tokens", whole), ("50 more", further))
        for percentile in (10, 50, 90)
    }


def scaling(n: int, words: int = 150) -> dict[str, float]:
    """Seconds to fit n synthetic requests of 24 layers x 32 experts, and the bytes of the predictor."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 40, n)
    share = rng.dirichlet(np.full(32, 0.3), 40)
    use = np.repeat((share[topic] * 400).astype(np.uint16)[:, None], 24, axis=1)
    tokens = rng.zipf(1.3, n * words) % 20_000 + 20_000 * (rng.random(n * words) < 0.1) * (1 + topic.repeat(words))
    prompts = PromptFeatures("ids", np.arange(0, n * words + 1, words), tokens.astype(np.uint32))
    start = time.perf_counter()
    predictor = PromptPredictor.fit(prompts, use)
    size = sum(array.nbytes for array in predictor.arrays().values())
    return {"requests": n, "seconds": time.perf_counter() - start, "MiB": size / 2**20}


def bench() -> list[tuple[str, str]]:
    """For `benchmarks/run.py`."""
    with tempfile.TemporaryDirectory() as folder:
        return lines(measured(real_trace("gpt-oss-20b", Path(folder))))


def measured(requests: RequestSet, folds: int = 4, splits: int = 16, sizes: Sequence[int] = ()) -> dict[str, Any]:
    """All figures. splits: 50:50 splits behind the calibration. sizes: requests to fit synthetic sets of."""
    by_slots = {
        redundant: {
            "shares": shares_of_prefill(requests, redundant, folds),
            "deciles": calibration(requests, redundant, splits),
        }
        for redundant in REDUNDANT
    }
    return {
        "requests": len(requests),
        "redundant": by_slots,
        "microseconds": microseconds(requests),
        "scaling": [scaling(n) for n in sizes],
    }


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of each figure."""
    out = []
    for redundant, each in found["redundant"].items():
        shares = each["shares"]
        out.append((f"R = {redundant}, prefill against linear", f"{-100 * shares['gain']:+.1f} % remote picks"))
        out += [
            (f"R = {redundant}, {kind}, of the gain of prefill", f"{100 * share:.1f} %")
            for kind, share in shares.items()
            if kind not in ("gain", "prefill")
        ]
        apart = " ".join(f"{100 * (expected - real):+.1f}" for expected, real in each["deciles"])
        out.append((f"R = {redundant}, expected less realised share by decile, points", apart))
    out += [(f"microseconds, {name}", f"{value:.0f}") for name, value in found["microseconds"].items()]
    for each in found["scaling"]:
        out.append((f"fit on {each['requests']:,} requests", f"{each['seconds']:.0f} s, {each['MiB']:.1f} MiB stored"))
    return out


def table(found: dict[str, Any]) -> str:
    """The same as Markdown, for docs/concepts/prediction.md."""
    by_slots = found["redundant"]
    head = " | ".join(f"{redundant} redundant slots" for redundant in by_slots)
    rows = [f"| groups by | {head} |", "|---" * (len(by_slots) + 1) + "|"]
    kinds = [kind for kind in next(iter(by_slots.values()))["shares"] if kind != "gain"]
    for kind in kinds:
        cells = [
            f"{-100 * each['shares'][kind] * each['shares']['gain']:.1f} % ({100 * each['shares'][kind]:.0f} %)"
            for each in by_slots.values()
        ]
        rows.append(f"| `{kind}` | " + " | ".join(cells) + " |")
    apart = [f"{max(100 * abs(e - r) for e, r in each['deciles']):.1f}" for each in by_slots.values()]
    rows.append("| largest error of a decile's expected local share, in points | " + " | ".join(apart) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="gpt-oss-20b")
    parser.add_argument("--trace", type=Path, help="a trace that keeps prompts, in place of a set")
    parser.add_argument("--signature-tokens", type=int, default=48, help="0: the prefill as recorded")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--scaling", type=int, nargs="*", default=[], help="fit so many synthetic requests")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write the table into docs/concepts/prediction.md")
    given = parser.parse_args()
    tokens = given.signature_tokens or None
    with tempfile.TemporaryDirectory() as folder:
        if given.trace is not None:
            requests = read_requests(open_trace(given.trace), signature_tokens=tokens)
        elif (REAL / f"{given.set}.prompt-tokens.npz").exists():
            requests = real_trace(given.set, Path(folder), tokens)
        else:
            sys.exit(f"no prompts of {given.set} in {REAL}: give --trace with a trace that keeps prompts")
        found = measured(requests, given.folds, sizes=given.scaling)
    for label, text in lines(found):
        print(f"  {label:58s} {text}")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if given.page:
        text = PAGE.read_text(encoding="utf-8")
        block = f"\\1\n{table(found)}\n\\2"
        PAGE.write_text(
            re.sub(r"(<!-- prediction -->).*?(<!-- /prediction -->)", block, text, flags=re.DOTALL), "utf-8"
        )


if __name__ == "__main__":
    main()
