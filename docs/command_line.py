"""Write docs/reference/command-line.md from the commands themselves: `python docs/command_line.py`."""

from __future__ import annotations

from pathlib import Path

from moeplan.cli.app import app, commands

PAGE = Path(__file__).parent / "reference" / "command-line.md"
HEAD = """# Command line

A flag means the same in every verb. `-o` is always the path of what is made; `--json PATH` (or `-`) writes the figures.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | the answer is no: a plan is stale, a file is invalid, no cluster is large enough |
| 2 | wrong use or bad input; one line says what, where and a hint |
| 70 | internal error; please report it |
| 130 | interrupted |

`moeplan --install-completion` installs shell completion for bash, zsh or fish.
"""

if __name__ == "__main__":
    list(commands())  # loads every command, which generate_docs alone does not
    page = app.generate_docs(output_format="markdown", recursive=True, heading_level=1)
    body = page[page.index("## Table of Contents") :].replace("```console", "```sh")
    PAGE.write_text(f"{HEAD}\n{body}".rstrip() + "\n", encoding="utf-8")
