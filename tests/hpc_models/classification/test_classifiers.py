"""One contract for every registered classifier; models of tokens and of pictures alike."""

import pytest
import torch
import torch.nn.functional as F

from hpc_models.registry import build, names, settings_class
from tests.helpers.trees import random_batch

# name: (registered name, small settings, shape of the picture (C, H, W), or None for tokens)
PIXELS = {"classes": 3, "image_hw": (32, 48), "patch_px": 8, "width": 32, "depth": 2, "heads": 4}
SLIDES = {"classes": 3, "size_px": 64, "patch": 8, "length": 25, "width": 32, "depth": 2, "heads": 4}
REGIONS = {
    "classes": 3,
    "scales": (4, 16, 64),
    "widths": (24, 16),
    "depths": (2, 2, 1),
    "heads": (3, 2, 2),
    "table_side": 3,
    "dropout": 0.0,
}
MODELS = {
    "vit": ("vit", PIXELS, (3, 32, 48)),
    "vit-mean-other-size": ("vit", {**PIXELS, "pool": "mean", "position": "both"}, (3, 48, 32)),
    "apf_vit": ("apf_vit", SLIDES, None),
    "apf_vit-cls": ("apf_vit", {**SLIDES, "pool": "cls", "position": "both"}, None),
    "apf_vit-packed": ("apf_vit", {**SLIDES, "attention": "packed"}, None),
    "hipt": ("hipt", REGIONS, (3, 64, 128)),
    "hct": ("hct", {"classes": 3, "dropout": 0.0}, (1, 160, 96)),
    "hct-dropout": ("hct", {"classes": 3, "conv_stages": 4}, (1, 96, 160)),
    "hct-softmax": ("hct", {"classes": 3, "attention": "performer_softmax", "dropout": 0.0}, (1, 160, 96)),
    "hct-nystrom": (
        "hct",
        {"classes": 3, "in_channels": 3, "attention": "nystrom", "conv_stages": 2, "dropout": 0.0},
        (3, 96, 96),
    ),
    "gmic": ("gmic", {"classes": 3}, (1, 160, 96)),
    "gmic-fine": ("gmic", {"classes": 3, "strides": (1, 2, 2, 2, 2)}, (1, 96, 96)),
    "def-gmic": ("def_gmic", {"classes": 3}, (1, 160, 96)),
    "hiri-s": ("hiri_vit", {"classes": 3}, (3, 64, 96)),
    "hiri-row1": ("hiri_vit", {"classes": 3, "variant": "row1"}, (3, 64, 64)),
    "hiri-row9": ("hiri_vit", {"classes": 3, "variant": "row9"}, (3, 64, 64)),
    "pvt": ("hiri_body", {"classes": 3}, (3, 64, 96)),
    "davit-five": ("hiri_body", {"classes": 3, "body": "davit_tiny", "five_stages": True}, (3, 128, 64)),
    "hrnet": ("hiri_body", {"classes": 3, "body": "hrnet_w18"}, (3, 64, 64)),
    "rivit": ("rivit", {"classes": 3, "depth": 2, "grid_px": 32}, (3, 48, 40)),
    "rivit-relative": ("rivit", {"classes": 3, "depth": 2, "grid_px": 32, "position": "relative"}, (3, 48, 48)),
    "rivit-plain": ("rivit", {"classes": 3, "depth": 2, "conv": False, "position": "sinusoidal"}, (3, 32, 48)),
    "rivit-stock": ("rivit", {"classes": 3, "depth": 2, "conv": False}, (3, 32, 48)),
}
# Large networks that have a sibling below; by default the sibling speaks for them.
LARGE = ("davit-five", "hiri-row9", "hrnet")
ALL = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in MODELS])
COMPILED = ("vit", "apf_vit", "hipt", "hct", "gmic", "def-gmic", "hiri-s", "pvt", "rivit")
# A bias in front of a batch norm has no effect, hence no gradient to speak of.
FLAT: dict[str, tuple[str, ...]] = dict.fromkeys([name for name in MODELS if "hct" in name], ("attn.out_proj.bias",))


