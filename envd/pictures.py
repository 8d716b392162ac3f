"""Pictures of screens from guests, which are not trusted: opened with a limit to what they unpack to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

QUALITY = 80
"""Of a JPEG that somebody looks at in passing."""
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


def smaller(picture: bytes, width: int) -> bytes:
    """The picture as a JPEG of at most `width` pixels across; no picture is made larger. Blocks. Raises ValueError as
    `opened` does."""
    with opened(picture) as image:
        image.draft("RGB", (width, width * image.height // max(1, image.width)))  # a JPEG is decoded small at once
        shown = image.convert("RGB")
        if shown.width > width:
            shown = shown.resize((width, max(1, round(shown.height * width / shown.width))), Image.Resampling.BOX)
        written = io.BytesIO()
        shown.save(written, "JPEG", quality=QUALITY)
        return written.getvalue()
