"""`python -m launch export-weights RUN`: a run's weights as one file; importing it must not import torch."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from data_prep.system.files import write_atomic
from launch.engines.ranks import EXIT_CONFIG, EXIT_CRASH, EXIT_OK

_TEXT = """\
Write the weights of a run directory as a plain state dict: names of the bare model, fp32 as trained, whichever engine
and however many ranks saved them. torch.load(FILE, weights_only=True) reads it, train.init_from=FILE starts from it.
"""


def add_export_command(commands: Any) -> None:
    """Add `export-weights` to the commands of `python -m launch`."""
    told = "write a run's weights as a plain state dict"
    parser = commands.add_parser("export-weights", help=told, description=_TEXT)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file to write, e.g. w.pt")
    parser.add_argument("--step", default="last", help="last (default), best (score on val), or a number of steps")
    parser.add_argument("--average", action="store_true", help="the running average of the weights (train.ema_decay)")
    parser.set_defaults(run=run_export)


def run_export(asked: argparse.Namespace) -> int:
    """Run the command; returns 0, 64 for wrong arguments or 1 for files that cannot be read or written."""

    def fail(text: str, code: int) -> int:
        print(f"error: {text}", file=sys.stderr)
        return code

    run_dir, out = asked.run_dir, asked.out
    if asked.step not in ("last", "best") and not asked.step.isdigit():
        return fail(f"--step {asked.step}: last, best or a number of steps", EXIT_CONFIG)
    if not (run_dir / "config.yaml").is_file():
        return fail(f"{run_dir}: no run directory (it has no config.yaml)", EXIT_CONFIG)
    from launch.train.checkpoint import find_sound

    source = find_sound(run_dir / "checkpoints", asked.step, lambda text: print(text, file=sys.stderr))
    if source is None:
        return fail(f"{run_dir}: no sound checkpoint for --step {asked.step}", EXIT_CRASH)
    import torch

    from launch.config.config import ConfigError
    from launch.engines.base import EngineError
    from launch.train.weights import READ_ERRORS, checkpoint_weights

    try:
        weights = checkpoint_weights(source, asked.average)
        packed = io.BytesIO()
        torch.save(weights, packed)
        write_atomic(out, packed.getvalue())
    except OSError as error:
        return fail(f"{out}: {error.strerror or error}", EXIT_CRASH)
    except ConfigError as error:
        return fail(f"{source}: {error}", EXIT_CONFIG)
    except (EngineError, *READ_ERRORS) as error:
        return fail(f"{source}: {str(error).splitlines()[0]}", EXIT_CRASH)
    numbers = sum(value.numel() for value in weights.values())
    of = f"{source.name}{' (average)' if asked.average else ''}"
    print(f"{out}: {len(weights)} tensors, {numbers:,} numbers, of {of}")
    return EXIT_OK
