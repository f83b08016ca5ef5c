"""The commands of `python -m data_prep`, a module each, as `system.command_line` describes them.

Others use `COMMANDS`.
"""

# Every command and its module, in the order of the help.
COMMANDS = {
    "build": "build",
    "verify": "verify",
    "inspect": "inspect",
    "synth": "synth",
    "convert": "convert",
    "doctor": "doctor",
    "export": "export",
    "volume": "volume",
    "volume score": "volume_predictions",
    "volume reassemble": "volume_predictions",
    "pack": "pack",
    "unpack": "pack",
}
