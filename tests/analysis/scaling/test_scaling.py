"""The model of the step time: its arithmetic by hand, its own parameters recovered, its limits, its command."""

import dataclasses
import json
import math

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.commands.scaling import GPUS
from analysis.figures.scaling import measured_scaling, predicted_scaling, series_of
from analysis.papers.entries import table2
from analysis.papers.tables import MODELLED, SUITE, paper_table, table_cells
from analysis.scaling import model, prediction
from analysis.scaling.costs import cost_of, encoder_flops
from analysis.scaling.model import (
    FACTORS,
    Fit,
    Work,
    all_reduce,
    expected_largest,
    fit_records,
    ideal_terms,
    ring,
    terms,
)
from analysis.scaling.table3 import held_out_seconds, modelled_cells, published_rows
from analysis.scaling.work import Measured, cost_over, experiment_work, measured
from launch.config.sites import Link, load_site
from launch.experiments.load import load as load_experiment
from tests.helpers.repository import ROOT
from tests.helpers.run_folders import record, rows_in, runs_in, write_build_log

FRONTIER = load_site("frontier")
LINK = Link(latency_us=10, gb_s=50)


def work(gpus=8, images=1.0, tokens=4096, decoder=2e11, weights=90_000_000, shard=8, **more):
    return Work(gpus, images, encoder_flops(tokens, 768, 12), decoder, weights, shard=shard, **more)


def test_collectives_by_hand():
    """8 ranks, 1 GB: 7 steps of 125 MB at 50 GB/s and 10 us; an all-reduce moves it nearly twice."""
    assert ring(1e9, 8, LINK) == pytest.approx(7 * (10e-6 + 125e6 / 50e9))
    assert all_reduce(1e9, 8, LINK) == pytest.approx(2 * 3 * 10e-6 + 2 * 7 / 8 * 1e9 / 50e9)
    assert ring(1e9, 1, LINK) == all_reduce(1e9, 1, LINK) == 0


def test_ideal_terms_of_one_gpu_by_hand():
    site, one = FRONTIER, work(gpus=1, images=2, shard=1)
    ideal = ideal_terms(one, site)
    assert ideal["encoder"] == pytest.approx(3 * 2 * one.encoder / 191.5e12)
    assert ideal["decoder"] == pytest.approx(3 * 2 * 2e11 / 191.5e12)
    assert ideal["memory"] == pytest.approx(28 * 90e6 / 1638e9)
    assert ideal["parameters"] == ideal["gradients"] == 0 and ideal["fixed"] == 1
    again = ideal_terms(work(gpus=1, shard=1, recompute=True), site)
    assert again["encoder"] / ideal["encoder"] == pytest.approx(4 / 6)
    half = ideal_terms(work(gpus=1, shard=1, precision="fp32"), site)
    assert half["encoder"] / again["encoder"] == pytest.approx(191.5 / 47.9 * 3 / 4)


def test_ideal_terms_of_nodes_by_hand():
    site = FRONTIER
    node = ideal_terms(work(gpus=8), site)
    assert node["parameters"] == pytest.approx(2 * ring(2 * 90e6, 8, site.network.intra_node))
    assert node["gradients"] == pytest.approx(ring(4 * 90e6, 8, site.network.intra_node))
    two = ideal_terms(work(gpus=16), site)
    share = 4 * 90e6 / 8
    assert two["gradients"] - node["gradients"] == pytest.approx(all_reduce(share, 2, site.network.inter_node))


def test_largest_of_many_lengths_is_exact():
    values = (0.5, 1.0, 1.5)
    assert expected_largest(values, 1) == pytest.approx(1.0)
    pairs = [max(a, b) for a in values for b in values]
    assert expected_largest(values, 2) == pytest.approx(np.mean(pairs))
    assert expected_largest(values, 10_000) == pytest.approx(1.5)
    assert expected_largest((), 5) == 1.0


def test_reading_costs_only_what_the_arithmetic_does_not_hide():
    fit = model.assumed_fit(FRONTIER)
    quick = terms(work(gpus=1, shard=1, image_bytes=1.0), FRONTIER, fit)
    assert quick["data"] == 0
    slow = terms(work(gpus=1, shard=1, image_bytes=4e9, read_mb_s=1000), FRONTIER, fit)
    assert slow["data"] == pytest.approx(4 - slow["encoder"] - slow["decoder"])
    uneven = terms(work(gpus=64, spread=(0.5, 1.5)), FRONTIER, fit)
    assert uneven["imbalance"] == pytest.approx(0.5 * (uneven["encoder"] + uneven["decoder"]), rel=1e-6)
    saved = terms(work(gpus=8, save_every_s=100), FRONTIER, fit)
    writing = 12 * 90e6 / 200e6
    others = sum(v for k, v in saved.items() if k != "checkpoint")
    assert saved["checkpoint"] == pytest.approx(others * writing / 100)


