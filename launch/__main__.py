"""`python -m launch`: list experiments, train one, submit many; its commands are the modules of `commands`."""

from data_prep.system.command_line import CommandLine
from launch.commands import COMMANDS, EXAMPLES

# Until training takes its signals over there is nothing to save.
COMMAND_LINE = CommandLine("launch", "Train named experiments on token files.", COMMANDS, epilog=EXAMPLES, at_once=True)
main = COMMAND_LINE.main

if __name__ == "__main__":
    COMMAND_LINE.start()
