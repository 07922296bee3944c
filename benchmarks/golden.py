"""Run the same commands under release 0.1.0 and under this tree, and compare what they say and write.

Every case of golden_cases.py is a command line. It runs under the old commit, which gets an environment of its own, and
under this tree. Exit status, JSON output and written files must be equal, but for what the tables of golden_cases.py
(RENAMED, CONVERTED, ADDED, REMOVED, TEXT, VOLATILE) name. Cases whose names start with "bad-" hold bad input: both must
end with status 2, this tree with one line on standard error and no file left behind.

    python benchmarks/golden.py                     every case, the old results made anew
    python benchmarks/golden.py export 'plan-*'     these areas or cases (and those that they read)
    python benchmarks/golden.py --keep              old results are reused while the cases stay as they are

Environments and old results are kept in .golden/ (git ignores it), or where --cache or GOLDEN_CACHE says.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from golden_cases import ADDED, CASES, CONVERTED, REMOVED, RENAMED, REWRITTEN, TEXT, VOLATILE, Case

OLD = "fa249b2"
ROOT = Path(__file__).resolve().parents[1]
#: Packages on which figures depend: the old environment gets the versions of this one.
PINNED = ("numpy", "scipy", "numba", "llvmlite", "pyarrow", "scikit-learn", "joblib", "threadpoolctl", "typer", "click")
READ = re.compile(r"\.\./(?:old/)?([\w-]+)")
TIMEOUT, SHOWN = 900, 12
#: One thread: with several, sums of floats differ in their last digits from run to run.
FIXED = {"NO_COLOR": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
BY_NAME = {case.name: case for case in CASES}


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def shared_folder() -> Path | None:
    """The folder of real traces: beside this tree, or beside the tree that this one is a worktree of."""
    common = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir").strip())
    for folder in (ROOT.parent / "shared", common.parent.parent / "shared"):
        if (folder / "traces").is_dir():
            return folder
    return None


def pins() -> str:
    """The versions of the packages on which figures depend, as pip's constraints."""
    found = []
    for name in PINNED:
        try:
            found.append(f"{name}=={version(name)}\n")
        except PackageNotFoundError:
            continue
    return "".join(found)


def old_python(cache: Path) -> Path:
    """The interpreter of the environment that holds the old commit; made where it is not there yet."""
    folder, constraints = cache / f"env-{OLD}", pins()
    python, stamp = folder / "bin" / "python", folder / "constraints.txt"
    if stamp.is_file() and stamp.read_text() == constraints and python.exists():
        return python
    print(f"making the environment of {OLD} in {folder} (minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = folder / "wanted.txt"
    wanted.write_text(constraints)
    tree = folder / "tree"
    git("worktree", "add", "--force", "--detach", str(tree), OLD)
    try:
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", str(wanted), str(tree)], check=True)
    finally:
        git("worktree", "remove", "--force", str(tree))
    wanted.rename(stamp)
    return python


# ---- running


@dataclass
class Side:
    """One of the two programs, and the folder where its cases run, each in a folder of its own."""

    name: str
    python: Path
    folder: Path
    env: dict[str, str]
    keep: bool = False
    keys: dict[str, str] = field(default_factory=dict)

    def prepare(self, shared: Path | None, old: Path) -> None:
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("shared", shared), ("old", old)):
            (self.folder / name).unlink(missing_ok=True)
            if target is not None:
                (self.folder / name).symlink_to(target)

    def argv(self, case: Case) -> list[str]:
        words = case.old
        if self.name == "new":
            if case.new is not None:
                words = case.new
            else:
                for pattern, replacement in REWRITTEN:
                    words = re.sub(pattern, replacement, words)
        found = shlex.split(words)
        return found if case.bad or "--json" in found else [*found, "--json", "-"]

    def key(self, case: Case) -> str:
        """Changes where the case, or one that it reads, changes; for made files, with their content."""
        if case.make:
            paths = sorted(p for p in (self.folder / case.name).rglob("*") if p.is_file())
            return checksum(b"".join(bytes(path) + path.read_bytes() for path in paths))
        read = [self.keys[name] for name in reads(case)]
        return checksum("\n".join([OLD, pins(), *self.argv(case), *read]).encode())

    def run(self, case: Case) -> dict[str, Any]:
        """Status, output and seconds of a case, from this run or (with keep) from one before."""
        folder, record = self.folder / case.name, self.folder / f"{case.name}.json"
        if not case.make:
            self.keys[case.name] = self.key(case)
            if self.keep and record.is_file() and folder.is_dir():
                stored: dict[str, Any] = json.loads(record.read_text())
                if stored["key"] == self.keys[case.name]:
                    return stored
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        start = time.perf_counter()
        if case.make:
            case.make(folder)
            self.keys[case.name] = self.key(case)
            done: dict[str, Any] = {"status": 0, "out": "", "err": ""}
        else:
            done = self._call(self.argv(case), folder)
        done |= {"key": self.keys[case.name], "seconds": time.perf_counter() - start}
        record.write_text(json.dumps(done))
        return done

    def _call(self, argv: list[str], folder: Path) -> dict[str, Any]:
        command = [str(self.python), "-m", "moeplan", *argv]
        try:
            done = subprocess.run(
                command, cwd=folder, env=self.env, capture_output=True, text=True, timeout=TIMEOUT,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"status": None, "out": "", "err": f"no end within {TIMEOUT} s"}
        return {"status": done.returncode, "out": done.stdout, "err": done.stderr}


