"""The validated configuration of one training run, and how the command line changes it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from data_prep.system.command_line import nearest
from hpc_models.registry import settings_class
from hpc_models.settings import ModelSettings
from launch.config.base import OptionalBool, OptionalFloat, OptionalInt, OptionalText, Section, number_from_text
from launch.config.data import DataConfig as DataConfig
from launch.config.log import LogConfig
from launch.config.model import MODELS, checked, rows

# Keys that do not change what is computed. They may differ between the lives of one run.
NOT_COMPARED = tuple("force run_root run_id checkpoint log engine.threads data.cache_gib data.prefetch".split())

# Short ways to type keys.
SHORT = {"train.steps": "train.max_steps"}


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that names it and what would be valid; exit code 64."""

    exit_code = 64


class TrainConfig(Section):
    """Optimiser, schedule, length and arithmetic of training."""

    batch: int = Field(default=2, gt=0, description="images per optimiser step over all ranks (the global batch)")
    accumulate: int = Field(default=1, gt=0, description="forward passes per optimiser step and rank")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(
        default=0.01, ge=0, description="AdamW weight decay; not on norms, biases and other vectors"
    )
    optimiser: Literal["adamw", "adam", "asam"] = Field(
        default="adamw", description="adam: decay added to the gradient; asam: Adam on the worst weights nearby (ASAM)"
    )
    rho: float = Field(default=0.05, gt=0, description="optimiser=asam: size of that neighbourhood")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW moments")
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm, 0 = no clipping")
    schedule: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="share of the run in which the learning rate rises linearly"
    )
    decay_at: tuple[float, ...] = Field(
        default=(0.6, 0.85), description="schedule=step: shares of the run at which it drops"
    )
    decay_factor: float = Field(default=0.1, gt=0, lt=1, description="schedule=step: factor of each drop")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="classification: share of the even labels")
    ema_decay: OptionalFloat = Field(
        default=None, gt=0, lt=1, description="score the running average of the weights with this decay; null: none"
    )
    distill: float = Field(
        default=0.0, ge=0, description="classification: weight of the averaged model's answers as targets (0: none)"
    )
    scale_distill: float = Field(
        default=0.0, ge=0, description="data.sizes: weight of the larger size's class token as a target (ResFormer)"
    )
    init_from: OptionalText = Field(
        default=None, description="start from the weights of this run directory or .pt file; null: from random ones"
    )
    max_steps: OptionalInt = Field(default=None, gt=0, description="end after this many steps; null: no limit")
    max_seconds: OptionalFloat = Field(
        default=None, gt=0, description="end after this much training time (steps only, no evaluation); null: no limit"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: parameters stay fp32, arithmetic in bf16"
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, data order and augmentation")
    log_every: int = Field(default=1, gt=0, description="steps between two lines of metrics.jsonl")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("needs max_steps or max_seconds (or both: whichever comes first ends the run)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1) (got {list(self.betas)})")
        if self.batch % self.accumulate:
            raise ValueError(f"batch={self.batch} is not a multiple of accumulate={self.accumulate}")
        if self.distill and self.ema_decay is None:
            raise ValueError(f"distill={self.distill:g} needs ema_decay, the average that teaches")
        return self


class EngineConfig(Section):
    """How the model is spread over the ranks."""

    name: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp", description="ddp: whole model on every rank; fsdp: sharded (FSDP2); deepspeed: ZeRO"
    )
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(number_from_text)] = Field(
        default=2, description="deepspeed: stage; 1, 2, 3 shard more and more"
    )
    shard: OptionalInt = Field(
        default=None, gt=0, description="fsdp: ranks of a shard group (HSDP), null: a node's; deepspeed zero=3: hpZ"
    )
    sequence: int = Field(default=1, gt=0, description="ranks that share one sequence of tokens (Ulysses)")
    compile: bool = Field(default=False, description="torch.compile block by block")
    meta_init: bool = Field(default=False, description="fsdp: only rank 0 makes whole weights, the others get shards")
    offload: bool = Field(default=False, description="deepspeed: optimiser in host memory (needs a C++ compiler)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda when there is one (ROCm included)"
    )
    reshard: bool = Field(default=True, description="fsdp: free gathered parameters between forward and backward")
    threads: int = Field(default=0, ge=0, description="torch threads of a rank, 0 = share the cores of the node")

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.sequence > 1 and self.name == "deepspeed":
            raise ValueError("sequence > 1 works with fsdp and ddp, not with deepspeed")
        if self.meta_init and self.name != "fsdp":
            raise ValueError(f"meta_init is for fsdp, not for {self.name}")
        if self.offload and self.name != "deepspeed":
            raise ValueError(f"offload is for deepspeed, not for {self.name}")
        return self


