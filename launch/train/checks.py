"""Checks before a training starts: the batch must fit the ranks, and the model must be buildable."""

from __future__ import annotations

from launch.config.config import Config, ConfigError


def check_world(config: Config, world: int) -> None:
    """Check that the global batch can be shared by the ranks, and that the model gives the same result on several.

    Raises:
        ConfigError: It does not; the line shows the arithmetic.
    """
    for name, value in (("shard", config.engine.shard or 1), ("sequence", config.engine.sequence)):
        if world % value:
            raise ConfigError(f"engine.{name}={value} does not divide the {world} ranks")
    batch, parts = config.train.batch, config.train.accumulate
    world //= config.engine.sequence
    if batch % (world * parts):
        below = batch - batch % (world * parts)
        near = " or ".join(str(n) for n in (below, below + world * parts) if n)
        raise ConfigError(
            f"train.batch={batch} cannot be shared: {batch} / ({world} ranks x {parts} accumulate) = "
            f"{batch / (world * parts):g} images per forward pass; use train.batch={near}"
        )
    if world > 1 and getattr(config.model, "norm", "") == "batch":
        raise ConfigError("model.norm=batch keeps other statistics on each rank; use instance or none, or one rank")


def check_model(config: Config) -> None:
    """Check on shapes alone, without memory, that the model can be built and takes the starting weights.

    Raises:
        ConfigError: The line is the model's own.
    """
    import torch

    from launch.train.trainer import build_model

    try:
        with torch.device("meta"):
            model = build_model(config)
    except ValueError as error:
        raise ConfigError(f"model.name={config.model.name}: {error}") from None
    in_sequence = config.model.decoder_name == "raster" or getattr(config.model, "layout", "") == "sequence"
    if in_sequence and config.data.patching == "apf" and getattr(model, "uniform", False):
        raise ConfigError(
            f"data.length={config.data.length} is (resolution / patch)^2, which a model that takes the sequence as a "
            "picture reads as uniform patching: choose a smaller square, or model.decoder=geometric (layout=geometric)"
        )
    for side in config.eval.sizes:  # fail now, not at the end of the training
        try:
            with torch.no_grad():
                model.eval()(torch.empty(1, config.data.channels, side, side, device="meta"))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"eval.sizes: model.name={config.model.name} at {side} px: {reason}") from None
    if config.train.init_from is not None:
        from launch.train.weights import check_weights

        check_weights(model, config.train.init_from)
