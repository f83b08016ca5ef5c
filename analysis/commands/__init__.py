"""The commands of `python -m analysis`, as `data_prep.system.command_line` describes them: imported to run them.

A command raises `RunsError` or `ValueError` with one line for the terminal. Others use `COMMANDS`.
"""

# Every command and its module, in the order of the help.
_NAMES = ("tables", "plots", "report", "compare", "gains", "auc", "erf", "lengths", "scaling", "collect")
COMMANDS = {name: name for name in _NAMES}