class CheckpointConfig(Section):
    """When to save for a restart."""

    every_steps: OptionalInt = Field(
        default=None, gt=0, description="save each time this many steps are done; null: never"
    )
    every_seconds: OptionalFloat = Field(
        default=300.0, gt=0, description="save after this much training time; null: never"
    )
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")
    background: OptionalBool = Field(
        default=None, description="write while training goes on (ddp, fsdp); null: on GPUs only"
    )
    keep_best: bool = Field(default=True, description="save and keep the one with the best score on val as well")


class EvalConfig(Section):
    """When to measure Dice, and what to keep of it."""

    every_steps: OptionalInt = Field(
        default=None, gt=0, description="measure Dice on val each this many steps; null: never"
    )
    every_seconds: OptionalFloat = Field(default=None, gt=0, description="the same by training time; null: never")
    select: Literal["last", "best"] = Field(
        default="last", description="weights for the test slides: the last ones, or those with the best score on val"
    )
    pictures_px: int = Field(default=1024, ge=0, description="longest side of the saved test pictures, 0 = save none")
    part: OptionalFloat = Field(
        default=None,
        gt=0,
        lt=1,
        description="with data.part: predict in overlapping parts, squares with this share of the frame's side, so "
        "that norms see statistics as in training; null: the whole tree at once",
    )
    sizes: tuple[int, ...] = Field(
        default=(), description="kind=images: score the test pictures at these sides too, trained on or not"
    )


