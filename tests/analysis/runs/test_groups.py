from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.comparison.speedups import BaselineError, differences, speedups
from analysis.comparison.table import Comparison, dice_interval
from analysis.runs.groups import group_runs
from analysis.runs.records import Row, frame_of, load, rows_of
from analysis.runs.run_files import RunFiles
from tests.helpers.run_folders import record, rows_in, write_run


def load_all(root: Path, *raws: dict) -> list[Row]:
    for i, raw in enumerate(raws):
        write_run(root, raw, folder=f"r{i}")
    return rows_in(root)


def with_speedups(root: Path, baseline: str | None = None) -> dict[str, Row]:
    """The rows of the runs under a folder, each with its speedup, by label."""
    rows = group_runs(load(root).ok)
    return Comparison(rows.join(speedups(rows, baseline)), [], [], root).by_label


def test_seeds_are_one_row_with_means(tmp_path: Path):
    slides = [{"a": 0.1, "b": 0.5}, {"a": 0.3, "b": 0.7}]
    raws = [
        record(seed=s, dice=sum(d.values()) / 2, dice_per_slide=d, seconds_per_image=1.0 + s)
        for s, d in enumerate(slides)
    ]
    (group,) = load_all(tmp_path, *raws)
    assert len(group.runs) == 2
    assert group.label == "demo_apf"
    assert group.dice == pytest.approx(0.4)
    assert group.seconds_per_image == pytest.approx(1.5)
    assert group.dice_per_slide == pytest.approx({"a": 0.2, "b": 0.6})
    assert dice_interval(group) == pytest.approx((0.2, 0.6))


def test_other_settings_are_other_rows_with_names_that_tell_them_apart(tmp_path: Path):
    first = write_run(tmp_path, record(seed=0))
    write_run(tmp_path, record(seed=1, run_id="other"))
    (first / "config.yaml").write_text("train: {lr: 0.5, seed: 0}\n")
    groups = rows_in(tmp_path)
    assert sorted(g.label for g in groups) == ["demo_apf/other", f"demo_apf/{record()['run_id']}"]


def test_the_settings_keep_seeds_together_and_other_values_apart(tmp_path: Path):
    for seed in range(2):
        folder = write_run(tmp_path, record(seed=seed, run_id=f"s{seed}"))
        (folder / "config.yaml").write_text(f"data: {{dir: x, split_on: edges}}\ntrain: {{seed: {seed}}}\n")
    (group,) = rows_in(tmp_path)
    assert len(group.runs) == 2
    (folder / "config.yaml").write_text("data: {dir: x, split_on: variance}\n")
    assert len(rows_in(tmp_path)) == 2


def test_one_run_on_two_machines_is_two_rows_with_names_of_their_own(tmp_path: Path):
    groups = load_all(tmp_path, record(), record(device_name="NVIDIA H200"))
    assert [g.label.removeprefix(f"demo_apf/{record()['run_id']} ") for g in groups] == [
        "on AMD EPYC 7B13",
        "on NVIDIA H200",
    ]


def test_rows_that_nothing_else_tells_apart_are_named_by_their_folders(tmp_path: Path):
    groups = load_all(tmp_path, record(), record(nodes=2))
    assert sorted(g.label.rsplit("/", 1)[1] for g in groups) == ["r0", "r1"]


def test_the_interval_is_left_out_where_slides_and_mean_disagree(tmp_path: Path):
    (group,) = load_all(tmp_path, record(dice=0.9, dice_per_slide={"a": 0.1, "b": 0.2}))
    assert dice_interval(group) is None


def test_speedup_by_hand(tmp_path: Path):
    load_all(
        tmp_path,
        record("demo_apf", seconds_per_image=0.5),
        record("demo_uniform_patch", seconds_per_image=4.0),
        record("demo_uniform_tokens", seconds_per_image=1.0),
    )
    rows = with_speedups(tmp_path)
    assert rows["demo_apf"].ratio == 8.0
    assert rows["demo_apf"].baseline == "demo_uniform_patch", "the smallest uniform patch is what APF replaces"
    assert rows["demo_uniform_tokens"].ratio == 4.0
    assert with_speedups(tmp_path, "demo_uniform_tokens")["demo_apf"].ratio == 2.0


@given(st.floats(1e-6, 1e6))
def test_a_run_against_itself_is_one(seconds):
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        load_all(Path(root), record("demo_uniform_patch", seconds_per_image=seconds, device_name=None, device=None))
        (found,) = with_speedups(Path(root)).values()
    assert found.ratio == 1.0
    assert found.refused == ()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"device_name": "NVIDIA H200"}, "hardware"),
        ({"gpus": 4}, "GPUs 2 against 4"),
        ({"nodes": 2}, "nodes 1 against 2"),
        ({"precision": "bf16"}, "precision fp32 against bf16"),
        ({"attention_backend": "sdpa (flash)"}, "attention backend"),
        ({"optimiser": "SGD"}, "optimiser AdamW against SGD"),
        ({"split_sha256": "ffff"}, "data split"),
        ({"warmup_rule": "none"}, "timing window"),
        ({"precision": None}, "precision not recorded"),
        ({"dice_per_slide": {"x": 0.1, "y": 0.1}}, "other test slides"),
    ],
)
def test_unlike_runs_are_not_divided(tmp_path: Path, changes, word):
    load_all(tmp_path, record("demo_apf"), record("demo_uniform_patch", **changes))
    found = with_speedups(tmp_path)["demo_apf"]
    assert found.ratio is None
    assert any(word in reason for reason in found.refused), found.refused
    assert found.baseline == "demo_uniform_patch"


