"""One contract for every registered segmentation model and decoder; classifiers have theirs in test_classifiers."""

import pytest
import torch

from hpc_models.registry import build, names, settings_class
from hpc_models.segmentation.unet import UNet
from hpc_models.segmentation.unetr import TokenHead
from hpc_models.training.losses import bce_dice
from tests.helpers.trees import random_batch

SMALL = {
    "size_px": 64,
    "patch": 8,
    "length": 25,
    "classes": 2,
    "width": 32,
    "depth": 4,
    "heads": 4,
    "feature_size": 4,
    "mlp_dim": 48,
}
PICTURE = {"size_px": 64, "patch": 8, "length": 25, "classes": 2}
TRANSUNET = {
    **PICTURE,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 48,
    "stem_width": 8,
    "units": (1, 2, 1),
    "decoder_widths": (16, 16, 8, 8),
}
SWIN = {**PICTURE, "feature_size": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4), "window": 4}
MODELS = {
    "swin_unetr": ("swin_unetr", SWIN),
    "swin_unetr-sequence": ("swin_unetr", {**SWIN, "layout": "sequence"}),
    "transunet": ("transunet", {**TRANSUNET, "norm": "instance"}),
    "transunet-sequence": ("transunet", {**TRANSUNET, "norm": "instance", "layout": "sequence"}),
    "transunet-batch": ("transunet", TRANSUNET),
    "unetr-raster": ("unetr", {**SMALL, "decoder": "raster", "position": "slot"}),
    "unetr-geometric": ("unetr", {**SMALL, "decoder": "geometric", "position": "both"}),
    "unetr-geometric-coarse": ("unetr", {**SMALL, "decoder": "geometric", "position": "geom", "grid": 2}),
    "unetr-token": ("unetr", {**SMALL, "decoder": "token", "position": "geom"}),
    "unetr-leaf": ("unetr", {**SMALL, "decoder": "leaf", "position": "geom"}),
    "unetr-leaf-packed": ("unetr", {**SMALL, "decoder": "leaf", "position": "geom", "attention": "packed"}),
    "unetr-window": ("unetr", {**SMALL, "decoder": "token", "position": "geom", "attention": "window", "window": 8}),
    "unetr-performer": ("unetr", {**SMALL, "decoder": "token", "position": "geom", "attention": "performer_softmax"}),
    "unetr-relu": ("unetr", {**SMALL, "decoder": "leaf", "position": "geom", "attention": "performer_relu"}),
    "unetr-nystrom": ("unetr", {**SMALL, "decoder": "token", "position": "geom", "attention": "nystrom", "window": 4}),
    "unetr-leaf-halo": ("unetr", {**SMALL, "decoder": "leaf", "position": "none", "halo": 2}),
    "unetr-leaf_unet": ("unetr", {**SMALL, "decoder": "leaf_unet", "position": "geom", "leaf_base": 4}),
    "unetr-leaf_unet-alone": ("unetr", {**SMALL, "decoder": "leaf_unet", "position": "geom", "seams": False}),
    "unet": ("unet", {"classes": 2, "widths": (4, 8, 16)}),
    "unet-batch": ("unet", {"classes": 2, "widths": (4, 8, 16), "norm": "batch"}),
}
ALL = pytest.mark.parametrize("name", list(MODELS))
COMPILED = ("unetr-geometric", "unetr-leaf", "unetr-leaf_unet", "unet", "transunet", "swin_unetr")
# Models that see the order of the tokens instead of their places, or every token alone.
BLIND = ("unet", "unetr-raster", "transunet-sequence", "swin_unetr-sequence")


def make(name, **more):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return build(kind, **{**config, **more})


def batch_of(seed=0):
    batch, _, _ = random_batch(seed, 64, 8, length=25, images=2, classes=2, split=0.35)
    return batch


def full(batch):
    """The batch cut to the tokens both images have."""
    n = int(batch["valid"].sum(1).min())
    return {key: value[:, :n] for key, value in batch.items()}