def various(rng, n=40):
    """Steps that tell all terms apart: other sizes, batches, widths, GPUs."""
    return [
        Work(
            int(rng.choice([1, 2, 4, 8, 16, 64, 256])),
            float(rng.integers(1, 5)),
            encoder_flops(int(rng.choice([256, 1024, 4096, 16384])), 768, 12),
            float(rng.choice([1e9, 5e10, 2e12])),
            int(rng.choice([2e6, 9e7, 6e8])),
            shard=int(rng.choice([1, 8])),
        )
        for _ in range(n)
    ]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(1.0, 8.0), min_size=5, max_size=5), st.floats(0.0, 0.1))
def test_it_recovers_its_own_factors(seed, values, fixed):
    rng = np.random.default_rng(seed)
    truth = Fit(dict(zip(FACTORS, [*values, fixed], strict=True)))
    works = various(rng)
    times = [sum(terms(w, FRONTIER, truth).values()) for w in works]
    fit = fit_records(works, times, FRONTIER, draws=2)
    for name in FACTORS:
        if name not in fit.assumed:
            assert fit.factors[name] == pytest.approx(truth.factors[name], rel=1e-3, abs=1e-4), name
    assert {"encoder", "decoder", "fixed"}.isdisjoint(fit.assumed) and fit.error < 1e-4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(1.0, 8.0), min_size=5, max_size=5), st.floats(0.0, 0.1))
def test_it_recovers_its_own_factors_behind_reading_saving_and_uneven_lengths(seed, values, fixed):
    """Some steps wait for their data, some GPUs for others, and checkpoints stretch everything."""
    rng = np.random.default_rng(seed)
    truth = Fit(dict(zip(FACTORS, [*values, fixed], strict=True)))
    works = [
        dataclasses.replace(
            one,
            spread=tuple(rng.uniform(0.2, 1.8, 20)) if rng.random() < 0.5 else (),
            image_bytes=float(rng.choice([0, 1e6, 3e9])),
            save_every_s=600.0,
        )
        for one in various(rng, 60)
    ]
    parts = [terms(w, FRONTIER, truth) for w in works]
    times = [sum(p.values()) for p in parts]
    assert any(p["data"] > 0 for p in parts) and any(p["imbalance"] > 0 for p in parts)
    fit = fit_records(works, times, FRONTIER, draws=2)
    assert fit.error < 1e-4
    for name in ("encoder", "decoder", "fixed"):
        assert fit.factors[name] == pytest.approx(truth.factors[name], rel=2e-3, abs=1e-3), name


def test_with_noise_the_interval_holds_the_truth_about_as_often_as_it_says():
    truth = Fit(dict(zip(FACTORS, [2.5, 4.0, 2.0, 3.0, 2.0, 0.03], strict=True)))
    inside, asked = 0, 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        works = various(rng, 60)
        times = [sum(terms(w, FRONTIER, truth).values()) * math.exp(rng.normal(0, 0.05)) for w in works]
        fit = fit_records(works, times, FRONTIER, draws=60)
        for name in ("encoder", "decoder", "fixed"):
            asked += 1
            inside += fit.low[name] <= truth.factors[name] <= fit.high[name]
    assert inside >= 0.75 * asked


def test_held_out_numbers_of_gpus_are_predicted_from_the_others(tmp_path):
    """Times of the model itself: what is left out comes back; and a column of the table says by how much not."""
    runs_at(tmp_path, [1])
    run = runs_in(tmp_path)[0]
    truth = Fit(dict(zip(FACTORS, [2.0, 3.0, 2.0, 2.5, 1.5, 0.02], strict=True)))
    rng = np.random.default_rng(1)
    found = []
    for one in various(rng, 60):
        seconds = sum(terms(one, FRONTIER, truth).values())
        found.append(Measured(run._replace(gpus=one.gpus), one, seconds))
    table = prediction.held_out_table(found, FRONTIER)
    errors = [float(row[-1].rstrip("%")) for row in table.rows]
    assert len(errors) == 60 and max(map(abs, errors)) <= 5
    slower = [dataclasses.replace(m, seconds=m.seconds * (2 if m.run.gpus == 256 else 1)) for m in found]
    table = prediction.held_out_table(slower, FRONTIER)
    of_256 = [float(row[-1].rstrip("%")) for row in table.rows if row[1] == "256"]
    assert of_256 and all(abs(error + 50) <= 5 for error in of_256)
    assert prediction.held_out_table([m for m in found if m.run.gpus == 1], FRONTIER) is None


