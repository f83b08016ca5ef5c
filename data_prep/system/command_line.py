"""The command line of a package: loads the module of one command, runs it, and ends with its exit code.

A package has a module per command in its room `commands`, with
    HELP         one line for the list of commands
    add_command  gives the command's parser a description, examples and arguments
    run          does the work and returns the exit code; it imports what is heavy
    GOES_ON      optional: what to say behind "interrupted"
    ALL_RANKS    optional: true where every rank takes part; else rank 0 works alone, if the package says so
Small commands may share a module with a dict COMMANDS of objects with these names. An exception with an `exit_code` is
a user's error: one line says what is wrong. This module imports only the standard library and `ctrl_c`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from data_prep.system.ctrl_c import end, end_all, launcher_rank, mpi_abort, take_over

DONE, FAILED, BAD_ARGUMENTS, CRASHED = 0, 1, 64, 70
MOST_NAMES = 5  # that an error offers


class Command(NamedTuple):
    """One of several commands in a module; see the top of this file."""

    HELP: str
    add_command: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """argparse with this project's exit code, and one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (see {self.prog} --help)")
        self.exit(BAD_ARGUMENTS)


def complain(message: str) -> None:
    """Print one line on stderr, from one rank only: all ranks find the same fault in the arguments."""
    if launcher_rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)


def nearest(word: str, names: Sequence[str]) -> str:
    """The names most like `word`, at most `MOST_NAMES`, and how many more there are."""
    alike = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())[:MOST_NAMES]
    more = len(names) - len(alike)
    return ", ".join(alike) + (f" and {more} more" if more else "")


def positive(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"invalid value: must be a whole number of at least 1, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class CommandLine:
    """`python -m PACKAGE COMMAND ...`.

    Attributes:
        description: Text above the list of commands.
        commands: The commands in the order of the list, with their modules in the room `commands`.
        epilog: Text below the list.
        listed: Arguments of argparse's `add_subparsers`: the heading of the list.
        errors: Exit codes of exceptions that become one line but have no `exit_code`; not where every rank takes part.
        rank_0_alone: Only rank 0 runs a command without `ALL_RANKS`; the others return at once.
        at_once: Ctrl-C ends the process without a KeyboardInterrupt, since its commands leave nothing half done or take
            the signal over.
    """

    package: str
    description: str
    commands: Mapping[str, str]
    epilog: str | None = None
    listed: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[type[Exception], int] = field(default_factory=dict)
    rank_0_alone: bool = False
    at_once: bool = False

    def parser(self) -> argparse.ArgumentParser:
        """The parser of all commands; loads all their modules."""
        top = self._new_parser("")
        top.description, top.epilog, top.formatter_class = self.description, self.epilog, _formatter("\n")
        adding = {"dest": "command", "required": True, "metavar": "COMMAND", **self.listed}
        commands: Any = top.add_subparsers(**adding)  # type: ignore[call-overload]
        for name in self.commands:
            command = self._load(name)
            _fill(commands.add_parser(name, help=command.HELP, allow_abbrev=False), command)
        return top

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run one command and return its exit code, also for wrong arguments and --help.

        `argv` is without the program's name; by default the arguments of the process.
        """
        # Find the command and its arguments.
        name, words = self._asked(argv)
        try:
            if name is None:
                self._list(words)
            command = self._load(name)
            args = self._parse(name, command, words)
        except SystemExit as ended:
            return int(ended.code or DONE)
        shared = getattr(command, "ALL_RANKS", False)
        if self.rank_0_alone and not shared and launcher_rank():
            return DONE

        # Run it.
        try:
            code = int(command.run(args))
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader (head, less) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:
            kinds = () if shared else self.errors.items()
            known = getattr(error, "exit_code", next((code for kind, code in kinds if isinstance(error, kind)), None))
            if known is None:
                raise
            complain(str(error))
            return int(known)

    def start(self) -> NoReturn:
        """Run the command of this process, and end the process with the command's exit code."""
        if getattr(sys.stdout, "errors", None) == "strict":  # a name may hold what this terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            take_over(self.at_once)
            code = self.main()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _flush()
            goes_on = getattr(self._load(self._asked(None)[0]), "GOES_ON", "")
            end("interrupted" + (goes_on and f": {goes_on}"))
        except BaseException:
            if (abort := mpi_abort()) is not None:  # the others would wait for this rank for ever
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                _flush()
                end_all(abort, CRASHED)
            raise
        sys.exit(code)

    def _asked(self, argv: Sequence[str] | None) -> tuple[str | None, list[str]]:
        """The command (one or two words) and the words behind it; None and all words if they begin with none."""
        words = list(sys.argv[1:] if argv is None else argv)
        for count in (2, 1):
            if (name := " ".join(words[:count])) in self.commands:
                return name, words[count:]
        return None, words

    def _list(self, words: list[str]) -> NoReturn:
        """Answer words that begin with no command."""
        if words and not words[0].startswith("-"):
            near = nearest(words[0], list(self.commands))
            self._new_parser("").error(f"invalid choice: {words[0]!r} is no command; did you mean {near}?")
        self.parser().parse_args(words)
        self._new_parser("").error("the first word must be a command")

    def _load(self, name: str | None) -> Any:
        """The command: a module, or an object of one."""
        if name is None:
            return None
        module = importlib.import_module(f"{self.package}.commands.{self.commands[name]}")
        return getattr(module, "COMMANDS", {}).get(name, module)

    def _new_parser(self, name: str) -> _Parser:
        return _Parser(prog=f"python -m {self.package} {name}".strip(), allow_abbrev=False)

    def _parse(self, name: str, command: Any, words: list[str]) -> argparse.Namespace:
        """The arguments of a command.

        argparse ends a list of settings at the first option; settings behind it are added here. A command with a
        default `more` gets all unknown words there.
        """
        parser = _fill(self._new_parser(name), command)
        args, more = parser.parse_known_args(words)
        args.command = name
        if hasattr(args, "more"):
            args.more = more
        elif more and (not hasattr(args, "overrides") or any(word.startswith("-") for word in more)):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        elif more:
            args.overrides += more
        return args


def _fill(parser: argparse.ArgumentParser, command: Any) -> argparse.ArgumentParser:
    command.add_command(parser)
    parser.formatter_class = _formatter(f"{parser.description or ''}{parser.epilog or ''}")
    return parser


def _formatter(text: str) -> type[argparse.HelpFormatter]:
    """Keep the layout of text with several lines; wrap a single line."""
    return argparse.RawDescriptionHelpFormatter if "\n" in text else argparse.HelpFormatter


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