def test_the_cases_cover_every_registered_model_and_decoder():
    known = {n for n in names() if settings_class(n).task == "segmentation"}
    assert {kind for kind, _ in MODELS.values()} == known == {MODELS[name][0] for name in COMPILED}
    assert {c.get("decoder") for _, c in MODELS.values()} >= {"raster", "geometric", "token", "leaf", "leaf_unet"}


@ALL
def test_shape_is_per_cell_and_finite(name):
    batch = batch_of()
    assert not batch["valid"].all() and batch["valid"].any(1).all()
    logits = make(name)(batch)
    assert logits.shape == (2, 25, 8, 8, 2)
    assert torch.isfinite(logits).all()


@ALL
def test_every_trainable_parameter_gets_a_gradient(name):
    model = make(name)
    batch = batch_of()
    bce_dice(model(batch), batch["mask_counts"], batch["content_counts"]).mean().backward()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert "norm_cross_attn" in key
            continue
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@ALL
def test_checkpointing_changes_nothing(name):
    batch, results = batch_of(), []
    for on in (False, True):
        model = make(name)
        model.set_checkpointing(on)
        loss = bce_dice(model(batch), batch["mask_counts"], batch["content_counts"]).mean()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiling_the_units_changes_nothing(name):
    """As the engines compile, unit by unit; graphs are captured and differentiated, but no code is generated."""
    batch, results = batch_of(), []
    for compiled in (False, True):
        model = make(name)
        torch._dynamo.reset()
        for unit in model.fsdp_units() if compiled else []:
            unit.compile(backend="aot_eager")
        loss = bce_dice(model(batch), batch["mask_counts"], batch["content_counts"]).mean()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@ALL
def test_state_dict_round_trip(name, tmp_path):
    first, second = make(name).eval(), make(name)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    batch = batch_of()
    assert torch.equal(first(batch), second.eval()(batch))


@ALL
@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_padding_has_no_influence(name, garbage):
    model = make(name)
    batch = batch_of()
    clean = model(batch)
    dirty = dict(batch)
    hole = ~batch["valid"]
    dirty["tokens"] = batch["tokens"].masked_fill(hole[:, :, None, None, None], garbage)
    dirty["leaf_xy"] = batch["leaf_xy"].masked_fill(hole[..., None], 17)
    assert torch.equal(model(dirty)[batch["valid"]], clean[batch["valid"]])


@pytest.mark.parametrize("name", [n for n in MODELS if "raster" not in n])
def test_more_padding_changes_nothing(name):
    model = make(name).eval()
    batch = full(batch_of())
    longer = {
        key: torch.cat((value, value.new_zeros(2, 25 - value.shape[1], *value.shape[2:])), 1)
        for key, value in batch.items()
    }
    n = batch["valid"].shape[1]
    assert n < 25
    torch.testing.assert_close(model(longer)[:, :n], model(batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "unetr-geometric",
        "unetr-token",
        "unetr-leaf",
        "unetr-leaf-halo",
        "unetr-leaf_unet",
        "unet",
        "transunet",
        "swin_unetr",
    ],
)
def test_order_of_tokens_does_not_matter_without_a_slot_table(name):
    model = make(name, **({"position": "geom"} if MODELS[name][0] == "unetr" else {})).eval()
    batch = batch_of()
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    shuffled = {key: value[:, order] for key, value in batch.items()}
    valid = shuffled["valid"]
    torch.testing.assert_close(model(shuffled)[valid], model(batch)[:, order][valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["unetr-token", "unetr-leaf", "unetr-leaf_unet", "unetr-leaf_unet-alone"])
@pytest.mark.parametrize("images", [1, 2])
def test_images_without_leaves_are_no_fault(name, images):
    model, batch = make(name), batch_of()
    batch["valid"][:images] = False
    logits = model(batch)
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@ALL
def test_images_of_a_batch_do_not_see_each_other(name):
    model = make(name).eval()
    batch = batch_of()
    both = model(batch)
    for b in range(2):
        alone = model({key: value[b : b + 1] for key, value in batch.items()})
        valid = batch["valid"][b]
        torch.testing.assert_close(alone[0][valid], both[b][valid], atol=1e-5, rtol=1e-4)


@ALL
def test_bf16_is_close_to_fp32(name):
    model = make(name).eval()
    batch = batch_of()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    valid = batch["valid"]
    scale = exact[valid].std()
    assert (rough.float() - exact)[valid].abs().mean() < 0.05 * scale
    losses = [bce_dice(z, batch["mask_counts"], batch["content_counts"]) for z in (exact, rough)]
    torch.testing.assert_close(losses[0], losses[1], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("unet-")])