def test_what_records_do_not_tell_stays_assumed():
    works = [work(gpus=1, shard=1, tokens=n) for n in (256, 1024, 4096)]
    truth = model.assumed_fit(FRONTIER)
    fit = fit_records(works, [sum(terms(w, FRONTIER, truth).values()) for w in works], FRONTIER, draws=2)
    assert {"parameters", "gradients"} <= set(fit.assumed)
    assert fit_records([], [], FRONTIER).assumed == tuple(FACTORS)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 8, 64, 2048]), st.floats(0.5, 8), st.sampled_from(["weak", "strong"]))
def test_a_step_on_the_same_gpus_is_itself(gpus, images, mode):
    one = work(gpus=gpus, images=images, shard=1)
    assert model.at(one, gpus, mode, base=gpus) == one


def test_predictions_are_consistent():
    configs = [load_experiment(n) for n in ("paip_64k_p32", "paip_64k_uniform")]
    fits = {"frontier": model.assumed_fit(FRONTIER)}
    for mode in ("weak", "strong"):
        found = prediction.predict(configs, [FRONTIER], fits, [1, 8, 2048], mode, 1.0)
        for p in found:
            images = p.gpus if mode == "weak" else 1
            assert p.step_s == pytest.approx(sum(p.parts.values()))
            assert p.seconds_per_image == pytest.approx(p.step_s / images)
            assert p.node_hours == pytest.approx(p.seconds_per_image * 1000 * p.nodes / 3600)
            assert p.parts[p.binds] == max(p.parts.values())
            assert p.nodes == math.ceil(p.gpus / 8)
        alone = [p for p in found if p.gpus == 1]
        assert all(p.efficiency == pytest.approx(1) for p in alone)
    apf, uniform = (cost_of(c) for c in configs)
    assert uniform.encoder > 10 * apf.encoder


def test_published_rows_are_all_there_and_errors_are_as_large_as_they_are():
    rows, factors = published_rows()
    assert len(rows) == 38 and {r.resolution for r in rows} == {512, 1024, 4096, 8192, 16384, 32768, 65536}
    errors = [r.fitted / r.seconds - 1 for r in rows]
    rms = math.sqrt(np.mean(np.square(errors)))
    held = math.sqrt(np.mean([(r.held_out / r.seconds - 1) ** 2 for r in rows]))
    assert (f"{rms:.0%}", f"{held:.0%}") == ("38%", "54%")
    for page in (ROOT / "README.md", ROOT / "analysis" / "README.md"):
        text = " ".join(page.read_text().split())
        assert "38 %" in text and "54 %" in text, f"{page} states these errors"
    assert factors["per_gpu_s"] > 0.005


@pytest.mark.parametrize(("name", "rows"), [("apf2", 14), ("apf3", 38), ("hct", 0)])
def test_modelled_rows_of_the_papers_tables(name, rows):
    """Each published setting has one modelled time, that of a fit without its resolution, and no modelled Dice."""
    cells, said = modelled_cells(name)
    times = {c.row: c.value for c in cells if c.quantity == "seconds_per_image"}
    assert len(times) == rows == len({c.row for c in cells})
    assert {c.quantity for c in cells} <= {"gpus", "tokens", "depth", "seconds_per_image"}
    assert all((c.paper, c.status) == (SUITE, MODELLED) for c in cells)
    if name == "apf3":
        held = {f"{p.row}, model": p.held_out for p in published_rows()[0]}
        assert times == pytest.approx(held)
        assert "54%" in said[0]
    table = paper_table(name, [*table_cells(name), *cells])
    kinds = [row[2] for row in table.rows]
    assert kinds.count("modelled") == rows and ("modelled" in table.caption) == bool(rows)


def test_the_published_time_of_a_row_does_not_enter_its_prediction():
    cells = [dataclasses.replace(c, text="99") if c.quantity == "seconds_per_image" else c for c in table2()]
    assert held_out_seconds(cells) == pytest.approx(held_out_seconds(table2()))


