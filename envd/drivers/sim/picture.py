"""What a sim desktop shows: a `Scene` drawn as PNG.

The picture has a palette, so that 1920×1080 takes one byte per pixel: drawing and encoding it was measured at 5 to
6 ms, against 37 ms in true colour, and most of it without the interpreter's lock. Backgrounds are made once per screen
size and frames are shared: two hundred desktops that nobody touched hold one frame between them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

COLUMNS, LINES = 96, 24

_SHADES = 200  # of the background; the colours of things come after them
_PAPER, _INK, _BAR, _BAR_BEHIND, _BAR_INK, _EDGE, _RED, _WHITE = range(_SHADES, _SHADES + 8)
_COLOURS = (
    (250, 250, 248), (30, 32, 38), (58, 78, 128), (126, 136, 158), (245, 246, 250), (40, 50, 80), (214, 84, 72),
    (255, 255, 255),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that can be seen. `windows` are titles from back to front; `text` is in the front one."""

    screen: tuple[int, int]
    cursor: tuple[int, int]
    windows: tuple[str, ...]
    text: tuple[str, ...]
    status: str


@lru_cache(maxsize=64)
def render(scene: Scene) -> bytes:
    """PNG of the scene. Blocks for some milliseconds: call it in a thread."""
    image = _background(scene.screen).copy()
    draw = ImageDraw.Draw(image)
    _draw_panel(draw, scene)
    for depth, title in enumerate(scene.windows):
        front = depth == len(scene.windows) - 1
        _draw_window(draw, scene, depth, title, front=front)
    _draw_cursor(draw, scene.cursor)
    return _png(image)


@lru_cache(maxsize=8)
def flat(screen: tuple[int, int]) -> bytes:
    """PNG of one colour."""
    return _png(Image.new("P", screen, 0))


@lru_cache(maxsize=8)
def _background(screen: tuple[int, int]) -> Image.Image:
    shades = Image.linear_gradient("L").resize(screen).point(lambda value: value * (_SHADES - 1) // 255)
    palette = [channel for step in range(_SHADES) for channel in (34 + step // 3, 62 + step // 2, 104 + step * 2 // 3)]
    shades.putpalette(palette + [channel for colour in _COLOURS for channel in colour])
    return shades


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=128)
def _lettering(words: str, size: int) -> Image.Image:
    """A line of text as a mask. Kept, since the lines of a full window take ten times as long as the picture."""
    mask = Image.new("1", (max(int(_font(size).getlength(words, "1")), 1), size * 3 // 2))
    ImageDraw.Draw(mask).text((0, 0), words, fill=1, font=_font(size))
    return mask


def _draw_panel(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    width, height = scene.screen
    line = max(height // 36, 20)
    draw.rectangle((0, 0, width, line), fill=_EDGE)
    draw.bitmap((8, line // 8), _lettering(scene.status, line * 2 // 3), fill=_BAR_INK)


def _draw_window(draw: ImageDraw.ImageDraw, scene: Scene, depth: int, title: str, *, front: bool) -> None:
    width, height = scene.screen
    line = max(height // 36, 20)
    left, top = width // 8 + depth % 8 * line, height // 10 + depth % 8 * line
    right, bottom = left + width * 5 // 8, top + height * 5 // 8
    draw.rectangle((left, top, right, bottom), fill=_PAPER, outline=_EDGE, width=2)
    draw.rectangle((left, top, right, top + line), fill=_BAR if front else _BAR_BEHIND)
    draw.bitmap((left + line // 2, top + line // 8), _lettering(title, line * 2 // 3), fill=_BAR_INK)
    draw.ellipse((right - line + 6, top + 6, right - 6, top + line - 6), fill=_RED)
    for row, words in enumerate(scene.text if front else ()):
        draw.bitmap(
            (left + line, top + line * 3 // 2 + row * line * 5 // 6), _lettering(words, line * 2 // 3), fill=_INK
        )


def _draw_cursor(draw: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    x, y = at
    arrow = ((0, 0), (0, 18), (4, 14), (7, 21), (10, 20), (7, 13), (13, 13))
    draw.polygon([(x + dx, y + dy) for dx, dy in arrow], fill=_WHITE, outline=_INK)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
