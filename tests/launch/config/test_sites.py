"""Site files are facts with reasons, and wrong ones are told in one line."""

from pathlib import Path

import pytest
import yaml

from launch.config.config import ConfigError
from launch.config.sites import SITES, load_site, names, read_site

FILES = sorted(SITES.glob("*.yaml"))


def test_the_sites_there_are():
    assert names() == sorted(["frontier", "generic-cuda", "h200-box", "local", "lumi", "perlmutter"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_site_can_be_true(path: Path):
    site = read_site(path)
    for precision, rate in site.expected.gemm_tflops.items():
        assert rate <= site.hardware.peak_tflops[precision], "no gpu is faster than its peak"
    assert site.expected.memory_gb_s <= site.hardware.memory_gb_s
    assert site.expected.all_reduce_gb_s <= site.network.intra_node.gb_s
    assert site.network.inter_node.gb_s <= site.network.intra_node.gb_s
    if site.slurm is not None:
        assert site.slurm.hours(1) is not None and site.slurm.hours(10**6) is None
        needed = -(-2048 // site.hardware.gpus_per_node)
        assert site.slurm.hours(needed), "the largest job of the paper fits"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_setting_of_the_environment_has_its_reason(path: Path):
    """Variables, modules and directives are what nobody dares to delete later: each line says why it is there."""
    lines = path.read_text().splitlines()
    section = ""
    for line in lines:
        if line and not line.startswith((" ", "#")):
            section = line.partition(":")[0]
        if section in ("env", "env_multi_node", "task_env", "modules") and line.startswith(" "):
            assert "#" in line, line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"color": "red"}, "color"),
        ({"name": "there"}, "name is 'there'"),
        ({"network": {}}, "network.intra_node"),
        ({"expected": None}, "expected"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(change, said, tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((SITES / "local.yaml").read_text()) | {"name": "here"} | change))
    with pytest.raises(ConfigError) as error:
        load_site(str(path))
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_yaml(tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text("name: [")
    with pytest.raises(ConfigError, match=r"here\.yaml: cannot be read as YAML"):
        load_site(str(path))


def test_time_limits_must_ascend(tmp_path):
    tree = yaml.safe_load((SITES / "lumi.yaml").read_text()) | {"name": "here"}
    tree["slurm"]["time_limits"] = [{"nodes": 9, "hours": 1}, {"nodes": 2, "hours": 2}]
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="ascending"):
        load_site(str(tmp_path / "here.yaml"))


def test_an_unknown_site_names_the_valid_ones():
    with pytest.raises(ConfigError, match=r"unknown site 'lummi' \(did you mean lumi\?\); valid: frontier, "):
        load_site("lummi")
