"""A model of the time of one training step, with a named term for everything that costs, fitted to records.

The time is a fixed time per step and a sum of factor * ideal. `ideal` is the time at the hardware's peak rates; the
factor is 1 or more (2.5 on the encoder is an MFU of 40 %). Bounded linear least squares on relative errors fit the
factors, so the fit is unique. A factor that the records say nothing about keeps its assumed value.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import lsq_linear

from launch.config.sites import Link, Site

# Terms with a fitted factor, the meaning of each, and the factor that is assumed until records say better.
FACTORS = {
    "encoder": ("transformer arithmetic at the peak rate", 2.5),
    "decoder": ("convolution arithmetic at the peak rate", 5.0),
    "memory": ("optimiser's traffic at the peak bandwidth", 1.5),
    "parameters": ("gathering sharded parameters", 1.5),
    "gradients": ("summing gradients over GPUs", 1.5),
    "fixed": ("seconds of every step that no hardware rate explains", 0.02),
}
_ARITHMETIC = ("encoder", "decoder")
TERMS = (*FACTORS, "imbalance", "data", "checkpoint")
ADAM_BYTES = 28  # fp32: weight, gradient and two moments read, weight and two moments written
SAVED_BYTES = 12  # weight and two moments


@dataclass(frozen=True)
class Work:
    """One training step on some GPUs.

    Attributes:
        gpus: N.
        images: images per GPU and step.
        encoder: FLOPs of the encoder, forward, per image.
        decoder: FLOPs of the rest, forward, per image.
        weights: trainable numbers.
        precision: fp32 or bf16.
        shard: GPUs of a shard group; 1 means every GPU holds everything.
        recompute: activations are computed again in the backward pass.
        spread: for sequences of different lengths that are not padded: cost of sample images over their mean.
        image_bytes: what is read per image.
        save_every_s: seconds between two checkpoints; None for none.
        read_mb_s: what one node reads from the file system.
    """

    gpus: int
    images: float
    encoder: float
    decoder: float
    weights: int
    precision: str = "bf16"
    shard: int = 1
    recompute: bool = False
    spread: tuple[float, ...] = ()
    image_bytes: float = 0.0
    save_every_s: float | None = None
    read_mb_s: float = 2000.0


@dataclass(frozen=True)
class Fit:
    """Factors of the model, with what is known of them.

    Attributes:
        factors: value by term.
        low: lower end of the 95 % interval by term.
        high: upper end by term.
        assumed: terms that the records say nothing about.
        error: root mean square of the relative errors on the records of the fit, None without records.
        n: number of records.
    """

    factors: dict[str, float]
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    assumed: tuple[str, ...] = tuple(FACTORS)
    error: float | None = None
    n: int = 0


def assumed_fit(site: Site | None = None) -> Fit:
    """Factors before any record: the site's expected rates over its peaks, else general ones."""
    factors = {name: default for name, (_, default) in FACTORS.items()}
    if site is not None:
        hardware, expected = site.hardware, site.expected
        gemm = hardware.peak_tflops["bf16"] / expected.gemm_tflops["bf16"]
        factors |= {
            "encoder": max(1.0, gemm * 1.25),  # attention and elementwise work beside the matrix products
            "decoder": max(1.0, gemm * 2.5),
            "memory": max(1.0, hardware.memory_gb_s / expected.memory_gb_s),
            "gradients": max(1.0, site.network.inter_node.gb_s / expected.all_reduce_gb_s),
        }
    return Fit(factors)


# ---- collectives, by the alpha-beta model


def ring(bytes_: float, ranks: int, link: Link) -> float:
    """Seconds of a ring all-gather (or reduce-scatter) of `bytes_` in all over `ranks`: (n - 1) (alpha + S / n / beta).

    Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH (2005), section 4.
    """
    if ranks < 2:
        return 0.0
    return (ranks - 1) * (link.latency_us * 1e-6 + bytes_ / ranks / (link.gb_s * 1e9))


