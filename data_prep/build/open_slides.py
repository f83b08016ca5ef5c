"""Slides that stay open between the steps of a build, with their frames and masks. Must not import MPI or torch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from data_prep.build.log import stamp_of
from data_prep.build.outcome import Task
from data_prep.build.slide import mask_of, mask_reader, masks_of
from data_prep.frame import Frame, FrameReader, make_frame
from data_prep.slides.base import Slide
from data_prep.slides.open import open_slide
from data_prep.tokens.token_set import Reader

_SLIDES_OPEN = 2


@dataclass
class OpenedSlide:
    """A slide, its frame and readers of it.

    Attributes:
        stack: closes it.
        slide: the slide.
        frame: where it lies.
        reader: its pixels in the frame.
        read_mask: class ids of the frame, None without a mask.
        notes: about the mask.
        seen: gradients of the regions that this process scanned, (2041,) int64, 0 before the first.
    """

    stack: ExitStack
    slide: Slide
    frame: Frame
    reader: FrameReader
    read_mask: Reader | None
    notes: tuple[str, ...]
    seen: Any = 0


_open_slides: dict[tuple[Any, ...], OpenedSlide] = {}


def opened_slide(task: Task) -> OpenedSlide:
    """The slide of a task; the last few stay open, since the next step is often of the same one.

    Raises:
        SlideError: The slide or its mask cannot be read, or they have different sizes.
        ValueError: There is no mask for it.
    """
    mask_paths = masks_of(task)
    options = task.options
    files = [task.slide, *mask_paths]
    key = (
        *((str(path), stamp_of(path)) for path in files),
        options.resolution,
        options.aspect,
        options.mask_kind,
        options.mask_classes,
        options.classes,
        options.fov is not None,
        options.strict,
    )
    if key in _open_slides:
        _open_slides[key] = _open_slides.pop(key)
        return _open_slides[key]
    while len(_open_slides) >= _SLIDES_OPEN:
        _open_slides.pop(next(iter(_open_slides))).stack.close()
    stack = ExitStack()
    try:
        slide = stack.enter_context(open_slide(task.slide, strict=options.strict))
        frame = make_frame(slide.size_wh, options.resolution, options.aspect)
        read_mask, notes = None, tuple[str, ...]()
        if mask_paths:
            mask = stack.enter_context(mask_of(slide, mask_paths, options))
            notes, read_mask = mask.notes, mask_reader(mask, frame, options)
    except BaseException:
        stack.close()
        raise
    _open_slides[key] = OpenedSlide(stack, slide, frame, FrameReader(slide, frame), read_mask, notes)
    return _open_slides[key]
