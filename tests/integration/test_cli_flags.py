"""The command line as a whole: one meaning for each flag, short commands, old names, completion, safe outputs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeplan.cli.app import VERBS, app, commands, run
from moeplan.cli.old_names import FLAGS as OLD_FLAGS

#: Flag, meaning, and the verbs that have it, by tabs. A new flag needs a line; a flag means the same in all verbs.
TABLE = Path(__file__).parents[1] / "data" / "flags.tsv"
LONGEST = 40


def flags() -> Iterator[tuple[str, str, str]]:
    """Verb, flag and meaning: the help up to the first stop, colon, comma or bracket."""
    for verb, command in commands():
        for argument in command.assemble_argument_collection(parse_docstring=True):
            if argument.show and argument.name.startswith("--"):
                assert argument.parameter.help, f"{verb} {argument.name} has no help"
                yield verb, argument.name, re.split(r"[.:;](?=\s|$)|,| \(", argument.parameter.help)[0]


def test_every_flag_has_one_meaning_and_is_in_the_table() -> None:
    found: dict[tuple[str, str], list[str]] = {}
    for verb, flag, meaning in flags():
        found.setdefault((flag, meaning), []).append(verb)
    lines = [f"{flag}\t{meaning}\t{', '.join(verbs)}" for (flag, meaning), verbs in sorted(found.items())]
    names = [flag for flag, _ in found]
    assert len(names) == len(set(names)), sorted(key for key in found if names.count(key[0]) > 1)
    stored = TABLE.read_text().splitlines()
    assert lines == stored, "\n".join(["flags.tsv lacks or should not have:", *sorted(set(lines) ^ set(stored))])


def test_output_is_always_a_path_and_every_verb_has_json() -> None:
    for verb, command in commands():
        arguments = {a.name: a for a in command.assemble_argument_collection()}
        assert "--json" in arguments, verb
        for name in {"--json", "--output"} & arguments.keys():
            assert "Path" in str(arguments[name].hint), verb


def test_functions_of_the_command_line_are_short() -> None:
    """A command parses, makes library calls and renders: no function of the command line is long."""
    for file in Path(inspect.getfile(run)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= LONGEST, f"{file.name}: {node.name} has {lines} lines"


def test_all_verbs_are_listed_in_the_order_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    places = [re.search(rf"^\W{{1,2}}{verb} ", text, re.MULTILINE) for verb in VERBS]
    assert all(places) and [p.start() for p in places if p] == sorted(p.start() for p in places if p)
    assert ".." not in text


@pytest.mark.parametrize("verb", [name for name, _ in commands()])
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: moeplan {verb}" in text and "--json" in text


@pytest.mark.parametrize(
    ("arguments", "new"),
    [
        ("replay T --plan P", "evaluate"),
        ("plan --from P --drift T", "moeplan drift TRACE --plan PLAN"),
        ("plan T --from P --max-moves 3 -o N", "moeplan rebalance TRACE --plan PLAN"),
        ("plan T -o P --home gpu", "--deployment gpus"),
        ("compare T --home=node", "--deployment nodes"),
        ("check F --engine vllm --nnodes 2", "--nodes"),
        ("import placement F --engine vllm -o P --nnodes=2", "--nodes"),
        ("import logical-count F -o C --stage decode", "--phase"),
        ("record transformers --model M --prompts P -o T --weights", "--keep-gate-weights"),
        ("record vllm --model M --prompts P -o T", "--served-model"),
        ("estimate --model m --hardware h --weights fp8", "--weights-dtype"),
        ("sweep --model m --hardware h --experts fp8", "--experts-dtype"),
        ("size --model m --kv fp8", "--kv-dtype"),
        ("size --model m --prompt 10 --output 20", "--prompt-tokens"),
        ("size --model m --output 20", "--output-tokens"),
        ("size --model m --output=20", "--output-tokens"),
        ("size --model m --requests 20", "--concurrency"),
        ("size --model m --html page.html", "--output"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(arguments: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("moeplan: ") and new in lines[0]


def test_no_old_flag_is_a_flag_again() -> None:
    now = {(verb, flag) for verb, flag, _ in flags()}
    for old, verbs, _ in OLD_FLAGS:
        assert not [(v, f) for v, f in now if f == old and (not verbs or any(v.startswith(x) for x in verbs))]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("nonsense", 'Unknown command "nonsense"'),
        ("compare", "TRACE is missing"),
        ("compare T extra", "unexpected argument 'extra'"),
        ("compare T --nodes", "--nodes needs a value"),
        ("compare T --nodes 2.5", "--nodes '2.5' is not a whole number"),
        ("compare T --no-such 1", "Unknown option"),
        ("compare T --deployment moon", 'Choose from: "nodes", "gpus"'),
        ("plan T", "--output is missing"),
        ("sweep --model m --hardware h --batch 1,x", '--batch "1,x" is not a list of numbers of at least 1'),
    ],
)
def test_wrong_use_is_one_line(arguments: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.split()) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.startswith("moeplan: ") and len(streams.err.splitlines()) == 1
    assert what in streams.err


def test_an_output_is_never_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One guard for all verbs, by real path and inode; it stands before anything is read."""
    folder, file = tmp_path / "in", tmp_path / "file.json"
    folder.mkdir()
    file.write_text("kept")
    (tmp_path / "link.json").symlink_to(file)
    (tmp_path / "hard.json").hardlink_to(file)
    inside = folder / "trace.json"
    inside.write_text("kept")
    for arguments in (
        ["compare", folder, "--json", inside],
        ["profile", folder, "-o", inside],
        ["drift", folder, "--plan", tmp_path / "plan", "--json", inside],
        ["estimate", "--model", file, "--hardware", "H100", "--json", tmp_path / "link.json"],
        ["size", "--model", "m", "--hardware-file", file, "-o", tmp_path / "hard.json"],
        ["import", "arrays", file, "-o", tmp_path / "t", "--json", file],
        ["import", "trace", folder, "-o", folder / "t"],
        ["check", file, "--engine", "vllm", "--json", tmp_path / "hard.json"],
        ["record", "vllm", "--prompts", file, "-o", tmp_path / "t", "--json", file],
        ["compare", folder, "-o", tmp_path / "x", "--json", tmp_path / "x"],
        ["compare", "embedded", "--json", Path(inspect.getfile(run)).parents[1] / "embedded" / "trace" / "trace.json"],
    ):
        assert run([str(a) for a in arguments]) == 2
        line = capsys.readouterr().err
        assert "would be written over" in line or "are the same file" in line, arguments
    assert file.read_text() == inside.read_text() == "kept" and list(folder.iterdir()) == [inside]


def test_control_characters_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(tmp_path / "\x1b[31mred\x9b\u202e\udcff")]) == 2
    text = capsys.readouterr().err
    assert "\\x1b[31mred\\x9b\\u202e\\udcff" in text and text.isprintable() is False and "\x1b" not in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = app.generate_completion(prog_name="moeplan", shell=shell)  # type: ignore[arg-type]
    for word in ("rebalance", "sglang-recorder", "signature-tokens"):
        assert word in script


def test_the_command_line_is_light() -> None:
    """Help needs no array library, and no verb's module is loaded before it is asked for."""
    heavy = ["numba", "numpy", "pyarrow", "matplotlib", "scipy", "sklearn", "torch"]
    code = "import sys; from moeplan.cli.app import run; run(['plan', '--help']); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
