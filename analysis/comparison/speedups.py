"""Which two rows a speedup may divide, and the speedup of every row over its fair baseline (no torch, no files)."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.runs.groups import BaselineError, Group, is_tiled, task_of
from analysis.runs.records import Run

# What two runs must share before their times are divided (design, section 5), and the word for it.
FAIR = (
    ("hardware", "hardware"),
    ("gpus", "GPUs"),
    ("nodes", "nodes"),
    ("precision", "precision"),
    ("attention_backend", "attention backend"),
    ("optimiser", "optimiser"),
    ("split_sha256", "data split"),
    ("resolution", "resolution"),
    ("task", "task"),
    ("warmup_rule", "timing window"),
)
_CONVOLUTIONAL = {"unet", "unet_tiled", "gmic", "def_gmic"}  # no attention, so no kernel of it to compare
_NO_ATTENTION = "none"


@dataclass(frozen=True)
class Speedup:
    """A speedup and its denominator, or the reasons why the two rows must not be divided."""

    ratio: float | None
    baseline: Group | None
    refused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def differences(a: Run, b: Run) -> list[str]:
    """Return why the times of two runs must not be divided: one reason per difference, none if the two are alike.

    A backend is compared only between models that have attention.
    A value that one record lacks is a reason too: what is not known to be equal is not compared.
    """
    reasons = []
    for name, word in FAIR:
        x, y = _fair_value(a, name), _fair_value(b, name)
        if name == "attention_backend" and _NO_ATTENTION in (x, y):
            continue
        if x is None or y is None:
            reasons.append(f"{word} not recorded")
        elif x != y:
            reasons.append(f"{word} {_short(x, name)} against {_short(y, name)}")
    if set(a.dice_per_slide) != set(b.dice_per_slide):
        reasons.append("other test slides")
    elif scored_elsewhere(a, b):
        reasons.append("other test pixels")
    return reasons


def scored_elsewhere(a: Run, b: Run) -> bool:
    """Whether two runs on the same slides and frame were scored on other pixels, e.g. one inside a field of view.

    The Dice of a prediction that is foreground everywhere depends on those pixels alone.
    """
    x, y = (run.floors.get("all_foreground") for run in (a, b))
    if a.resolution != b.resolution or x is None or y is None:
        return False
    return abs(x - y) > 1e-6


def remarks(a: Run, b: Run) -> list[str]:
    """Return differences that may be compared and must be said."""
    pairs = (("engine", "engine"), ("global_batch", "global batch"), ("model", "model"))
    return [
        f"{word} {getattr(a, name)} against {getattr(b, name)}"
        for name, word in pairs
        if getattr(a, name) != getattr(b, name)
    ]


def speedup(group: Group, groups: Sequence[Group], baseline: str | None = None) -> Speedup:
    """Return `Baselines(groups).speedup(group, baseline)`; for many rows, make the Baselines once."""
    return Baselines(groups).speedup(group, baseline)


class Baselines:
    """The rows that can be a denominator, sorted by what makes them fair, so that thousands of rows stay cheap.

    Args:
        groups: All rows.
    """

    def __init__(self, groups: Sequence[Group]):
        self._groups = groups
        self._candidates: set[int] = set()
        self._named: dict[str, list[Group]] = defaultdict(list)
        self._near: dict[int | None, _Finest] = defaultdict(_Finest)
        self._fair: dict[tuple, dict[object, _Finest]] = defaultdict(lambda: defaultdict(_Finest))
        for group in groups:
            run = group.first
            for name in dict.fromkeys((group.label, run.experiment)):
                self._named[name].append(group)
            if run.patching != "uniform" or is_tiled(run) or not group.seconds_per_image:
                continue
            self._candidates.add(id(group))
            self._near[run.resolution].add(group)
            if (key := _fair_key(run)) is not None:
                self._fair[key][_fair_value(run, "attention_backend")].add(group)

    def speedup(self, group: Group, baseline: str | None = None) -> Speedup:
        """Return sec/image of a uniform baseline over sec/image of this row.

        Without `baseline`, the baseline is the row's fair counterpart among the uniform, untiled rows of its
        resolution, of the same model if there is one: that with the smallest patch, which is what adaptive patching
        claims to replace.

        Args:
            group: The row.
            baseline: Label or experiment of the only row allowed as the denominator.

        Raises:
            BaselineError: No row has that name.
        """
        mine = group.seconds_per_image
        best = self._best(group) if baseline is None else self._best_named(group, baseline)
        if not mine or best is None:
            return Speedup(None, None, ("s/image of this row is missing" if not mine else "no timed uniform baseline",))
        reasons = [] if best is group else differences(group.first, best.first)
        if reasons:
            return Speedup(None, best, tuple(reasons))
        ratio = (best.seconds_per_image or 0) / mine
        if not math.isfinite(ratio):
            return Speedup(None, best, ("s/image of this row is too small to divide by",))
        return Speedup(ratio, best, (), tuple(remarks(group.first, best.first)))

    def _best(self, group: Group) -> Group | None:
        """The finest fair baseline, or else the finest of the resolution, to say why it is not fair."""
        run, found = group.first, []
        if (key := _fair_key(run)) is not None:
            kernel = _fair_value(run, "attention_backend")
            for other, finest in self._fair.get(key, {}).items():
                if kernel == _NO_ATTENTION or (other is not None and other == kernel):
                    found.append(finest.best(run))
        if id(group) in self._candidates:
            found.append(group)
        if found:
            return min(found, key=lambda g: _preference(g, run))
        near = self._near.get(run.resolution)
        return near.best(run) if near else None

    def _best_named(self, group: Group, name: str) -> Group | None:
        candidates = self._named.get(name)
        if not candidates:
            raise BaselineError(
                f"baseline {name!r} is not among the runs; there are: {', '.join(g.label for g in self._groups)}"
            )
        timed = [g for g in candidates if g.seconds_per_image]
        unfair = {id(g): bool(g is not group and differences(group.first, g.first)) for g in timed}
        return min(timed, key=lambda g: (unfair[id(g)], *_preference(g, group.first)), default=None)


class _Finest:
    """The uniform rows of one kind: the smallest patch, then first label, for each model, decoder and global batch.

    Each of the three can be any, too.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Group] = {}

    def add(self, group: Group) -> None:
        for key in self._keys(group.first):
            known = self._known.get(key)
            if known is None or (group.first.patch or 0, group.label) < (known.first.patch or 0, known.label):
                self._known[key] = group

    def best(self, run: Run) -> Group:
        """The same model if there is one; then the smallest patch, the same decoder, batch, the first label."""
        known = (self._known[key] for key in self._keys(run) if key in self._known)
        return min(known, key=lambda g: _preference(g, run))

    @staticmethod
    def _keys(run: Run) -> Iterator[tuple[object, ...]]:
        return itertools.product((run.model, _ANY), (run.decoder, _ANY), (run.global_batch, _ANY))


_ANY = "any of them"


def _preference(group: Group, mine: Run) -> tuple:
    run = group.first
    other_batch = run.global_batch != mine.global_batch
    return (run.model != mine.model, run.patch or 0, run.decoder != mine.decoder, other_batch, group.label)


def _fair_key(run: Run) -> tuple | None:
    """All that a fair baseline must share but for the attention backend; None where something is not recorded."""
    values = tuple(_fair_value(run, name) for name, _ in FAIR if name != "attention_backend")
    return None if None in values else (*values, frozenset(run.dice_per_slide))


def _fair_value(run: Run, name: str):
    if name == "attention_backend" and run.model in _CONVOLUTIONAL:
        return _NO_ATTENTION
    if name == "task":
        return task_of(run)
    return (run.device_name or run.device) if name == "hardware" else getattr(run, name)


def _short(value, name: str) -> str:
    return str(value)[:12] if name == "split_sha256" else str(value)[:80]
