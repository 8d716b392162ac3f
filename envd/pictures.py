"""Pictures of screens from guests, which are not trusted: opened with a limit to what they unpack to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

LARGEST = 50_000_000
"""Pixels. An 8K screen has 33 million; a file of 100 kB may say that it has 170."""


@contextmanager
def opened(picture: bytes) -> Iterator[Image.Image]:
    """The picture (PNG or JPEG), not decoded yet. Blocks: call it in a thread. Raises ValueError, from the block as
    well, for what does not decode and for what is too large."""
    try:
        with Image.open(io.BytesIO(picture), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(str(error)) from error
