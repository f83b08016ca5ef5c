"""Which two rows a speedup may divide, and the speedup of every row over its fair baseline."""

import math
from typing import Any

import pandas as pd

from analysis.runs.records import Row, rows_of

# What two runs must share before their times are divided (design, section 5), and the word for it.
FAIR = {
    "hardware": "hardware",
    "gpus": "GPUs",
    "nodes": "nodes",
    "precision": "precision",
    "attention_backend": "attention backend",
    "optimiser": "optimiser",
    "split_sha256": "data split",
    "resolution": "resolution",
    "task": "task",
    "warmup_rule": "timing window",
}
_CONVOLUTIONAL = ("unet", "unet_tiled", "gmic", "def_gmic")  # no attention, so no kernel of it to compare
_NO_ATTENTION = "none"
_SHARED = [name for name in FAIR if name != "attention_backend"]
_PREFERRED = ("model", "decoder", "global_batch")  # a baseline of the same goes before others


class BaselineError(ValueError):
    """The baseline that was asked for is not among the rows."""


def differences(a: Row, b: Row) -> list[str]:
    """Return why the times of two rows must not be divided: one reason per difference, none if the two are alike.

    A backend is compared only between models that have attention.
    A value that one record lacks is a reason too: what is not known to be equal is not compared.
    """
    reasons = []
    for name, word in FAIR.items():
        x, y = (_kernel(row) if name == "attention_backend" else getattr(row, name) for row in (a, b))
        if name == "attention_backend" and _NO_ATTENTION in (x, y):
            continue
        if x is None or y is None:
            reasons.append(f"{word} not recorded")
        elif x != y:
            reasons.append(f"{word} {_short(x, name)} against {_short(y, name)}")
    slides = [set(row.runs[0].dice_per_slide or ()) for row in (a, b)]
    if slides[0] != slides[1]:
        reasons.append("other test slides")
    elif scored_elsewhere(a, b):
        reasons.append("other test pixels")
    return reasons


def scored_elsewhere(a: Row, b: Row) -> bool:
    """Whether two rows on the same slides and frame were scored on other pixels, e.g. one inside a field of view.

    The Dice of a prediction that is foreground everywhere depends on those pixels alone.
    """
    x, y = ((row.floors or {}).get("all_foreground") for row in (a, b))
    if a.resolution != b.resolution or x is None or y is None:
        return False
    return bool(abs(x - y) > 1e-6)


def remarks(a: Row, b: Row) -> list[str]:
    """Return differences that may be compared and must be said."""
    words = {"engine": "engine", "global_batch": "global batch", "model": "model"}
    pairs = ((word, getattr(a, name), getattr(b, name)) for name, word in words.items())
    return [f"{word} {x} against {y}" for word, x, y in pairs if x != y]