class Config(Section):
    """Everything that defines one training run."""

    experiment: str = Field(description="name of the experiment this came from")
    data: DataConfig
    model: InstanceOf[ModelSettings]
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    run_root: str = Field(default="runs", description="folder of all run directories")
    run_id: OptionalText = Field(
        default=None, description="name of the run directory; null: from model, data, ranks and seed"
    )
    force: bool = Field(
        default=False, description="start anew even if the run directory is finished or has other settings"
    )

    @field_validator("model", mode="before")
    @classmethod
    def _pick_model(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return checked(model_class(str(value.get("name", ""))), value)
        return value

    @field_serializer("model")
    def _dump_model(self, model: ModelSettings) -> dict[str, Any]:
        return {key: value for key, value, _ in rows(model)}

    @model_validator(mode="after")
    def _check(self) -> Config:
        # Do the model and the data go together?
        if self.data.kind not in self.model.inputs:
            kinds = " or ".join(self.model.inputs)
            raise ValueError(f"model.name={self.model.name} does not go with data.kind={self.data.kind}; use {kinds}")
        layout = getattr(self.model, "layout", None)
        if layout is not None and (layout == "tiles") != (self.data.kind == "tiles"):
            raise ValueError(f"model.layout={layout} does not go with data.kind={self.data.kind}; tiles with tiles")
        if self.data.part < 1 and self.data.patching == "apf":
            if getattr(self.model, "decoder", None) == "raster" or layout == "sequence":
                raise ValueError("data.part needs tokens at their places; the model takes their sequence as a picture")
            if getattr(self.model, "position", None) in ("slot", "both"):
                raise ValueError("data.part changes which slot a token has; set model.position=geom or none")
        # Does the evaluation go with the data, and training with the model?
        if self.eval.part is not None:
            if self.data.part == 1:
                raise ValueError("eval.part needs data.part below 1")
            self.data.check_part("eval.part", self.eval.part)
        if (self.model.task == "classification") != (self.data.labels is not None):
            needs = "needs data.labels" if self.model.task == "classification" else "segments: set data.labels=null"
            raise ValueError(f"model.name={self.model.name} {needs}")
        if self.train.distill and self.model.task != "classification":
            raise ValueError("train.distill is for classifiers; set train.distill=0")
        if self.eval.select == "best" and not (
            self.checkpoint.keep_best and (self.eval.every_steps or self.eval.every_seconds)
        ):
            raise ValueError("eval.select=best needs checkpoint.keep_best=true and eval.every_steps or every_seconds")
        # Can the engine do what is asked?
        if self.engine.name == "deepspeed" and self.checkpoint.background:
            raise ValueError("engine.name=deepspeed writes its own checkpoints; set checkpoint.background=false")
        if self.engine.name == "deepspeed" and (self.train.ema_decay is not None or self.train.optimiser == "asam"):
            raise ValueError("engine.name=deepspeed has neither train.ema_decay nor train.optimiser=asam; use fsdp")
        if self.eval.sizes and (self.data.kind != "images" or min(self.eval.sizes) < 1):
            raise ValueError(f"eval.sizes={list(self.eval.sizes)} needs data.kind=images and positive sides")
        if self.train.scale_distill and len(self.data.sizes) < 2:
            raise ValueError("train.scale_distill needs two or more data.sizes")
        return self

    @property
    def samples_per_image(self) -> float:
        """Training samples that have as many pixels as one frame: 1, or the number of crops."""
        return (self.data.resolution / self.data.crop_px) ** 2 if self.data.kind == "tiles" else 1.0

    @property
    def images_per_step(self) -> float:
        """Pixels of one step over all ranks, counted in frames: throughput then compares crops with whole frames."""
        return self.train.batch * self.data.part**2 / self.samples_per_image

    def run_name(self, world: int) -> str:
        """Name of the run directory: model, decoder, patching, resolution, patch, ranks, seed (or `run_id`)."""
        data = self.data
        return self.run_id or (
            f"{self.model.name}-{self.model.decoder_name}_{data.patching}_R{data.resolution}_p{data.patch}"
            f"_g{world}_s{self.train.seed}"
        )

    def run_dir(self, world: int) -> Path:
        """`run_root/experiment/run name` for this many ranks."""
        return Path(self.run_root) / self.experiment / self.run_name(world)

    def to_yaml(self, comments: bool = False) -> str:
        """The configuration as YAML, with what each key means beside it when `comments` is set."""
        if not comments:
            return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        lines: list[str] = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section | ModelSettings):
                lines.append(f"{name}:")
                lines += [_yaml_line(*row, 2) for row in (_rows(value) if isinstance(value, Section) else rows(value))]
            else:
                lines.append(_yaml_line(name, value, field.description, 0))
        return "\n".join(lines) + "\n"

    def sha256(self) -> str:
        """Hash of all keys except `NOT_COMPARED`."""
        kept = {k: v for k, v in flatten(self.model_dump(mode="json")).items() if not _ignored(k)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _rows(section: Section) -> list[tuple[str, Any, str | None]]:
    return [(key, getattr(section, key), field.description) for key, field in type(section).model_fields.items()]


def _yaml_line(key: str, value: Any, description: str | None, indent: int) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = f"{key}: {yaml.safe_dump([plain], default_flow_style=True, width=1000).strip()[1:-1]}"
    return f"{' ' * indent + text:<44}  # {description}"


def _ignored(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in NOT_COMPARED)


def model_class(name: str) -> type[ModelSettings]:
    """The settings class of a registered model.

    Raises:
        ConfigError: No such model.
    """
    if name not in MODELS:
        raise ConfigError(f"model.name={name!r} is unknown{suggest(name, MODELS)}; valid: {nearest(name, MODELS)}")
    return settings_class(name)


def suggest(word: str, valid: Iterable[str]) -> str:
    """` (did you mean X?)` when some valid word is close, else nothing."""
    names = list(valid)
    close = difflib.get_close_matches(word, names, 1, 0.6)
    if not close and "." not in word:
        close = [name for name in names if name.rpartition(".")[2] == word][:1]
    return f" (did you mean {close[0]}?)" if close else ""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two dumped configurations compute differently, as `key: old -> new`."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in sorted(a.keys() | b.keys()) if not _ignored(k) and a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in keys]


def apply_overrides(base: Config, overrides: Sequence[str]) -> Config:
    """`base` with `section.key=value` texts applied, checked as a whole.

    Choosing another `model.name` starts from that model's defaults, since its keys differ.

    Raises:
        ConfigError: Not of the form key=value, an unknown key, or a value that does not fit.
    """
    pairs: list[tuple[str, str]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} is not of the form key=value, e.g. train.lr=1e-3")
        pairs.append((SHORT.get(key.strip(), key.strip()), value.strip()))
    tree = base.model_dump(mode="json")
    name = dict(pairs).get("model.name", tree["model"]["name"])
    if name != tree["model"]["name"]:
        tree["model"] = {key: value for key, value, _ in rows(model_class(name)())}
    valid = flatten(tree)
    for key, value in pairs:
        if key not in valid:
            raise ConfigError(f"unknown key {key!r}{suggest(key, valid)}; valid keys: {nearest(key, list(valid))}")
        section, _, leaf = key.rpartition(".")
        target = tree[section] if section else tree
        target[leaf] = _parse(key, value) if value[:1] in ("[", "{") else value
    return validate(tree)


def _parse(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: not a list like [0.9, 0.99] (brackets or quotes do not close?)") from None


def validate(tree: dict[str, Any]) -> Config:
    """A dumped tree as a checked `Config`.

    Raises:
        ConfigError: The first faults, in one line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            where = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if isinstance(fault["input"], dict | Section) else f" (got {fault['input']!r})"
            faults.append(f"{where + ': ' if where else ''}{message[:1].lower()}{message[1:]}{given}")
        raise ConfigError("; ".join(dict.fromkeys(faults))) from None
