"""`python -m analysis`: tables, plots and one page; its commands are the modules of `commands`."""

from analysis.commands import COMMANDS
from data_prep.system.command_line import BAD_ARGUMENTS, CommandLine

_EPILOG = """\
RUNS is a folder of runs (runs/<experiment>/<run id>/record.json at any depth), one run folder, or a study that
`collect` wrote (NAME.jsonl).

examples:
  python -m analysis tables runs --out out/tables      comparison.md, .csv, .tex, problems.csv, and on the terminal
  python -m analysis tables --which apf3,contradictions
  python -m analysis compare runs/demo_apf runs/demo_uniform_patch
  python -m analysis plots  runs --out out/plots       each figure as .png, .svg and .pdf
  python -m analysis report runs --out out             out/index.html, one self-contained page
  python -m analysis scaling --site frontier --gpus 1,64,2048
  python -m analysis collect runs --out study.jsonl    one file, which every command reads like the folder

Every command has a --help of its own.

exit codes: 0 done; 1 there is no finished run to show; 64 wrong arguments (no such folder, unknown baseline).
"""

COMMAND_LINE = CommandLine(
    "analysis",
    "Tables, plots and one page from run directories.",
    COMMANDS,
    epilog=_EPILOG,
    listed={"metavar": "{tables,compare,gains,auc,erf,lengths,plots,report,scaling,collect}"},
    errors={ValueError: BAD_ARGUMENTS},
)
main = COMMAND_LINE.main

if __name__ == "__main__":
    COMMAND_LINE.start()
