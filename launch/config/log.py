"""Settings of what a run writes besides its record: sinks, profile, watchdog, rates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from launch.config.base import OptionalFloat, OptionalInt, Section


def _list_from_text(value: Any) -> Any:
    """`log.sinks=tensorboard` on the command line is a list of one."""
    return (value,) if isinstance(value, str) and value else value or ()


class LogConfig(Section):
    """What to write down while training; nothing here changes what is computed."""

    sinks: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_list_from_text)] = Field(
        default=(), description="metrics.jsonl is always written; these as well (wandb: offline)"
    )
    hang_seconds: OptionalFloat = Field(
        default=1800.0, gt=0, description="no step for this long: write all stacks, end with status timeout; null: wait"
    )
    profile_steps: OptionalInt = Field(
        default=None, gt=0, description="steps that torch's profiler traces after the warm-up; null: none"
    )
    peak_tflops: OptionalFloat = Field(
        default=None, gt=0, description="peak of one gpu that mfu is a share of; null: of the gpu, from jobs/sites"
    )
