"""Builds of one real slide by regions: whole ones in this process, and ones that stop after some steps."""

from pathlib import Path

from data_prep.build import run as build_run
from data_prep.build.options import BuildOptions
from data_prep.build.run import build, prepare_out
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import leftovers, token_bytes
from tests.helpers.slide_files import CMU

# Two trees of CMU by regions, as words of the command line and as options.
BY_REGIONS = ["--resolution", "2048", "--patch", "8", "--length", "1024", "--tile", "256"]
REGION_OPTIONS = BuildOptions(2048, 8, length=512, tile_px=512)


def built_bytes(slides, out: Path, jobs: int = 1, **options) -> dict[str, bytes]:
    """Build all slides into a new folder; the bytes of their token files, which are sound."""
    prepare_out(out)
    outcomes = build(slides, BuildOptions(**options), out, jobs=jobs)
    assert [o.status for o in outcomes] == ["done"] * len(slides), outcomes
    assert leftovers(out) == [] and all(verify_file(path) == [] for path in out.glob("*.tokens.h5"))
    return token_bytes(out)


def stop_after(monkeypatch, steps: int, out: Path, options: BuildOptions) -> list[str]:
    """Build until so many steps are done, then stop as if killed. Returns the kinds of the steps that were done."""
    done: list[str] = []
    real = build_run.run_step

    def counting(step, beat=None):
        if len(done) == steps:
            raise KeyboardInterrupt
        result = real(step, beat)
        done.append(step.kind)
        return result

    monkeypatch.setattr(build_run, "run_step", counting)
    try:
        build([CMU], options, out)
    except KeyboardInterrupt:
        pass
    monkeypatch.setattr(build_run, "run_step", real)
    return done
