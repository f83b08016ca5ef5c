"""The commands of `python -m analysis`, as `data_prep.system.command_line` describes them: imported to run them.

Others use `COMMANDS`.
"""

# Every command and its module, in the order of the help.
_NAMES = ("tables", "plots", "report", "compare", "gains", "auc", "erf", "lengths", "scaling", "collect")
COMMANDS = {name: name for name in _NAMES}