def runs_at(root, counts, scale=1.0):
    """Records of `smoke`-like runs on several numbers of GPUs with a perfect, then a fading speedup."""
    for n in counts:
        for seed in (0, 1):
            folder = root / "demo_apf" / f"g{n}_s{seed}"
            folder.mkdir(parents=True)
            seconds = scale * (0.2 / n + 0.01) * (1 + 0.02 * seed)
            raw = record(
                "demo_apf",
                seed=seed,
                gpus=n,
                nodes=1,
                global_batch=8,
                seconds_per_image=seconds,
                images_per_s=1 / seconds,
                timed_steps=50,
                run_id=f"g{n}_s{seed}",
            )
            (folder / "record.json").write_text(json.dumps(raw))
            config = load_experiment("demo_apf", ["train.batch=8", f"train.seed={seed}"])
            (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def test_measured_speedups_by_hand(tmp_path):
    runs_at(tmp_path, [1, 2, 4])
    groups = rows_in(tmp_path)
    series = [s for s in series_of(groups) if s.kind == "strong"]
    assert len(series) == 1 and series[0].gpus == (1, 2, 4)
    np.testing.assert_allclose(series[0].speedup, [1, 0.21 / 0.11, 0.21 / 0.06])
    np.testing.assert_allclose(series[0].efficiency, np.array([1, 0.21 / 0.11 / 2, 0.21 / 0.06 / 4]))
    assert [len(x) for x in series[0].seconds] == [2, 2, 2]
    drawing = measured_scaling(groups)
    assert "88 % at 4 GPUs" in drawing.alt
    assert measured_scaling(groups[:1]) is None


def test_cost_of_uneven_slides_is_the_mean_of_their_costs():
    config = load_experiment("demo_apf", ["model.attention=packed"])
    found, spread = cost_over(config, [64, 64, 256])
    one, two = cost_of(config, 64), cost_of(config, 256)
    assert found.flops == pytest.approx((2 * one.flops + two.flops) / 3)
    assert found.flops > cost_of(config, 128).flops, "attention grows with the square of the length"
    assert spread == pytest.approx((one.flops / found.flops,) * 2 + (two.flops / found.flops,))
    assert cost_over(config, [256, 256])[1] == ()
    assert cost_over(config, [64, 256], together=2)[0] == cost_over(config, [64, 256])[0], "packed"
    padded = cost_over(load_experiment("demo_apf"), [64, 256], together=2)[0]
    assert padded.encoder == pytest.approx((one.encoder + 3 * two.encoder) / 4), "of four pairs one is short"
    assert cost_over(load_experiment("hiri_vit"), [5]) is None


def test_real_lengths_reach_the_imbalance(tmp_path, capsys):
    """Lengths scaled so that the longest fills L; uniform experiments have one length and no imbalance."""
    config = load_experiment("demo_apf")
    work = experiment_work(config, 8, 1.0, FRONTIER, [50, 100])
    assert work.spread and np.mean(work.spread) == pytest.approx(1)
    longest = cost_of(load_experiment("demo_apf", ["model.attention=packed"]), 256)
    assert max(work.spread) * (work.encoder + work.decoder) == pytest.approx(longest.flops)
    assert experiment_work(load_experiment("demo_uniform_patch"), 8, 1.0, FRONTIER, [50, 100]).spread == ()
    write_build_log(tmp_path / "tokens", [50, 100, 75])
    words = ["scaling", "--experiments", "demo_apf,demo_uniform_patch", "--gpus", "1,64", "--json"]
    assert main([*words, "--lengths", str(tmp_path / "tokens")]) == 0
    told = json.loads(capsys.readouterr().out)["predictions"]
    uneven = {(p["experiment"], p["gpus"]): p["parts"]["imbalance"] for p in told}
    assert uneven["demo_apf", 64] > uneven["demo_apf", 1] == 0 == uneven["demo_uniform_patch", 64]
    assert main([*words, "--lengths", str(tmp_path)]) == 64
    assert "no build_log.jsonl" in capsys.readouterr().err


def test_one_fit_is_of_one_machine(tmp_path):
    runs_at(tmp_path, [1, 2])
    path = tmp_path / "demo_apf" / "g2_s1" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device_name": "another"}))
    assert measured(runs_in(tmp_path), FRONTIER)[1][0].endswith("no hardware of site frontier (--runs-site)")
    usable, left = measured(runs_in(tmp_path), load_site("local"))
    assert len(usable) == 3 and {m.run.device_name for m in usable} == {"AMD EPYC 7B13"}
    assert len(left) == 1 and "ran on another, most records on AMD EPYC 7B13" in left[0]


def test_records_know_the_lengths_of_their_slides(tmp_path):
    runs_at(tmp_path / "runs", [2])
    write_build_log(tmp_path / "tokens", [64, 256])
    for path in (tmp_path / "runs").rglob("record.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": str(tmp_path / "tokens")}))
    (one, _), _ = measured(runs_in(tmp_path / "runs"), load_site("local"))
    few, many = (cost_of(load_experiment("demo_apf"), n) for n in (64, 256))
    assert one.work.decoder == pytest.approx((few.decoder + many.decoder) / 2), "leaves are computed one by one"
    assert one.work.spread[1] > one.work.spread[0]


