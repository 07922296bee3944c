"""Names of release 0.1: a command line that uses one is answered with the new name."""

from __future__ import annotations

from moeplan.errors import UsageError

#: Flag: the verbs that had it (empty: any), and what to write now.
FLAGS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("--home", (), "--deployment nodes (was --home node) or --deployment gpus (was --home gpu)"),
    ("--nnodes", (), "--nodes"),
    ("--stage", (), "--phase"),
    ("--routing-groups", (), "--expert-groups"),
    ("--weights", ("record",), "--keep-gate-weights"),
    ("--weights", (), "--weights-dtype"),
    ("--experts", (), "--experts-dtype"),
    ("--kv", (), "--kv-dtype"),
    ("--prompt", ("size",), "--prompt-tokens"),
    ("--requests", ("size",), "--concurrency"),
    ("--html", ("size",), "-o, --output"),
    ("--model", ("record vllm", "record sglang"), "--served-model"),
    ("--max-moves", ("plan",), "moeplan rebalance TRACE --plan PLAN --max-moves M -o NEW"),
    ("--drift", ("plan",), "moeplan drift TRACE --plan PLAN"),
    ("--from", ("plan",), "moeplan rebalance TRACE --plan PLAN, or moeplan drift TRACE --plan PLAN"),
)
VERBS = {"replay": "evaluate"}


def refuse_old_names(arguments: list[str]) -> None:
    """Raise a UsageError that says the new name of the first old one.

    Raises:
        UsageError: an old verb or flag is used.
    """
    verb = arguments[0] if arguments else ""
    if verb in VERBS:
        raise UsageError(f"'{verb}' is now called '{VERBS[verb]}'", hint=f"moeplan {VERBS[verb]} ..., same arguments")
    flags = [argument.partition("=") for argument in arguments]
    for old, verbs, new in FLAGS:
        named = not verbs or any(arguments[: len(v.split())] == v.split() for v in verbs)
        if named and any(flag == old for flag, _, _ in flags):
            what = f"{old} is gone from 'moeplan {verb}'" if " " in new else f"{old} is now called {new}"
            raise UsageError(what, hint=f"use {new}")
    for (flag, _, value), following in zip(flags, [*arguments[1:], ""], strict=False):
        if verb == "size" and flag == "--output" and (value or following).isdigit():
            raise UsageError("--output is the page now", hint="use --output-tokens for the length of an answer")
