"""A run's weights as one file."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from data_prep.system.command_line import BAD_ARGUMENTS, DONE, FAILED
from data_prep.system.files import write_atomic


def export_weights(run_dir: Path, out: Path, step: str, average: bool) -> int:
    """Write the weights of a run to one file: of step `last`, `best` or a number, or their running average.

    The exit code is 0, 64 for wrong arguments, or 1 for files that cannot be read or written.
    """

    def fail(text: str, code: int) -> int:
        print(f"error: {text}", file=sys.stderr)
        return code

    if step not in ("last", "best") and not step.isdigit():
        return fail(f"--step {step}: last, best or a number of steps", BAD_ARGUMENTS)
    if not (run_dir / "config.yaml").is_file():
        return fail(f"{run_dir}: no run directory (it has no config.yaml)", BAD_ARGUMENTS)
    # Find the checkpoint.
    from launch.train.checkpoint import find_sound

    source = find_sound(run_dir / "checkpoints", step, lambda text: print(text, file=sys.stderr))
    if source is None:
        return fail(f"{run_dir}: no sound checkpoint for --step {step}", FAILED)
    import torch

    from launch.config.config import ConfigError
    from launch.engines.base import EngineError
    from launch.train.weights import READ_ERRORS, checkpoint_weights

    # Read its weights and write them.
    try:
        weights = checkpoint_weights(source, average)
        packed = io.BytesIO()
        torch.save(weights, packed)
        write_atomic(out, packed.getvalue())
    except OSError as error:
        return fail(f"{out}: {error.strerror or error}", FAILED)
    except ConfigError as error:
        return fail(f"{source}: {error}", BAD_ARGUMENTS)
    except (EngineError, *READ_ERRORS) as error:
        return fail(f"{source}: {str(error).splitlines()[0]}", FAILED)
    numbers = sum(value.numel() for value in weights.values())
    of = f"{source.name}{' (average)' if average else ''}"
    print(f"{out}: {len(weights)} tensors, {numbers:,} numbers, of {of}")
    return DONE
