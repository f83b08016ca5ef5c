"""Sections of the report that do not come from records alone: joined tables, the scaling model, published numbers.

Each says what it is in words, in its captions and in a source column, so that nothing depends on colour.
"""

import base64
from collections.abc import Sequence
from functools import lru_cache

from analysis.comparison.table import Comparison
from analysis.figures.published import draw_published
from analysis.figures.scaling import predicted_scaling
from analysis.output.figure_style import Drawing, encode
from analysis.output.formats import Table, escape_html, html_table
from analysis.papers.measured_rows import BELONGS, measured_cells
from analysis.papers.tables import TABLES, contradictions_table, paper_table, table_cells
from analysis.scaling.model import assumed_fit, fit_records
from analysis.scaling.prediction import EXPERIMENTS, fit_table, held_out_table, predict, prediction_table
from analysis.scaling.table3 import modelled_cells, published_table
from analysis.scaling.work import measured
from launch.config.sites import load_site
from launch.experiments.load import load as load_experiment

MOST_JOINED = 60  # measured rows that a joined table shows; thousands belong into `tables --source joined`
GPUS = (1, 8, 64, 512, 2048)
_FIRST = ("apf2", "apf3")  # of the published tables, open on the page; the others fold


def figure_html(drawing: Drawing) -> str:
    """Return a figure element with the picture embedded."""
    suffix, mime = ("jpg", "image/jpeg") if drawing.photographic else ("svg", "image/svg+xml")
    data = base64.b64encode(encode(drawing.figure, suffix)).decode("ascii")
    # Print size enlarged, so that 7 pt letters read like the text around them.
    width = drawing.figure.get_figwidth() * 72 / 12 * 1.6
    slug = escape_html(drawing.slug)
    return (
        f'<figure id="figure-{slug}" aria-labelledby="title-{slug}"><img src="data:{mime};base64,{data}" '
        f'alt="{escape_html(drawing.alt)}" style="width:{width:.1f}rem"><figcaption>'
        f'<strong id="title-{slug}">{escape_html(drawing.title)}.</strong> {escape_html(drawing.caption)}'
        "</figcaption></figure>"
    )


def _block(kind: str, tables: Sequence[Table], row_heads: int = 1) -> str:
    return "".join(f'<div class="{kind}">{html_table(t, row_heads)}</div>' for t in tables)


def joined(comparison: Comparison) -> str:
    """Measured rows in the papers' tables, beside published and modelled ones; a sentence where none belongs."""
    found = []
    for name in BELONGS:
        cells, remarks = measured_cells(name, comparison)
        rows = list(dict.fromkeys(c.row for c in cells))
        if not rows:
            continue
        if len(rows) > MOST_JOINED:
            kept = set(rows[:MOST_JOINED])
            cells = [c for c in cells if c.row in kept]
            remarks = [
                *remarks,
                f"The first {MOST_JOINED} of {len(rows)} measured rows; `tables --which {name} "
                "--source joined` has all.",
            ]
        model, said = modelled_cells(name)
        table = paper_table(name, [*table_cells(name), *cells, *model], [*remarks, *said])
        found.append(Table(table.caption, table.columns, table.rows, table.kinds, table.notes, f"joined-{table.slug}"))
    if not found:
        return "<p>No measured run belongs to a table of the papers.</p>"
    intro = (
        "<p>The papers' tables with the measured rows where they belong; the column <em>source</em> says of every row "
        "which it is. Modelled rows are predictions for the published settings. Published rows are of other hardware "
        "and other data: a difference between a published and a measured number has no single cause.</p>"
    )
    return intro + _block("joined", found)


def modelled(comparison: Comparison, site_names: Sequence[str], runs_site: str | None) -> str:
    """The scaling model: what it predicts, what it was fitted to, and how far off it is.

    Args:
        comparison: The runs, which the factors are fitted to where they can be.
        site_names: Sites to predict.
        runs_site: Where the runs ran; None: `local` for runs on CPUs, else no fit.

    Raises:
        ConfigError: No such site.
    """
    sites = [load_site(name) for name in site_names]
    runs = [run for row in comparison.rows for run in row.runs]
    on_cpu = bool(runs) and all(run.device == "cpu" for run in runs)
    home = load_site(runs_site) if runs_site else load_site("local") if on_cpu else None
    fits = {site.name: assumed_fit(site) for site in sites}
    tables: list[Table] = []
    said = "No factor was fitted: give --runs-site, the site that the runs ran on."
    if home is not None:
        found, left = measured(runs, home)
        said = f"No factor was fitted: no record has all that the model needs ({left[0]})." if left else ""
        if found:
            fit = fit_records([m.work for m in found], [m.seconds for m in found], home)
            fits |= {home.name: fit} if home.name in fits else {}
            tables = [fit_table(fit, home), *filter(None, [held_out_table(found, home)])]
            said = f"Fitted to {len(found)} records; {len(left)} could not be used." if left else ""
    configs = [load_experiment(name) for name in EXPERIMENTS]
    predictions = predict(configs, sites, fits, GPUS, "weak", 1.0)
    tables = [prediction_table(predictions, "weak"), published_table(), *tables]
    intro = (
        "<p>Nobody has measured the predicted times. They come from a model of the step time with named terms; its "
        "factors are assumed from the site's file, or fitted to the runs of this page where a table says so. How far "
        f"the model is from the published times stands row by row below. {escape_html(said)}</p>"
    )
    figure = f'<div class="modelled">{figure_html(predicted_scaling(predictions, "weak"))}</div>'
    return intro + figure + _block("modelled", tables)


@lru_cache(maxsize=1)
def published() -> str:
    """Published numbers: figures, Tables II and III, all other tables folded, and where they contradict each other."""
    intro = (
        "<p>These rows were printed by other people, for other data and machines. They stand here for orientation and "
        "are never mixed with the measured tables above without a column that says which is which.</p>"
    )
    figures = "".join(f'<div class="published">{figure_html(d)}</div>' for d in draw_published())
    first = _block("published", [paper_table(name, table_cells(name)) for name in _FIRST], 2)
    rest = "".join(
        f"<details><summary>{escape_html(TABLES[name].title)}</summary>"
        f"{_block('published', [paper_table(name, table_cells(name))], 2)}</details>"
        for name in TABLES
        if name not in _FIRST
    )
    return intro + first + figures + rest


@lru_cache(maxsize=1)
def contradictory() -> str:
    """Where the published numbers contradict each other."""
    return _block("published", [contradictions_table()])
