"""Where the papers' own numbers contradict each other, found by arithmetic on the cells (standard library only)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from analysis.papers.entries import Cell
from analysis.papers.reference import table2_geomean, table2_speedups, table3_gains

Cells = dict[str, list[Cell]]
_SETTINGS = (("tokens", "with L = {:,.0f}"), ("gpus", "on {:,.0f} GPUs"), ("patch_px", "with p = {:.0f}"))


@dataclass(frozen=True)
class Contradiction:
    """Two statements that cannot both hold, or a number that does not follow from the cells it is said to follow from.

    Attributes:
        paper: Whose numbers.
        where: Tables and rows, the first statement's before the second's.
        says: The first statement.
        but: The second statement, or what the arithmetic gives.
        why: What a reader should make of it.
    """

    paper: str
    where: str
    says: str
    but: str
    why: str


def contradictions(cells: Cells) -> list[Contradiction]:
    """Return every contradiction found in the reference files, in a fixed order.

    Args:
        cells: What `cells.read_all` gives.
    """
    two, three = cells["apf_table2"], cells["apf_table3"]
    return [
        *_same_time(two, three),
        *_repeated_dice(three),
        *_gains(three),
        *_same_cost(three),
        *_apf_text(cells),
        *_column_heads(two, three),
        *_hct(cells),
        *_rivit(cells["rivit"]),
        *_shf(cells["shf"], three),
    ]


def _rows(cells: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    """Return the cells by row and quantity."""
    rows: dict[str, dict[str, Cell]] = defaultdict(dict)
    for cell in cells:
        rows[cell.row][cell.quantity] = cell
    return rows


def _same_time(two: Sequence[Cell], three: Sequence[Cell]) -> Iterator[Contradiction]:
    """One time per image stands in Tables II and III with other sequence lengths or other numbers of GPUs."""
    others = _rows(three)
    for row, mine in _rows(two).items():
        theirs = others.get(row, {})
        time, again = mine["seconds_per_image"], theirs.get("seconds_per_image")
        if again is None or not _rounds_to(time, again):
            if (match := _row_with_time(time, others)) is None:
                continue
            theirs = others[match]
            again = theirs["seconds_per_image"]
        for quantity, word in _SETTINGS:
            x, y = _number(mine, quantity, time), _number(theirs, quantity, again)
            if x is not None and y is not None and x != y:
                yield Contradiction(
                    time.paper,
                    f"Table II and Table III, {row}" + ("" if again.row == row else f" ({again.row})"),
                    f"{time.text} s/image {word.format(x)}",
                    f"{again.text} s/image {word.format(y)}",
                    "the same measured time cannot belong to both settings",
                )


def _row_with_time(time: Cell, others: dict[str, dict[str, Cell]]) -> str | None:
    """Return a row of the same resolution and model with the same time, whatever its patch."""
    for row, found in others.items():
        cell = found.get("seconds_per_image")
        if cell and (cell.resolution, cell.model) == (time.resolution, time.model) and _rounds_to(time, cell):
            return row
    return None


def _rounds_to(a: Cell, b: Cell) -> bool:
    """Whether two printed numbers are one, printed with more digits in one place."""
    digits = min(len(c.text.partition(".")[2]) for c in (a, b))
    return abs((a.value or 0) - (b.value or 0)) <= 0.5 * 10**-digits + 1e-12


def _number(row: dict[str, Cell], quantity: str, any_cell: Cell) -> float | None:
    if quantity == "patch_px":
        return any_cell.patch_px
    return row[quantity].value if quantity in row else None


def _repeated_dice(three: Sequence[Cell]) -> Iterator[Contradiction]:
    """Two resolutions have the same three or more Dice values in a row."""
    dice: dict[int, list[str]] = defaultdict(list)
    for cell in three:
        if cell.quantity == "dice" and cell.model == "APF-UNETR" and cell.resolution and cell.status == "published":
            dice[cell.resolution].append(cell.text)
    for a, b in combinations(sorted(dice), 2):
        shared = [v for v in dice[a] if v in dice[b]]
        if len(shared) >= 3:
            yield Contradiction(
                three[0].paper,
                f"Table III, APF at {a} and at {b} px",
                f"Dice {', '.join(shared)} at {a} px",
                f"the same {len(shared)} values at {b} px",
                "independent trainings do not agree to two decimals in a row: one block looks copied",
            )


def _gains(three: Sequence[Cell]) -> Iterator[Contradiction]:
    """A stated gain follows from no printed row, or not from the finest uniform row."""
    for gain in table3_gains(three):
        where = f"Table III, {gain.resolution} px"
        stated = f"Dice improvement {gain.stated:.2f} %"
        if gain.recomputed is None:
            yield Contradiction(
                three[0].paper,
                where,
                stated,
                f"{gain.finest_gain:.2f} % over {gain.finest_base}",
                "no printed UNETR row gives the stated gain; its base may be a lost cell",
            )
        elif gain.base != gain.finest_base:
            yield Contradiction(
                three[0].paper,
                where,
                f"{stated}, which is over {gain.base}",
                f"{gain.finest_gain:.2f} % over {gain.finest_base}, the best printed UNETR row",
                "the gain is over a weaker baseline than at the other resolutions",
            )


def _same_cost(three: Sequence[Cell]) -> Iterator[Contradiction]:
    """The text credits the gains with a speedup; the rows that have the gains have hardly any from 8K up."""
    ratios = finest_time_ratios(three)
    large = {r: v for r, v in ratios.items() if v < 1.2}
    if large:
        shown = ", ".join(f"{v:.2f} at {r}" for r, v in large.items())
        yield Contradiction(
            three[0].paper,
            "Section IV-F2 and Table III",
            "Dice gains come with additional speedups",
            f"time of UNETR over time of the finest APF: {shown} px",
            "from 8192 px up the stated gains come at equal cost; speed and gain are in different rows",
        )


def finest_time_ratios(three: Sequence[Cell]) -> dict[int, float]:
    """Return, per resolution, the time per image of Table III's finest UNETR over that of its finest APF."""
    finest: dict[tuple[int, str], Cell] = {}
    for cell in three:
        if cell.quantity == "seconds_per_image" and cell.patch_px and cell.resolution:
            key = (cell.resolution, cell.model)
            if key not in finest or cell.patch_px < (finest[key].patch_px or 0):
                finest[key] = cell
    sizes = sorted({r for r, _ in finest})
    return {r: (finest[r, "UNETR"].value or 0) / (finest[r, "APF-UNETR"].value or 1) for r in sizes}


