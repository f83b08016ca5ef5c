"""`python -m data_prep`: slides to token files; its commands are the modules of `commands`."""

from data_prep.commands import COMMANDS
from data_prep.system.command_line import FAILED, CommandLine

_TOP = """Cut slides into token files for transformers.

Start with:  python -m data_prep inspect SLIDE --out look.png
Help of one: python -m data_prep build --help
How it works, and why it is exact: data_prep/README.md"""

COMMAND_LINE = CommandLine(
    "data_prep",
    _TOP,
    COMMANDS,
    listed={"title": "commands", "metavar": "COMMAND [ARGUMENTS]"},
    errors={ValueError: FAILED, OSError: FAILED},
    rank_0_alone=True,
)
main = COMMAND_LINE.main

if __name__ == "__main__":
    COMMAND_LINE.start()