@pytest.mark.parametrize("site", ["frontier", "lumi", "perlmutter", "h200-box"])
def test_every_site_of_the_question_has_an_answer(site):
    configs = [load_experiment(n) for n in ("paip_64k_p32", "paip_64k_uniform")]
    place = load_site(site)
    fits = {site: model.assumed_fit(place)}
    found = prediction.predict(configs, [place], fits, GPUS, "weak", 1.0)
    assert [p.gpus for p in found[: len(found) // 2]] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    for p in found:
        assert p.seconds_per_image > 0 and p.node_hours > 0 and 0 < p.efficiency <= 1.0001 and p.binds in p.parts
    apf, uniform = found[: len(found) // 2], found[len(found) // 2 :]
    assert all(a.step_s < u.step_s for a, u in zip(apf, uniform, strict=True))


def test_half_a_node_more_is_a_node_more():
    """12 GPUs of 8 a node are two nodes: gradients cross the network, two nodes write."""
    one, more = (ideal_terms(work(gpus=n, shard=1), FRONTIER)["gradients"] for n in (8, 12))
    assert more - one > 0.5 * all_reduce(4 * 90e6 / 8, 2, FRONTIER.network.inter_node)
    fit = model.assumed_fit(FRONTIER)
    parts = terms(work(gpus=12, save_every_s=100), FRONTIER, fit)
    others = sum(v for k, v in parts.items() if k != "checkpoint")
    assert parts["checkpoint"] == pytest.approx(others * 12 * 90e6 / (2 * 200e6) / 100)


def test_command_without_records_tells_what_is_modelled(capsys):
    assert main(["scaling", "--gpus", "1,2048", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {p["kind"] for p in told["predictions"]} == {"modelled"}
    assert {p["gpus"] for p in told["predictions"]} == {1, 2048}


def test_command_with_records_writes_what_was_fitted_and_held_out(tmp_path, capsys):
    runs_at(tmp_path / "runs", [1, 2, 4])
    out = tmp_path / "out"
    words = ["--site", "local,frontier", "--gpus", "1,8", "--out", str(out)]
    assert main(["scaling", str(tmp_path / "runs"), *words]) == 0
    shown = capsys.readouterr().out
    assert "Held out" in shown and "Modelled, not measured" in shown and "Published times" in shown
    assert {p.name for p in out.glob("*.md")} == {
        "scaling_held_out.md",
        "scaling_published.md",
        "scaling_weak.md",
        "scaling_fit_local.md",
        "scaling_fit_frontier.md",
    }
    assert (out / "scaling_weak.png").stat().st_size > 10_000
    assert "assumed" in (out / "scaling_fit_frontier.md").read_text()
    assert "fitted" in (out / "scaling_fit_local.md").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpus", "1,x"], "--gpus='1,x'"),
        (["--site", "summit"], "summit"),
        (["--experiments", "hiri_vit"], "hiri_vit"),
        (["--images", "0"], "--images must be positive"),
        (["--read-mb-s", "-1"], "--read-mb-s must be positive"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_one_line(words, reason, capsys):
    assert main(["scaling", *words]) == 64
    told = capsys.readouterr().err.strip()
    assert reason in told and len(told.splitlines()) == 1


def test_drawing_says_modelled():
    fits = {"frontier": model.assumed_fit(FRONTIER)}
    found = prediction.predict([load_experiment("paip_64k")], [FRONTIER], fits, [1, 8], "weak", 1.0)
    drawing = predicted_scaling(found, "weak")
    assert drawing.caption.startswith("Modelled, not measured") and "paip_64k" in drawing.alt