def _apf_text(cells: Cells) -> Iterator[Contradiction]:
    two, three, text = cells["apf_table2"], cells["apf_table3"], _rows(cells["apf_text"])
    stated, measured = text["64K, 2048 GPUs"]["speedup"], table2_speedups(two)[65536]
    if abs((stated.value or 0) - measured) > 0.5:
        yield Contradiction(
            stated.paper,
            "Section IV-F1 and Table II, 64K",
            f"{stated.text}x at 64K on 2,048 GPUs",
            f"{measured:.2f}x by seconds per image",
            "the text must mean time to convergence, whose column is lost",
        )
    claim, mean = text["geomean speedup"]["speedup_geomean"], table2_geomean(two)
    if abs((claim.value or 0) - mean) > 0.05:
        yield Contradiction(
            claim.paper,
            "abstract and Table II",
            f"geometric mean {claim.text}x",
            f"{mean:.2f}x by seconds per image",
            "the abstract counts time to the same Dice, whose column is lost; per image the speedup is smaller",
        )
    mean_gain, gains = text["Dice over widely used models"]["mean_gain"], [g.stated for g in table3_gains(three)]
    everything, larger = sum(gains) / len(gains), sum(gains[1:]) / len(gains[1:])
    if abs((mean_gain.value or 0) - everything) > 0.05:
        yield Contradiction(
            claim.paper,
            "Section I and Table III",
            f"Dice better by {mean_gain.text} % on average",
            f"the mean of all {len(gains)} stated gains is {everything:.2f} %, without 512 px {larger:.2f} %",
            "the average leaves out the smallest resolution, whose gain does not follow from the table",
        )