def test_an_image_without_any_token_stays_finite(name):
    batch = batch_of()
    batch["valid"][1] = False
    model = make(name)
    logits = model(batch)
    assert torch.isfinite(logits[batch["valid"]]).all()
    torch.where(batch["valid"][..., None, None, None], logits, 0).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("unet-") and n not in BLIND])
def test_geometry_reaches_the_model(name):
    """The same patches elsewhere in the frame give another answer, unless the model has no notion of place."""
    model = make(name).eval()
    batch = batch_of()
    moved = dict(batch)
    half = 32
    moved["leaf_xy"] = torch.where(
        batch["leaf_size"][..., None] <= half, (batch["leaf_xy"] + half) % 64, batch["leaf_xy"]
    )
    same = torch.allclose(model(moved)[batch["valid"]], model(batch)[batch["valid"]], atol=1e-6)
    assert not same


@ALL
def test_fsdp_units_are_distinct_submodules_that_hold_most_weights(name):
    model = make(name)
    units = model.fsdp_units()
    modules = set(model.modules())
    assert units and all(unit in modules and unit is not model for unit in units)
    owned = [id(p) for unit in units for p in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert all(any(True for _ in unit.parameters()) for unit in units)


@ALL
def test_prior_sets_the_starting_probability(name):
    model = make(name, prior=0.1)
    bias = (model.decoder if hasattr(model, "decoder") else model).out.bias
    torch.testing.assert_close(torch.sigmoid(bias), torch.full_like(bias, 0.1))
    with pytest.raises(ValueError, match="prior"):
        make(name, prior=1.0)


def test_registry_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"unknown model 'vitt'; valid: .*unet, unetr"):
        build("vitt")
    with pytest.raises(ValueError, match=r"unknown option depht for model 'unetr'; valid: .*depth"):
        build("unetr", size_px=64, patch=8, length=64, depht=3)
    with pytest.raises(ValueError, match="needs size_px, patch, length"):
        build("unetr")
    assert isinstance(build("unet_tiled", widths=(4, 8)), UNet)
    assert settings_class("unet")().norm == "instance"
    assert (settings_class("vit_seg")().decoder, settings_class("unetr")().decoder) == ("token", "raster")
    vit = build("vit_seg", size_px=32, patch=8, length=16, width=16, depth=1, heads=2)
    assert isinstance(vit.decoder, TokenHead) and vit.vit.blocks[0].attn.qkv.bias is not None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decoder": "mlp"}, "decoder must be one of raster, geometric, token, leaf"),
        ({"position": "rope"}, "position must be one of"),
        ({"patch": 6}, "power of two"),
        ({"patch": 1}, "power of two"),
        ({"size_px": 96}, r"patch \* 2\^k"),
        ({"length": 24}, "perfect square of tokens, got 24; use 16"),
        ({"length": 0}, "length"),
        ({"width": 30}, "not a multiple of heads"),
        ({"grid": 3, "decoder": "geometric"}, "grid must be a power of two"),
        ({"grid": 16, "decoder": "geometric"}, "at most size_px / patch = 8"),
        ({"halo": 3, "decoder": "leaf"}, "halo must be 0, 1 or 2"),
    ],
)
def test_unetr_refuses_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(ValueError, match=message):
        build("unetr", **{**SMALL, **wrong})


def test_a_sequence_longer_than_the_slot_table_is_an_error():
    model = make("unetr-token", position="slot", length=10)
    with pytest.raises(ValueError, match="slot table has length=10"):
        model(batch_of())
    raster = make("unetr-raster", length=16)
    with pytest.raises(ValueError, match="slot table"):
        raster(batch_of())
