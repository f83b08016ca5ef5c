"""Settings, experiments and the command line: what is accepted, and the one line for what is not."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
import yaml

from launch.__main__ import main
from launch.config.config import NOT_COMPARED, ConfigError, differing_keys, flatten, validate
from launch.experiments.load import FAMILIES, all_experiments, load
from launch.train.checks import check_world
from tests.helpers.repository import ROOT


@pytest.mark.parametrize("name", all_experiments())
def test_every_experiment_is_complete_named_and_described(name: str):
    config = load(name)
    assert config.experiment == name
    assert len(all_experiments()[name].text) > 30
    assert validate(yaml.safe_load(config.to_yaml())) == config
    assert validate(yaml.safe_load(config.to_yaml(comments=True))) == config
    assert "# None" not in config.to_yaml(comments=True), "a key without description"


def test_override_changes_one_key_and_its_type():
    base, changed = load("demo_apf"), load("demo_apf", ["train.lr=2e-4", "train.betas=[0.8,0.9]", "data.split=null"])
    assert (changed.train.lr, changed.train.betas, changed.data.split) == (2e-4, (0.8, 0.9), None)
    assert {d.split(":")[0] for d in differing_keys(base.model_dump(mode="json"), changed.model_dump(mode="json"))} >= {
        "train.lr",
        "data.split",
    }
    assert base.sha256() != changed.sha256()


def test_steps_is_short_for_max_steps_and_the_last_one_counts():
    assert load("paip_64k", ["train.max_steps=7", "train.steps=10"]).train.max_steps == 10


def test_the_hash_is_of_every_setting_that_is_computed():
    now = load("demo_apf")
    flat = flatten(now.model_dump(mode="json"))
    kept = {k: v for k, v in flat.items() if not any(k == n or k.startswith(n + ".") for n in NOT_COMPARED)}
    assert now.sha256() == hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    other = load("demo_apf", ["data.split_on=variance"])
    assert other.sha256() != now.sha256() != load("demo_apf", ["data.thresholds=[100,200]"]).sha256()
    assert differing_keys(now.model_dump(mode="json"), other.model_dump(mode="json")) == [
        "data.split_on: edges -> variance"
    ]
    assert other.run_name(1) == now.run_name(1)


def test_what_does_not_change_the_numbers_does_not_change_the_hash():
    words = ["run_root=x", "run_id=y", "checkpoint.every_steps=3", "engine.threads=2", "data.prefetch=0"]
    base, changed = load("demo_apf"), load("demo_apf", words)
    assert base.sha256() == changed.sha256()
    assert not differing_keys(base.model_dump(mode="json"), changed.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.lrr=1"], ["train.lrr", "did you mean train.lr?", "valid keys: train.lr, ", " more"]),
        (["lr=1"], ["did you mean train.lr?"]),
        (["train.lr"], ["key=value"]),
        (["train.lr=-1"], ["train.lr", "greater than 0", "-1"]),
        (["train.lr=fast"], ["train.lr", "fast"]),
        (["train.batch=2.5"], ["train.batch", "integer"]),
        (["engine.name=horovod"], ["engine.name", "'ddp', 'fsdp' or 'deepspeed'"]),
        (["model.name=unet"], ["unet", "unet_tiled", "unetr"]),
        (["model.width=192", "model.heads=5"], ["heads=5", "width=192"]),
        (["model.name=unet_tiled"], ["data.kind"]),
        (["train.max_seconds=null"], ["max_steps or max_seconds"]),
        (["data.split_on=colour"], ["data.split_on", "'edges', 'variance' or 'entropy'"]),
        (["data.patching=uniform", "data.resample=cubic"], ["resample=cubic is for patching=apf"]),
        (["data.fov=true", "data.labels=labels.csv"], ["fov=true is for segmentation with kind=tokens or tiles"]),
        (["data.patching=uniform", "data.split_on=entropy"], ["split_on=entropy is for patching=apf"]),
        (["data.thresholds=[100,200]", "data.split_on=entropy"], ["thresholds=100,200", "split_on=edges"]),
        (["data.thresholds=[200,100]"], ["0 <= low <= high", "[200, 100]"]),
        (["train.betas=[0.9,"], ["train.betas=[0.9,", "list"]),
        (["train.betas=[0.9,1.5]"], ["betas", "1.5"]),
        (["engine.name=deepspeed", "checkpoint.background=true"], ["checkpoint.background=false"]),
        (["log.sinks=paper"], ["log.sinks", "'tensorboard' or 'wandb'"]),
        (["train.lr=inf"], ["train.lr", "finite", "inf"]),
        (["train.max_seconds=inf"], ["train.max_seconds", "finite"]),
        (["train.batch=3", "train.accumulate=2"], ["batch=3", "accumulate=2"]),
        (["data.split=null", "data.fractions=[0.5,0.1,0.1]"], ["fractions", "sum to 1"]),
        (["data.variants=[a]", "data.patching=uniform"], ["variants=['a']", "patching=apf"]),
        (["data.variants=[a,./a/]"], ["variants=['a', './a/']", "twice"]),
        (["data.variants=a"], ["data.variants", "tuple"]),
    ],
)
def test_wrong_setting_is_one_line_and_64(words, parts, capsys):
    assert main(["show", "demo_apf", *words]) == 64
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_wrong_experiment_names_a_few_close_ones(capsys):
    assert main(["train", "demo_afp"]) == 64
    err = capsys.readouterr().err
    assert "did you mean demo_apf?" in err and "launch experiments" in err and err.count("\n") == 1
    assert main(["train", "paip_16k_p7"]) == 64
    err = capsys.readouterr().err
    named = [name for name in all_experiments() if re.search(rf"\b{name}\b", err)]
    assert {"paip_16k_p8", "paip_16k_p4"} < set(named) and len(named) == 5
    assert main(["show", "unetr"]) == 64
    assert capsys.readouterr().err.startswith("error: unetr is a model: give an experiment and model.name=unetr; ")


@pytest.mark.parametrize("words", [[], ["trian"], ["train"]])
def test_wrong_command_line_is_64(words, capsys):
    assert main(words) == 64
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("--help)\n")


def test_lists_shows_and_helps(capsys):
    assert main(["experiments"]) == 0
    *groups, _ = capsys.readouterr().out.splitlines()
    counts = {words[0].strip(): int(words[-1]) for line in groups if (words := line[:19].rsplit(maxsplit=1))}
    assert [*counts] == [family.replace("_", " ") for family in FAMILIES]
    assert sum(counts.values()) == len(all_experiments()) > len(groups)
    listed = []
    for group, count in counts.items():
        assert main(["experiments", *group.split()]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count
        listed += [line.split()[0] for line in lines]
    assert listed == [*all_experiments()]
    assert main(["experiments", "Table V)"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["classify_paip", "classify_paip_hipt"]
    assert main(["experiments", "kidneys"]) == 64
    assert "kidneys" in capsys.readouterr().err
    assert main(["show", "demo_apf", "train.lr=0.5"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["lr"] == 0.5
    assert main(["train", "--help"]) == 0
    assert "srun" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_ends_the_list_without_a_traceback():
    words = [sys.executable, "-m", "launch", "experiments"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_showing_imports_nothing_heavy():
    code = (
        "import sys; from launch.__main__ import main; main(['experiments']); main(['show', 'smoke']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'cv2', 'h5py', 'openslide', 'mpi4py')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_families_are_imported_until_the_name_is_found():
    code = (
        "import sys; from launch.__main__ import main; main(['show', 'smoke']); "
        "sys.exit('launch.experiments.demo' not in sys.modules or 'launch.experiments.paip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_run_name_tells_what_is_compared():
    name = load("demo_apf", ["train.seed=7"]).run_name(4)
    assert name == "unetr-leaf_unet_apf_R1024_p16_g4_s7"
    assert load("demo_apf", ["run_id=mine"]).run_dir(4).parts[-2:] == ("demo_apf", "mine")


def test_batch_that_does_not_fit_the_ranks_prints_the_arithmetic():
    check_world(load("demo_apf", ["train.batch=6", "train.accumulate=3"]), 2)
    with pytest.raises(ConfigError, match=r"train.batch=4 .*4 / \(3 ranks x 1 accumulate\) = 1.33333.*=3 or 6"):
        check_world(load("demo_apf", ["train.batch=4"]), 3)


def test_batch_norm_is_for_one_rank():
    config = load("demo_tiled_unet", ["model.norm=batch"])
    check_world(config, 1)
    with pytest.raises(ConfigError, match=r"model.norm=batch .*use instance or none"):
        check_world(config, 2)


def test_flatten_keeps_lists_whole():
    assert flatten({"a": {"b": [1, 2]}, "c": 3}) == {"a.b": [1, 2], "c": 3}
