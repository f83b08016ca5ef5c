"""The commands of `python -m analysis`, as `data_prep.system.command_line` describes them: imported to run them.

Others use `COMMANDS`.
"""

# Every command and its module, in the order of the help.
COMMANDS = {
    name: name for name in ("tables", "plots", "report", "compare", "gains", "auc", "erf", "lengths", "scaling")
}