def make(name, **more):
    torch.manual_seed(0)
    kind, config, _ = MODELS[name]
    return build(kind, **{**config, **more})


def batch_of(name, images=4):
    """Pictures of a batch, smooth enough that 16-bit rounding does not decide everything."""
    if MODELS[name][2] is None:
        batches = [random_batch(seed, 64, 8, length=25, images=1, classes=1, split=0.35)[0] for seed in range(images)]
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    c, h, w = MODELS[name][2]
    coarse = torch.rand(images, c, max(2, h // 8), max(2, w // 8), generator=torch.Generator().manual_seed(1))
    return {"image": F.interpolate(coarse, size=(h, w), mode="bilinear")}


LABELS = torch.tensor([0, 1, 2, 1])


def loss_of(model, batch):
    return F.cross_entropy(model(batch), LABELS)


def test_the_cases_cover_every_registered_classifier():
    known = {n for n in names() if settings_class(n).task == "classification"}
    assert {kind for kind, _, _ in MODELS.values()} == known == {MODELS[name][0] for name in COMPILED}
    assert {kind for name, (kind, _, _) in MODELS.items() if name not in LARGE} == known


@ALL
def test_logits_per_class_finite_and_the_same_for_a_bare_picture(name):
    batch, model = batch_of(name), make(name).eval()
    logits = model(batch)
    assert logits.shape == (4, 3) and torch.isfinite(logits).all()
    assert logits.std(0).max() > 0, "all pictures look the same to it"
    if "image" in batch:
        assert torch.equal(model(batch["image"]), logits)


@ALL
def test_every_trainable_parameter_gets_a_gradient(name):
    model = make(name)
    loss_of(model, batch_of(name)).backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            if not key.endswith(FLAT.get(name, ())):
                assert parameter.grad.abs().max() > 0, key


@ALL
def test_checkpointing_changes_nothing(name):
    results = []
    for on in (False, True):
        model = make(name)
        model.set_checkpointing(on)
        loss = loss_of(model, batch_of(name))
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], dict(model.named_buffers())))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for key, buffer in results[0][2].items():
        torch.testing.assert_close(buffer, results[1][2][key], msg=f"{key}: statistics were counted twice")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "rivit" else pytest.mark.slow) for name in COMPILED]
)
def test_compiling_the_units_changes_nothing(name):
    """As the engines compile, unit by unit; graphs are captured and differentiated, but no code is generated."""
    results = []
    for compiled in (False, True):
        model = make(name)
        torch._dynamo.reset()
        for unit in model.fsdp_units() if compiled else []:
            unit.compile(backend="aot_eager")
        torch.manual_seed(1)
        loss = loss_of(model, batch_of(name))
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@ALL
def test_state_dict_round_trip(name, tmp_path):
    first, second = make(name).eval(), make(name)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(first(batch_of(name)), second.eval()(batch_of(name)))


@ALL
def test_bf16_is_close_to_fp32(name):
    model, batch = make(name), batch_of(name)
    with torch.no_grad():
        exact = loss_of(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            rough = loss_of(model, batch)
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


@ALL
def test_pictures_of_a_batch_do_not_see_each_other_when_scored(name):
    model, batch = make(name).eval(), batch_of(name)
    both = model(batch)
    for b in range(2):
        alone = model({key: value[b : b + 1] for key, value in batch.items()})
        torch.testing.assert_close(alone[0], both[b], atol=1e-5, rtol=1e-4)


@ALL
def test_costs_can_be_counted_on_meta(name):
    with torch.device("meta"):
        kind, config, _ = MODELS[name]
        model = build(kind, **config)
        assert model({key: value.to("meta") for key, value in batch_of(name).items()}).shape == (4, 3)


@ALL
def test_fsdp_units_are_distinct_submodules(name):
    model = make(name)
    units, modules = model.fsdp_units(), set(model.modules())
    assert units and all(unit in modules and unit is not model for unit in units)
    owned = [id(p) for unit in units for p in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert all(any(True for _ in unit.parameters()) for unit in units)