def _column_heads(two: Sequence[Cell], three: Sequence[Cell]) -> Iterator[Contradiction]:
    """One number is headed Sec/Image in Table II and Sec/Image/GPU in Table III."""
    head_two, head_three = _rows(two), _rows(three)
    many = [
        row
        for row, mine in head_two.items()
        if (other := head_three.get(row))
        and mine["gpus"].value == other["gpus"].value
        and (mine["gpus"].value or 0) > 1
        and _rounds_to(mine["seconds_per_image"], other["seconds_per_image"])
    ]
    if many:
        yield Contradiction(
            two[0].paper,
            f"Table II and Table III, {', '.join(many)}",
            "the column is headed Sec/Image",
            "the same numbers at the same GPU counts are headed Sec/Image/GPU",
            "with more than one GPU the two are different quantities; which one was measured is not said",
        )


def _hct(cells: Cells) -> Iterator[Contradiction]:
    """The appendix swaps the two largest gains."""
    table, text = _rows(cells["hct_tableA1"]), _rows(cells["hct_text"])
    best, base = table["HCT Performer-ReLU"], table["GMIC"]
    for name, quantity in (("architectural distortion", "auc_distortion"), ("focal asymmetry", "auc_asymmetry")):
        stated = text[name]["auc_gain"]
        found = (best[quantity].value or 0) - (base[quantity].value or 0)
        if abs(found - (stated.value or 0)) > 0.05:
            yield Contradiction(
                stated.paper,
                f"Appendix text and Table A1, {name}",
                f"+{stated.text} points of AUC over GMIC",
                f"{best[quantity].text} - {base[quantity].text} = {found:.1f}",
                "the two gains look swapped in the text",
            )


def _rivit(cells: Sequence[Cell]) -> Iterator[Contradiction]:
    """One model has two validation accuracies, and two pairs of times do not give the stated saving."""
    by_table: dict[str, dict[str, dict[str, Cell]]] = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        by_table[cell.table][cell.row][cell.quantity] = cell
    for row, there in by_table["5 resolutions"].items():
        a, b = by_table["5 positions"][row]["accuracy"], there["accuracy"]
        if a.text != b.text:
            yield Contradiction(
                a.paper,
                f"Section 5, {row}: positions and resolutions",
                f"validation accuracy {a.text} %",
                f"{b.text} % for the same model",
                "another run, or another epoch of the same run",
            )
    text = by_table["text 5"]
    stated = text["RIViT over ViT"]["time_saved"]
    for place in ("on a 3090", "on Colab"):
        fast, slow = (text[f"{model} {place}"]["seconds_per_epoch"] for model in ("RIViT", "ViT"))
        saved = 100 * (1 - (fast.value or 0) / (slow.value or 1))
        if abs(saved - (stated.value or 0)) > 0.05:
            yield Contradiction(
                stated.paper,
                f"Section 5, times {place}",
                f"{stated.text} % less time",
                f"{fast.text} s against {slow.text} s per epoch is {saved:.1f} % less",
                "the printed times are rounded, and on Colab the batch sizes differ too",
            )


def _shf(shf: Sequence[Cell], three: Sequence[Cell]) -> Iterator[Contradiction]:
    rows = _rows(shf)
    mine, base = rows["64K SHF"], rows["64K UNETR"]["dice"]
    gain = (mine["dice"].value or 0) - (base.value or 0)
    if abs(gain - (mine["stated_gain"].value or 0)) > 0.01:
        yield Contradiction(
            base.paper,
            "PAIP at 64K",
            f"Dice up by {mine['stated_gain'].text} points",
            f"{mine['dice'].text} - {base.text} = {gain:.2f}",
            "the stated gain does not follow from the printed scores",
        )
    for cell in three:
        if cell.model == "UNETR" and cell.quantity == "dice" and cell.resolution == base.resolution:
            if cell.text == base.text and cell.patch_px != base.patch_px:
                yield Contradiction(
                    f"{cell.paper} and {base.paper}",
                    "APF Table III and SHF on PAIP, UNETR at 64K",
                    f"Dice {cell.text} with patch {cell.patch_px}",
                    f"Dice {base.text} with patch {base.patch_px}",
                    "one score is given to two patch sizes",
                )
