"""The commands of `python -m launch`, in the form that `data_prep.system.command_line` runs.

Others use `COMMANDS`.
"""

# Every command and its module, in the order of the help.
COMMANDS = {
    "experiments": "experiments",
    "show": "train",
    "train": "train",
    "study": "study",
    "bench": "bench",
    "render": "jobs",
    "where": "jobs",
    "ended": "jobs",
    "prep": "jobs",
    "submit": "submit",
    "status": "submit",
    "each": "each",
    "plan": "plan",
    "preflight": "preflight",
    "export-weights": "export_weights",
    "models": "models",
    "erf": "erf",
    "rescore": "rescore",
}
EXAMPLES = """\
examples:
  python -m launch experiments                          # the groups
  python -m launch experiments open data                # what is in one, or any word of a name or description
  python -m launch show demo_apf train.lr=5e-4          # every key, its value and what it means
  python -m launch train demo_apf                       # one process
  torchrun --standalone --nproc-per-node 2 -m launch train demo_apf engine.name=fsdp
  mpiexec -n 2 python -m launch train demo_apf engine.name=fsdp
  srun --ntasks-per-node=8 python -m launch train demo_apf engine.name=fsdp

A run lives in RUN_ROOT/EXPERIMENT/RUN_ID. The same command again resumes it, or returns at once when it is finished.
exit codes: 0 done, 64 bad settings, 75 stopped by a signal after a checkpoint (run me again), else crash
"""
