"""What --help teaches: every command has examples that parse, exit codes, and no option without words."""

import argparse
import re
import shlex

import pytest

from analysis.__main__ import COMMAND_LINE

parser = COMMAND_LINE.parser

VERBS = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def examples(text: str) -> list[str]:
    """The commands of a help text, without the words behind them."""
    lines = re.findall(r"^ +(python -m analysis .*)$", text, flags=re.M)
    return [re.split(r" {2,}", line)[0] for line in lines]


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_teaches(verb: str):
    text = VERBS[verb].format_help()
    assert "exit codes: 0 done" in text
    commands = examples(text)
    assert any(f"analysis {verb} " in command for command in commands), "an example of its own"
    for action in VERBS[verb]._actions:
        assert action.help, f"{verb} {action.dest} has no words"
    assert max(map(len, (VERBS[verb].epilog or "").splitlines())) <= 120


@pytest.mark.parametrize("command", sorted({c for p in (parser(), *VERBS.values()) for c in examples(p.format_help())}))
def test_every_example_parses(command: str):
    args = parser().parse_args(shlex.split(command)[3:])
    assert args.command in VERBS