def reads(case: Case) -> list[str]:
    """The cases whose folders a case reads."""
    if case.make:
        return list(case.after)
    found = dict.fromkeys(READ.findall(f"{case.old} {case.new or ''}"))
    return [name for name in found if name != "shared"]


def run_all(side: Side, cases: list[Case], jobs: int) -> dict[str, dict[str, Any]]:
    """Every case, after those that it reads."""
    running: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(jobs) as pool:

        def one(case: Case) -> dict[str, Any]:
            for name in reads(case):  # they were submitted before, so that they run already or are done
                running[name].result()
            return side.run(case)

        for case in cases:
            running[case.name] = pool.submit(one, case)
        return {name: future.result() for name, future in running.items()}


def chosen(patterns: list[str], shared: Path | None) -> list[Case]:
    """Cases by name or area, and those that they read, in the order of the table."""
    wanted: set[str] = set()
    for pattern in patterns or ["*"]:
        hits = [c.name for c in CASES if fnmatch.fnmatchcase(c.name, pattern) or c.area == pattern]
        if not hits:
            raise SystemExit(f"golden: no case or area is called {pattern}; see --list")
        wanted.update(hits)
    if shared is None:
        left_out = {c.name for c in CASES if "../shared" in c.old}
        for case in CASES:  # in the order of the table: those that read them come later
            if left_out & set(reads(case)):
                left_out.add(case.name)
        for name in sorted(left_out & wanted):
            print(f"skipped {name}: ../shared is not on this machine")
        wanted -= left_out
    pending = list(wanted)
    while pending:
        for name in reads(BY_NAME[pending.pop()]):
            if name not in wanted:
                wanted.add(name)
                pending.append(name)
    return [case for case in CASES if case.name in wanted]


# ---- comparing


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value by path, e.g. ("plan-demo: model.layer_ids[0]", 1)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}{key}" if path.endswith(": ") else f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}[{index}]")
    else:
        yield path, value


