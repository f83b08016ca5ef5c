"""One self-contained page: measured tables, figures, pictures, provenance, and the published numbers apart.

Every text from a record is escaped, images are embedded, and no script runs.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.comparison.table import Comparison, comparison_table, dice_cell, problem_table, ratio
from analysis.figures.draw import draw_all
from analysis.output.figure_style import Drawing
from analysis.output.formats import MISSING, escape_html, html_table, number, whole, write_files
from analysis.report.sections import contradictory, figure_html, joined, modelled, published
from analysis.runs.records import STUDY, Row

CSS = Path(__file__).with_name("page.css")
MOST_PROVENANCE = 200  # runs with a block of their own; beyond that the page would be all blocks


@dataclass(frozen=True)
class PageOptions:
    """What a page shall hold beyond its runs.

    Attributes:
        sites: Sites that the scaling model predicts.
        runs_site: Site that the runs ran on; None: see `sections.modelled`.
        more: Further measured figures (receptive fields, sweeps of lengths).
    """

    sites: tuple[str, ...] = ("frontier",)
    runs_site: str | None = None
    more: tuple[Drawing, ...] = ()


def write_report(comparison: Comparison, out: Path, options: PageOptions | None = None) -> Path:
    """Write OUT/index.html whole or not at all, and return its path.

    Raises:
        ValueError: the folder cannot be written, or there is no such site.
    """
    path, options = out / "index.html", options or PageOptions()
    write_files(path.parent, {path.name: page(comparison, [*draw_all(comparison), *options.more], out, options)})
    return path


def page(comparison: Comparison, drawings: list[Drawing], out: Path, options: PageOptions | None = None) -> str:
    """Return the page as HTML; `out` is the folder that links to run folders start from."""
    options = options or PageOptions()
    sections = [
        ("measured", "Measured runs", _measured(comparison)),
        ("figures", "Figures of the measured runs", _figures(drawings)),
        ("joined", "Measured beside published and modelled", joined(comparison)),
        ("modelled", "Scaling, modelled", modelled(comparison, options.sites, options.runs_site)),
        ("published", "Published numbers", published()),
        ("contradictions", "Contradictions among the published numbers", contradictory()),
        ("problems-section", "What is not in the tables", _problems(comparison)),
        ("provenance", "Where the numbers come from", _provenance(comparison, out)),
    ]
    links = "".join(f'<li><a href="#{ident}">{escape_html(title)}</a></li>' for ident, title, _ in sections)
    body = "".join(
        f'<section id="{ident}" aria-labelledby="h-{ident}">'
        f'<h2 id="h-{ident}">{escape_html(title)}</h2>{text}</section>'
        for ident, title, text in sections
    )
    title = f"Experiment report: {comparison.root.resolve().name.removesuffix(STUDY)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape_html(title)}</title>\n<style>\n{CSS.read_text()}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#content">Skip to the content</a>\n'
        f"<header><h1>{escape_html(title)}</h1>{_summary(comparison)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main id="content" tabindex="-1">{body}</main>\n'
        f"<footer><p>{_footer(comparison)}</p></footer>\n</body>\n</html>\n"
    )


def _summary(comparison: Comparison) -> str:
    """Return the few numbers that a reader looks for first, or the sentence that there are none."""
    runs = sum(len(row.runs) for row in comparison.rows)
    if not runs:
        return f"<p>No finished run; {len(comparison.problems)} run folders are listed below with the reason.</p>"
    facts = [("finished runs", str(runs))]
    facts += _best(comparison)
    adaptive = [row for row in comparison.rows if row.ratio is not None and row.patching == "apf"]
    if adaptive:
        best = max(adaptive, key=lambda row: row.ratio)
        facts.append((f"time per image, {best.baseline} over {best.label}", ratio(best.ratio)))
    items = "".join(f"<div><dt>{escape_html(name)}</dt><dd>{escape_html(value)}</dd></div>" for name, value in facts)
    return f'<dl class="key">{items}</dl>'


_MOST_DATA = 3  # data sets whose best run stands at the top of the page


def _best(comparison: Comparison) -> list[tuple[str, str]]:
    """The best score on each data set of each task, and the trivial baseline on the same data."""
    facts = []
    for name, task in (("dice", "segmentation"), ("auc", "classification"), ("accuracy", "classification")):
        sets: dict[tuple[Any, ...], list[Row]] = {}
        for row in comparison.rows:
            if row.task == task and getattr(row, name) is not None:
                sets.setdefault(_data(row), []).append(row)
        if name == "accuracy":  # an AUC says more, where there is one
            sets = {key: gs for key, gs in sets.items() if all(g.auc is None for g in gs)}
        for scored in list(sets.values())[:_MOST_DATA]:
            facts += _best_of(comparison, scored, name, task, len(sets) > 1)
        if len(sets) > _MOST_DATA:
            facts.append((f"more data sets with {_SCORES[name]}, in the table", str(len(sets) - _MOST_DATA)))
    return facts


_SCORES = {"dice": "Dice", "auc": "AUC", "accuracy": "accuracy"}


def _best_of(comparison: Comparison, scored: list[Row], name: str, task: str, several: bool) -> list[tuple[str, str]]:
    best = max(scored, key=lambda row: (getattr(row, name), row.label))
    where = f"{best.label}, {whole(best.resolution) or '?'} px" if several else best.label
    value = dice_cell(best) if name == "dice" else number(getattr(best, name))
    facts = [(f"highest test {_SCORES[name]}, {where}", value or MISSING)]
    floors = [f.high for f in comparison.trivial if f.task == task and best.label in dict(f.values)]
    if floors and name != "auc":
        which = " of the same data" if several else ""
        facts.append((f"highest floor{which} (no learning)", f"{max(floors):.3f}"))
    return facts


def _data(row: Row) -> tuple[Any, ...]:
    """What two scores must share before the higher one is the better one."""
    return row.resolution, row.split_sha256 or tuple(sorted(row.runs[0].dice_per_slide or ()))


def _measured(comparison: Comparison) -> str:
    if not comparison.rows:
        return "<p>There is no finished run to compare.</p>"
    return f'<div class="measured">{html_table(comparison_table(comparison))}</div>'


def _figures(drawings: list[Drawing]) -> str:
    if not drawings:
        return "<p>The runs left no data to draw.</p>"
    blocks: list[str] = []
    narrow: list[str] = []
    for drawing in drawings:
        small = drawing.figure.get_figwidth() < 5
        (narrow if small else blocks).append(figure_html(drawing))
    pair = f'<div class="pair">{"".join(narrow)}</div>' if narrow else ""
    return pair + "".join(blocks)


def _problems(comparison: Comparison) -> str:
    if not comparison.problems:
        return "<p>Nothing: every record in the folder is in the table.</p>"
    return html_table(problem_table(comparison))


def _provenance(comparison: Comparison, out: Path) -> str:
    runs = [(row, run) for row in comparison.rows for run in row.runs]
    if not runs:
        return "<p>No finished run.</p>"
    blocks = [_provenance_block(row.label, run, out) for row, run in runs[:MOST_PROVENANCE]]
    left = len(runs) - MOST_PROVENANCE
    if left > 0:
        blocks.append(f"<p>{left} more runs are not listed here; their commits and settings are in comparison.csv.</p>")
    intro = "<p>One entry per run: code, versions, machine and settings, and a link to the run folder.</p>"
    return intro + "".join(blocks)


def _provenance_block(label: str, run: Row, out: Path) -> str:
    environment = run.files.environment
    versions = environment.get("versions")
    packages = ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else None
    # A run of a collected study is a line of a file, which a slash at the end would make a folder of.
    study = next((path for path in (run.folder, *run.folder.parents) if path.is_file()), None)
    link = quote(os.path.relpath((study or run.folder).resolve(), out.resolve()).replace(os.sep, "/"))
    link += "" if study else "/"
    parameters = f"{run.parameters:,}" if run.parameters is not None else None
    hardware = " / ".join(dict.fromkeys(str(v) for v in (run.device_name, run.device, environment.get("cpu")) if v))
    facts = [
        ("commit", run.commit or environment.get("commit")),
        ("versions", packages),
        ("python", environment.get("python")),
        ("hardware", hardware or None),
        ("ranks, nodes", f"{_or_missing(run.gpus)}, {_or_missing(run.nodes)}"),
        ("engine, precision", f"{_or_missing(run.engine)}, {_or_missing(run.precision)}"),
        ("attention backend", run.attention_backend),
        ("optimiser, global batch", f"{_or_missing(run.optimiser)}, {_or_missing(run.global_batch)}"),
        ("parameters", parameters),
        ("seed", run.seed),
        ("config hash", run.config_sha256),
        ("data, split hash", f"{_or_missing(run.data)}, {_or_missing(run.split_sha256)}"),
        ("timing", run.warmup_rule),
        ("peak memory (GiB)", None if run.peak_memory_gib is None else f"{run.peak_memory_gib:.2f}"),
        ("started, finished", f"{_or_missing(run.started_at)}, {_or_missing(run.finished_at)}"),
    ]
    rows = "".join(f"<div><dt>{escape_html(k)}</dt><dd>{escape_html(_or_missing(v))}</dd></div>" for k, v in facts)
    name, text = escape_html(f"{label}: {run.run_id}"), escape_html(run.folder.as_posix())
    kind = "collected run" if study else "run folder"
    folder = f'<div><dt>{kind}</dt><dd><a href="{escape_html(link)}">{text}</a></dd></div>'
    return f"<details open><summary>{name}</summary><dl>{folder}{rows}</dl></details>"


def _or_missing(value: object) -> str:
    return MISSING if value in (None, "") else str(value)


def _footer(comparison: Comparison) -> str:
    newest = max((r.finished_at for row in comparison.rows for r in row.runs if r.finished_at), default=None)
    when = f" The newest run finished at {escape_html(newest)}." if newest else ""
    return f"Made by <code>python -m analysis report</code> from {escape_html(comparison.root.as_posix())}.{when}"