def test_a_fair_baseline_goes_before_a_finer_unfair_one(tmp_path: Path):
    load_all(
        tmp_path,
        record("demo_apf", seconds_per_image=0.5),
        record("demo_uniform_patch", gpus=64),
        record("demo_uniform_tokens", seconds_per_image=1.0),
    )
    found = with_speedups(tmp_path)["demo_apf"]
    assert (found.ratio, found.baseline) == (2.0, "demo_uniform_tokens")


def test_another_resolution_is_no_baseline(tmp_path: Path):
    load_all(tmp_path, record("demo_apf"), record("demo_uniform_patch", resolution=2048))
    found = with_speedups(tmp_path)["demo_apf"]
    assert (found.ratio, found.refused) == (None, ("no timed uniform baseline",))


def test_a_model_without_attention_may_be_compared_and_the_difference_is_said(tmp_path: Path):
    load_all(tmp_path, record("demo_uniform_patch"), record("demo_apf"))
    tiled = write_run(tmp_path, record("demo_tiled_unet", global_batch=4))
    assert tiled.exists()
    found = with_speedups(tmp_path)["demo_tiled_unet"]
    assert found.ratio == pytest.approx(0.94 / 0.112)
    assert "global batch 4 against 2" in found.remarks
    assert "model unet_tiled against unetr" in found.remarks


def test_the_tiled_rival_is_never_the_uniform_baseline(tmp_path: Path):
    write_run(tmp_path, record("demo_tiled_unet"))
    write_run(tmp_path, record("demo_apf"))
    assert with_speedups(tmp_path)["demo_apf"].baseline is None


def test_crops_are_no_uniform_patches(tmp_path: Path):
    crops = {"model": "transunet", "patch": 256, "samples_per_image": 65_536.0, "seconds_per_image": 9.0}
    load_all(
        tmp_path,
        record("demo_apf", seconds_per_image=1.0),
        record("demo_uniform_patch", experiment="crops", run_id="c", **crops),
        record("demo_uniform_patch", experiment="whole", run_id="w", patch=512, seconds_per_image=3.0),
    )
    found = with_speedups(tmp_path)["demo_apf"]
    assert (found.ratio, found.baseline) == (3.0, "whole")


def test_the_same_model_goes_before_a_finer_other_one(tmp_path: Path):
    load_all(
        tmp_path,
        record("demo_apf", seconds_per_image=1.0),
        record("demo_uniform_patch", experiment="other", run_id="o", model="vit", patch=8, seconds_per_image=9.0),
        record("demo_uniform_patch", seconds_per_image=2.0),
    )
    assert with_speedups(tmp_path)["demo_apf"].baseline == "demo_uniform_patch"


def test_another_task_is_not_compared(tmp_path: Path):
    load_all(tmp_path, record("demo_apf"), record("demo_uniform_patch", task="classification"))
    found = with_speedups(tmp_path)["demo_apf"]
    assert "task segmentation against classification" in found.refused


def test_an_unknown_baseline_lists_the_known(tmp_path: Path):
    load_all(tmp_path, record("demo_apf"))
    with pytest.raises(BaselineError, match="demo_apf"):
        with_speedups(tmp_path, "nothing")


def test_missing_time_gives_no_speedup(tmp_path: Path):
    load_all(tmp_path, record("demo_apf", seconds_per_image=None), record("demo_uniform_patch"))
    assert with_speedups(tmp_path)["demo_apf"].refused == ("s/image of this row is missing",)


def test_differences_are_symmetric_in_their_number(tmp_path: Path):
    groups = load_all(tmp_path, record("demo_apf", gpus=1), record("demo_uniform_patch", precision="bf16"))
    a, b = groups
    assert len(differences(a, b)) == len(differences(b, a)) == 2


KINDS = st.fixed_dictionaries(
    {
        "patching": st.sampled_from(["apf", "uniform"]),
        "patch": st.sampled_from([16, 64]),
        "decoder": st.sampled_from(["leaf", "token"]),
        "gpus": st.sampled_from([1, 2, None]),
        "attention_backend": st.sampled_from(["math", "flash", None]),
        "model": st.sampled_from(["unetr", "transunet", "unet_tiled"]),
        "samples_per_image": st.sampled_from([1.0, 16.0]),
        "resolution": st.sampled_from([512, 1024]),
        "seconds_per_image": st.sampled_from([0.5, 1.0, None]),
    }
)


@given(st.lists(KINDS, min_size=1, max_size=8))
def test_the_sorted_baselines_find_what_a_search_over_all_rows_finds(kinds):
    runs = []
    for i, kind in enumerate(kinds):
        folder = Path(f"r{i}")
        raw = record(**kind, experiment=f"e{i}", run_id=f"r{i}")
        runs.append(raw | {"folder": folder, "files": RunFiles(folder)})
    frame = group_runs(frame_of(runs))
    rows = rows_of(frame.join(speedups(frame)))
    for mine in rows:
        search = [
            row
            for row in rows
            if row.patching == "uniform"
            and row.model != "unet_tiled"
            and row.seconds_per_image
            and row.samples_per_image == 1
            and row.resolution == mine.resolution
        ]
        search.sort(
            key=lambda row: (
                row is not mine and bool(differences(mine, row)),
                row.model != mine.model,
                row.patch,
                row.decoder != mine.decoder,
                row.label,
            )
        )
        assert mine.baseline == (search[0].label if search and mine.seconds_per_image else None)