def speedups(rows: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Return how many times faster each row is than its baseline: its seconds per image divide the baseline's.

    The baseline of a row is its fair counterpart among the uniform, untiled rows of its resolution, of the same model
    if there is one: that with the smallest patch, which is what adaptive patching claims to replace. Where none is
    fair, it is the finest of the resolution, to say why.

    Args:
        rows: What `groups.group_runs` made.
        baseline: Label or experiment of the only rows allowed as the denominator.

    Returns:
        For each row `ratio`, or NaN; `baseline`: its label, or None; `refused`: reasons why there is no ratio;
        `remarks`: what differs and may be compared.

    Raises:
        BaselineError: No row has that name.
    """
    kernel = rows.attention_backend.where(~rows.model.isin(_CONVOLUTIONAL), _NO_ATTENTION)
    timed = rows[[*_SHARED, "label"]].assign(
        slides=[frozenset(runs[0].dice_per_slide or ()) for runs in rows.runs],
        kernel=kernel,
        patch=rows.patch.fillna(0),
        model=rows.model.fillna(""),
        decoder=rows.decoder.fillna(""),
        global_batch=rows.global_batch.fillna(-1),
        place=range(len(rows)),
    )
    is_timed = rows.seconds_per_image.fillna(0) != 0
    plain = rows_of(rows)
    if baseline is None:
        chosen = _choose(timed, timed[(rows.patching == "uniform") & ~rows.tiled & is_timed])
    else:
        named = (rows.label == baseline) | (rows.experiment == baseline)
        if not named.any():
            raise BaselineError(f"baseline {baseline!r} is not among the runs; there are: {', '.join(rows.label)}")
        chosen = _choose_named(timed, timed[named & is_timed], plain)
    found = [_quotient(row, None if place < 0 else plain[place]) for row, place in zip(plain, chosen, strict=True)]
    return pd.DataFrame(found, columns=["ratio", "baseline", "refused", "remarks"], index=rows.index)


def _choose(rows: pd.DataFrame, uniform: pd.DataFrame) -> list[int]:
    """The place of each row's baseline: the best fair row, else the best row of the resolution; -1: none."""
    shared = [*_SHARED, "slides"]
    candidates = uniform.dropna(subset=shared)
    fair = _joined(rows.dropna(subset=shared), candidates, shared, ["kernel"])
    fair = fair[(fair.kernel == _NO_ATTENTION) | (fair.kernel == fair.kernel_b)]
    itself = uniform.join(uniform.add_suffix("_b"))
    near = _joined(rows, uniform, ["resolution"], [])
    return _first(rows, [itself, fair], [near])


def _joined(rows: pd.DataFrame, uniform: pd.DataFrame, on: list[str], also: list[str]) -> pd.DataFrame:
    """Each row beside the finest uniform rows that are alike in `on`, one for each model, decoder and batch."""
    kinds = [*on, *also, *_PREFERRED]
    finest = uniform.sort_values(["patch", "label"]).drop_duplicates(kinds)
    return rows.merge(finest.add_suffix("_b"), left_on=on, right_on=[f"{name}_b" for name in on])


def _choose_named(rows: pd.DataFrame, named: pd.DataFrame, plain: list[Row]) -> list[int]:
    """The same among the rows of one name."""
    pairs = rows.merge(named.add_suffix("_b"), how="cross")
    places = zip(pairs.place, pairs.place_b, strict=True)
    fair = pd.Series([a == b or not differences(plain[a], plain[b]) for a, b in places], dtype=bool)
    return _first(rows, [pairs[fair]], [pairs[~fair]])


def _first(rows: pd.DataFrame, fair: list[pd.DataFrame], unfair: list[pd.DataFrame]) -> list[int]:
    """The best of each row's pairs: a fair one, the same model, smallest patch, same decoder, batch, first label."""
    pairs = pd.concat([p.assign(unfair=i) for i, some in enumerate((fair, unfair)) for p in some], ignore_index=True)
    other = {f"other_{name}": pairs[name] != pairs[f"{name}_b"] for name in _PREFERRED}
    order = ["place", "unfair", "other_model", "patch_b", "other_decoder", "other_global_batch", "label_b"]
    best = pairs.assign(**other).sort_values(order).drop_duplicates("place").set_index("place").place_b
    return [int(place) for place in best.reindex(rows.place, fill_value=-1)]


def _quotient(row: Row, base: Row | None) -> tuple[float | None, str | None, tuple[str, ...], tuple[str, ...]]:
    if not row.seconds_per_image or base is None:
        missing = "no timed uniform baseline" if row.seconds_per_image else "s/image of this row is missing"
        return None, None, (missing,), ()
    itself = base.label == row.label
    if reasons := [] if itself else differences(row, base):
        return None, base.label, tuple(reasons), ()
    ratio = base.seconds_per_image / row.seconds_per_image
    if not math.isfinite(ratio):
        return None, base.label, ("s/image of this row is too small to divide by",), ()
    return ratio, base.label, (), () if itself else tuple(remarks(row, base))


def _kernel(row: Row) -> str | None:
    return _NO_ATTENTION if row.model in _CONVOLUTIONAL else row.attention_backend


def _short(value: Any, name: str) -> str:
    return str(value)[:12] if name == "split_sha256" else str(value)[:80]