def facts(case: Case, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
    """All that a case gave, by path: its status, its JSON, the leaves or the checksum of each file."""
    found: dict[str, Any] = {f"{case.name}: exit status": done["status"]}
    if case.bad or case.make:
        return found
    try:
        found.update(flat(json.loads(done["out"]), f"{case.name}: "))
    except ValueError:
        found[f"{case.name}: no JSON"] = done["err"].strip()[-500:]
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        place = f"{case.name}/{path.relative_to(folder)}: "
        if path.suffix == ".json":
            found.update(flat(json.loads(path.read_text()), place))
        elif path.suffix == ".html":
            found[place + "written"] = True
        else:
            found[place + "sha256"] = checksum(path.read_bytes())
    return found


def matches(path: str, table: tuple[tuple[str, str], ...]) -> bool:
    return any(re.search(pattern, path) for pattern, _ in table)


def renamed(found: dict[str, Any]) -> dict[str, Any]:
    """The old facts under their new paths, and in their new form."""
    result: dict[str, Any] = {}
    for place, value in found.items():
        path = next((re.sub(old, new, place) for old, new, _ in RENAMED if re.search(old, place)), place)
        convert = next((function for pattern, function in CONVERTED if re.search(pattern, path)), None)
        result.update(flat(convert(value), path) if convert and path != place else {path: value})
    return result


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each path that differs."""
    lines, nothing = [], object()
    before = renamed({path: value for path, value in before.items() if not matches(path, VOLATILE)})
    after = {path: value for path, value in after.items() if not matches(path, VOLATILE)}
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path, nothing), after.get(path, nothing)
        if old == new and type(old) is type(new):
            continue
        if (old is nothing and matches(path, ADDED)) or (new is nothing and matches(path, REMOVED)):
            continue
        if matches(path, TEXT) and isinstance(old, str) and isinstance(new, str):
            continue
        shown = ["nothing" if value is nothing else json.dumps(value) for value in (old, new)]
        lines.append(f"{path}: {shown[0]} -> {shown[1]}")
    return lines


def untidy(case: Case, folder: Path, done: dict[str, Any]) -> list[str]:
    """What is wrong with the answer to a bad input."""
    lines, left = done["err"].strip().splitlines(), sorted(p.name for p in folder.iterdir())
    found = []
    if done["status"] != 2:
        found.append(f"{case.name}: exit status {done['status']}, not 2: {' '.join(lines)[-300:]}")
    if len(lines) != 1 or not lines[0].startswith("moeplan: "):
        found.append(f"{case.name}: standard error is not one line 'moeplan: ...': {done['err'].strip()[-300:]!r}")
    if left:
        found.append(f"{case.name}: left behind {', '.join(left)}")
    return found


def compared(case: Case, sides: tuple[Side, Side], results: tuple[dict[str, Any], dict[str, Any]]) -> list[str]:
    """The lines to print for a case; none where both gave the same."""
    before, after = (facts(case, side.folder / case.name, done) for side, done in zip(sides, results, strict=True))
    lines = differences(before, after)
    if case.bad:
        return lines + untidy(case, sides[1].folder / case.name, results[1])
    if results[0]["status"] not in (0, 1):  # the case itself is wrong
        lines.append(f"{case.name}: ended with {results[0]['status']} under {OLD}: {results[0]['err'].strip()[-300:]}")
    return lines


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would let one side see the other's code."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {k: v for k, v in os.environ.items() if k not in left_out} | FIXED | changes


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare this tree with release 0.1.0, command by command.")
    parser.add_argument("cases", nargs="*", help="names, patterns or areas of cases [default: all]")
    parser.add_argument("--keep", action="store_true", help="reuse old results of cases that have not changed")
    parser.add_argument("--cache", type=Path, default=os.environ.get("GOLDEN_CACHE", ROOT / ".golden"))
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="list areas and cases, and run nothing")
    parser.add_argument("--messages", action="store_true", help="also print old and new messages of bad inputs")
    given = parser.parse_args()
    if given.list:
        for case in CASES:
            print(f"{case.area:10} {case.name:34} {case.old or '(makes files)'}")
        return 0
    cache, shared = Path(given.cache).resolve(), shared_folder()
    cases = chosen(given.cases, shared)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = old_python(cache)
        place = (cache if given.keep else ROOT / ".golden") / "results-old"
        old = Side("old", python, place, environment(), given.keep)
        old.prepare(shared, old.folder)
        before = run_all(old, cases, given.jobs)
    new = Side("new", Path(sys.executable), ROOT / ".golden" / "results-new", environment(PYTHONPATH=str(ROOT / "src")))
    new.prepare(shared, old.folder)
    after = run_all(new, cases, given.jobs)
    wrong = 0
    for case in cases:
        lines = compared(case, (old, new), (before[case.name], after[case.name]))
        wrong += bool(lines)
        seconds = f"{before[case.name]['seconds']:6.1f} s {after[case.name]['seconds']:6.1f} s"
        print(f"{'DIFFERS' if lines else 'equal  '} {seconds}  {case.name}")
        for line in lines[:SHOWN]:
            print(f"    {line}")
        if len(lines) > SHOWN:
            print(f"    ... and {len(lines) - SHOWN} more")
        if given.messages and case.bad:
            print(f"    old: {before[case.name]['err'].strip()}\n    new: {after[case.name]['err'].strip()}")
    print(f"{len(cases)} cases, {wrong} differ" if wrong else f"{len(cases)} cases, all equal")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