def all_reduce(bytes_: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce: reduce-scatter, then all-gather; alpha of a tree, for that is what libraries take."""
    if ranks < 2:
        return 0.0
    steps = 2 * float(np.ceil(np.log2(ranks)))
    return steps * link.latency_us * 1e-6 + 2 * (ranks - 1) / ranks * bytes_ / (link.gb_s * 1e9)


def reduce_over(bytes_: float, gpus: int, site: Site) -> float:
    """Seconds of an all-reduce over all GPUs: within nodes, then a share of it between nodes, then within nodes."""
    here = min(gpus, site.hardware.gpus_per_node)
    nodes = -(-gpus // here)
    inside, between = site.network.intra_node, site.network.inter_node
    return 2 * ring(bytes_, here, inside) + all_reduce(bytes_ / here, nodes, between)


# ---- terms


def ideal_terms(work: Work, site: Site) -> dict[str, float]:
    """Seconds that each fitted term takes at the site's peak rates; `fixed` is 1, since its factor is seconds."""
    peak = site.hardware.peak_tflops["bf16" if work.precision == "bf16" else "fp32"] * 1e12
    passes = 4 if work.recompute else 3
    shard = max(1, min(work.shard, work.gpus))
    bytes_ = 2 if work.precision == "bf16" else 4
    here = site.hardware.gpus_per_node
    link = site.network.intra_node if shard <= here else site.network.inter_node
    gathered = 2 * ring(bytes_ * work.weights, shard, link)
    summed = ring(4.0 * work.weights, shard, link) + (
        reduce_over(4.0 * work.weights / shard, work.gpus // shard, _between(site, shard)) if shard < work.gpus else 0.0
    )
    return {
        "encoder": passes * work.images * work.encoder / peak,
        "decoder": passes * work.images * work.decoder / peak,
        "memory": ADAM_BYTES * work.weights / shard / (site.hardware.memory_gb_s * 1e9),
        "parameters": gathered,
        "gradients": summed,
        "fixed": 1.0,
    }


def _between(site: Site, shard: int) -> Site:
    """The site as replicas of a shard group see it: fewer of them on a node."""
    hardware = site.hardware.model_copy(update={"gpus_per_node": max(1, site.hardware.gpus_per_node // shard)})
    return site.model_copy(update={"hardware": hardware})


def expected_largest(spread: Sequence[float], draws: int) -> float:
    """Expected largest of `draws` independent samples from the given ones: exact, from their distribution function."""
    if not spread:
        return 1.0
    values = np.sort(np.asarray(spread, float))
    below = np.arange(1, values.size + 1) / values.size
    weight = below**draws - (below - 1 / values.size) ** draws
    return float((values * weight).sum())


def _excess(work: Work) -> float:
    """How much more the slowest GPU computes than the mean one; all others wait for it."""
    if not work.spread:
        return 0.0
    largest = expected_largest(work.spread, max(1, work.gpus)) - 1
    return max(0.0, largest / float(np.sqrt(max(1.0, work.images))))


def _reading(work: Work, site: Site) -> float:
    """Seconds in which the node's share of the file system delivers a GPU's images."""
    rate = work.read_mb_s * 1e6 / min(work.gpus, site.hardware.gpus_per_node)
    return work.images * work.image_bytes / rate


def _saving(work: Work, site: Site) -> float:
    """Seconds of saving per second of training: every node writes its share, every `save_every_s`."""
    nodes = -(-work.gpus // site.hardware.gpus_per_node)
    seconds = SAVED_BYTES * work.weights / (nodes * site.expected.disk_write_mb_s * 1e6)
    return 0.0 if not work.save_every_s else seconds / work.save_every_s


def terms(work: Work, site: Site, fit: Fit) -> dict[str, float]:
    """Seconds of each term of one step; their sum is the time of the step."""
    ideal = ideal_terms(work, site)
    out = {name: fit.factors[name] * ideal[name] for name in FACTORS}
    arithmetic = out["encoder"] + out["decoder"]
    out["imbalance"] = arithmetic * _excess(work)
    # Reading runs beside the arithmetic: only what it takes longer is waited for.
    out["data"] = max(0.0, _reading(work, site) - arithmetic - out["imbalance"])
    out["checkpoint"] = sum(out.values()) * _saving(work, site)
    return out


def binding(parts: dict[str, float]) -> str:
    """The term that takes most of a step."""
    return max(parts, key=lambda name: parts[name])


# ---- fit


def fit_records(works: Sequence[Work], seconds: Sequence[float], site: Site, seed: int = 0, draws: int = 200) -> Fit:
    """Fit the factors to measured step times.

    Args:
        works: What each measured step did.
        seconds: Its time.
        site: Where all of them ran.
        seed: Of the bootstrap.
        draws: Bootstrap samples of the records for the intervals.

    Returns:
        Factors of at least 1 (the fixed time: at least 0). A term keeps the assumed factor if its share of every step
        is below 0.1 %, or if no two records tell it from another term.
    """
    start = assumed_fit(site)
    if not works:
        return start
    names = list(FACTORS)
    times = np.asarray(seconds, float)
    assumed = np.array([start.factors[name] for name in names])
    best, bound = assumed, None
    # Which steps wait for their data depends on the factors, and the factors on these steps.
    for _ in range(_MOST_ROUNDS):
        waits = [_reading(w, site) > _arithmetic(w, site, best, names) for w in works]
        if waits == bound:
            break
        bound = waits
        ideal, rest = _linear(works, site, waits, names)
        known = _identifiable(ideal / times[:, None], assumed, names)
        best = _solve(ideal, times - rest, times, assumed, known, names)
    # The intervals: fit again to records drawn with replacement.
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(draws):
        rows = generator.integers(len(times), size=len(times))
        samples.append(_solve(ideal[rows], (times - rest)[rows], times[rows], assumed, known, names))
    spread = np.array(samples)
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    residual = (ideal @ best + rest - times) / times
    return Fit(
        dict(zip(names, best.tolist(), strict=True)),
        {n: min(lo, b) for n, lo, b, k in zip(names, low.tolist(), best.tolist(), known, strict=True) if k},
        {n: max(hi, b) for n, hi, b, k in zip(names, high.tolist(), best.tolist(), known, strict=True) if k},
        tuple(n for n, k in zip(names, known, strict=True) if not k),
        float(np.sqrt((residual**2).mean())),
        len(times),
    )


_MOST_ROUNDS = 20


def _arithmetic(work: Work, site: Site, factors: np.ndarray, names: list[str]) -> float:
    """Seconds of arithmetic, the slowest GPU's."""
    ideal = ideal_terms(work, site)
    of: dict[str, float] = dict(zip(names, factors.tolist(), strict=True))
    return (1 + _excess(work)) * sum(of[name] * ideal[name] for name in _ARITHMETIC)


def _linear(
    works: Sequence[Work], site: Site, waits: Sequence[bool], names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The step times as a matrix (records, factors) and a constant, given which steps wait for their data.

    Imbalance stretches the arithmetic, saving stretches everything, and a step that waits for its data takes the time
    of reading in place of its arithmetic: `terms` in matrix form.
    """
    matrix, constant = [], []
    for work, waiting in zip(works, waits, strict=True):
        ideal = ideal_terms(work, site)
        stretch = 0.0 if waiting else 1 + _excess(work)
        saved = 1 + _saving(work, site)
        matrix.append([saved * ideal[n] * (stretch if n in _ARITHMETIC else 1.0) for n in names])
        constant.append(saved * _reading(work, site) if waiting else 0.0)
    return np.array(matrix), np.array(constant)


def _identifiable(relative: np.ndarray, assumed: np.ndarray, names: list[str]) -> list[bool]:
    """Which columns the records determine: large enough, and independent of the columns before."""
    known = []
    kept: list[np.ndarray] = []
    for i, _ in enumerate(names):
        column = relative[:, i]
        large = float((column * max(assumed[i], 1e-12)).max()) > 1e-3
        independent = np.linalg.matrix_rank(np.array([*kept, column]), tol=1e-6 * np.linalg.norm(column)) > len(kept)
        known.append(bool(large and independent))
        if known[-1]:
            kept.append(column)
    return known


def _solve(
    ideal: np.ndarray, times: np.ndarray, scale: np.ndarray, assumed: np.ndarray, known: list[bool], names: list[str]
) -> np.ndarray:
    """Bounded least squares on relative errors for the known factors, the others held."""
    out = assumed.copy()
    mask = np.array(known)
    if mask.any():
        held = ideal[:, ~mask] @ assumed[~mask]
        lower = np.array([0.0 if n == "fixed" else 1.0 for n, k in zip(names, known, strict=True) if k])
        matrix = ideal[:, mask] / scale[:, None]
        size = np.linalg.norm(matrix, axis=0)
        size[size == 0] = 1.0
        solved = lsq_linear(matrix / size, (times - held) / scale, bounds=(lower * size, np.inf))
        out[mask] = solved.x / size
    return out


def at(work: Work, gpus: int, mode: str, base: int = 1) -> Work:
    """The same training on another number of GPUs.

    Args:
        work: The step on `base` GPUs.
        gpus: N.
        mode: weak (images per GPU stay) or strong (images per step stay).
        base: GPUs of `work`.
    """
    images = work.images if mode == "weak" else work.images * base / gpus
    return replace(work, gpus=gpus, images=images, shard=min(work.shard, gpus))
