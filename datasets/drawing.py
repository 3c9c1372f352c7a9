"""The built-in data set "Glyphs": characters of a few curved strokes, drawn anew for every example.

A class is a random program: where each stroke starts, where it ends and how it bends. A drawing runs the
program with a shaky hand. Only integer operations and elementwise floating-point operations that IEEE 754
defines to the bit (+, −, ×, ÷, √, comparisons) take part, so a seed gives the same bits on every machine.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_STROKES = 4  # at most; a class has 2 to 4
_CLASS_UNIFORMS = 1 + _STROKES * 17  # uniform numbers that make a class: its stroke count, then its strokes
_HAND_NORMALS = _STROKES * 9 + 7  # normal numbers that make a drawing: its strokes, then its place and pen
_UNITS = 1280.0  # of length per frame, for whole-number distances

# How much the drawings of a class differ, in standard deviations; an unplaced glyph is about 2 wide.
_POINT, _BEND, _ALONG = 0.08, 0.08, 0.06  # ends, inner control points, where a stroke leaves the last one
_TURN, _SLANT, _STRETCH = 0.07, 0.12, 0.08  # tan(angle / 2), shear, width against height
_SPAN, _SHIFT, _PEN = 0.06, 0.06, 0.1 / 28.0  # longer side, place of the centre, pen radius, in frames


def draw_glyphs(classes: int, drawings: int, *, seed: int, size: int = 28, first: int = 0) -> npt.NDArray[np.uint8]:
    """Draw handwriting-like characters, ink 255 on 0.

    Class ``i`` depends on ``(seed, first + i)`` alone and its drawing ``j`` on ``(seed, first + i, j)``, so
    asking for more or fewer of either, or from another ``first``, gives the same drawings.

    Args:
        classes: number of characters, at least 1.
        drawings: drawings of each character, at least 1.
        seed: which endless alphabet, in [0, 2⁶⁴).
        size: height and width of a drawing in pixels, at least 8.
        first: index in the alphabet of the first class, at least 0.

    Returns:
        Array of shape (classes, drawings, size, size), uint8.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if classes < 1 or drawings < 1:
        raise ValueError(f"classes and drawings must be at least 1, got {classes} and {drawings}.")
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}.")
    if not (0 <= seed < 2**64 and first >= 0 and first + classes <= 2**64):
        raise ValueError(f"seed and first must be at least 0 and fit in 64 bits, got {seed} and {first}.")
    images = np.empty((classes * drawings, size, size), np.uint8)
    step, batch = max(1, 4096 // drawings), max(1, 200_000 // size**2)  # bound the memory
    for low in range(0, classes, step):
        numbers = _numbers(seed, range(first + low, first + min(low + step, classes)), drawings)
        strokes, radius = _place(*_plan(*numbers))
        out = images[low * drawings :][: len(radius)]
        for start in range(0, len(radius), batch):
            part = slice(start, start + batch)
            out[part] = _ink(strokes[part], radius[part], size)
    return images.reshape(classes, drawings, size, size)


def _numbers(seed: int, indices: range, drawings: int) -> tuple[Floats, Floats]:
    """Uniforms of shape (C, _CLASS_UNIFORMS) and normals of shape (C, 1 + drawings, _HAND_NORMALS).

    One stream per class, read in a fixed order, keeps the first drawings the same however many follow. The
    normals of hand 0 are zeros: the steady hand, which settles the choices of the class.
    """
    count = _CLASS_UNIFORMS + drawings * _HAND_NORMALS * 3
    keys = (np.array([seed, index], np.uint64) for index in indices)
    raw = np.stack([np.random.Philox(key=key).random_raw(count) for key in keys])
    uniform: Floats = (raw >> np.uint64(11)) * np.float64(2.0**-53)
    parts = uniform[:, _CLASS_UNIFORMS:].reshape(len(indices), drawings, _HAND_NORMALS, 3)
    normal = np.zeros((len(indices), 1 + drawings, _HAND_NORMALS))
    normal[:, 1:] = (parts[..., 0] + parts[..., 1] + parts[..., 2]) * 2.0 - 3.0  # variance 1, within ±3
    return uniform[:, :_CLASS_UNIFORMS], normal


def _plan(uniform: Floats, normal: Floats) -> tuple[Floats, Floats]:
    """Cubic Bézier strokes of shape (N, _STROKES, 4, 2), unplaced, and the unused normals (N, 7)."""
    classes, hands = normal.shape[:2]
    points = np.empty((classes, hands, _STROKES, 4, 2))
    kinds = uniform[:, 1:].reshape(classes, 1, _STROKES, 17)
    shake = normal[..., :-7].reshape(classes, hands, _STROKES, 9)
    halves = np.arange(3)[:, None] / 2.0
    for k in range(_STROKES):
        link, along, curl = (kinds[:, :, k, i : i + 1] for i in range(3))
        where = kinds[:, :, k, 3:].reshape(classes, 1, 7, 2) * 2.0 - 1.0  # start, four ends, two bends
        error = shake[:, :, k, 1:].reshape(classes, hands, 4, 2)  # start, end, two bends
        start = where[:, :, 0] + _POINT * error[:, :, 0]
        if k:  # from the end of the last stroke, from somewhere on it, or elsewhere
            last = points[:, :, k - 1]
            along = np.clip(along + _ALONG * shake[:, :, k, :1], 0.0, 1.0)
            on = _bezier(last, along) + 0.3 * _POINT * error[:, :, 0]
            start = np.where(link < 0.35, last[:, :, 3], np.where(link < 0.75, on, start))
        # Of four places to end, take the farthest from all ink so far: no dots, few lines drawn twice.
        drawn = _bezier(points[:, 0, :k, None], halves).reshape(classes, -1, 2)
        away = where[:, 0, 1:5, None] - np.concatenate([start[:, :1], drawn], axis=1)[:, None]
        room = (away[..., 0] * away[..., 0] + away[..., 1] * away[..., 1]).min(axis=2)
        end = where[np.arange(classes), :, 1 + np.argmax(room, axis=1)] + _POINT * error[:, :, 1]
        # The square leaves many strokes nearly straight and makes some curly.
        bends = (0.2 + 1.8 * curl * curl)[..., None] * where[:, :, 5:] + _BEND * error[:, :, 2:]
        chord = end - start
        points[:, :, k, 0], points[:, :, k, 3] = start, end
        points[:, :, k, 1] = start + chord / 3.0 + bends[:, :, 0]
        points[:, :, k, 2] = end - chord / 3.0 + bends[:, :, 1]
        if k >= 2:  # a class of fewer strokes draws its last one again, which adds no ink
            spare = uniform[:, 0] < (0.3, 0.75)[k - 2]
            points[spare, :, k] = points[spare, :, k - 1]
    return points[:, 1:].reshape(-1, _STROKES, 4, 2), normal[:, 1:, -7:].reshape(-1, 7)


def _place(points: Floats, normal: Floats) -> tuple[Floats, Floats]:
    """Turn, slant, stretch, scale and shift glyphs in the frame [0, 1]²; adds pen radii (N,) in frames."""
    turn, slant, stretch, longer, *shift, pen = (normal[:, i, None, None] for i in range(7))
    t = _TURN * turn
    cos, sin = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
    x, y = points[..., 0], points[..., 1]
    x = (x + _SLANT * slant * y) * (1.0 + _STRETCH * stretch)
    turned = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
    curve = _bezier(turned[:, :, None], np.arange(9)[:, None] / 8.0).reshape(len(points), 1, -1, 2)
    low, high = curve.min(axis=2, keepdims=True), curve.max(axis=2, keepdims=True)
    scale = np.clip(0.68 + _SPAN * longer, 0.5, 0.82)[..., None] / (high - low).max(axis=3, keepdims=True)
    free = (0.84 - scale * (high - low)) / 2.0  # the rest of the frame is for the width of the pen
    centre = 0.5 + np.clip(_SHIFT * np.stack(shift, axis=-1), -free, free)
    return (turned - (low + high) / 2.0) * scale + centre, 0.95 / 28.0 + _PEN * pen[:, 0, 0]


def _bezier(points: Floats, t: Floats) -> Floats:
    """Points of shape (..., 2) at ``t`` in [0, 1] of cubics (..., 4, 2)."""
    a, b, c, d = (points[..., i, :] for i in range(4))
    s = 1.0 - t
    return s * s * s * a + 3.0 * s * s * t * b + 3.0 * s * t * t * c + t * t * t * d


def _ink(strokes: Floats, radius: Floats, size: int) -> npt.NDArray[np.uint8]:
    """Images (n, size, size) of strokes (n, _STROKES, 4, 2): ink fades over one pixel at the pen's edge."""
    curve = _bezier(strokes[:, :, None], np.arange(3 * size)[:, None] / (3.0 * size - 1.0))
    # Short integers are quick; 181 is beyond the pen's reach and two of its squares fit in 16 bits. Drawings
    # come last, so every operation runs along contiguous memory.
    where = (curve * _UNITS).astype(np.int16).reshape(len(strokes), -1, 2).transpose(1, 2, 0)[:, :, None]
    pixel = ((np.arange(size) + 0.5) * _UNITS / size).astype(np.int16)[:, None]
    gap = np.minimum(np.abs(where.copy() - pixel), np.int16(181)).astype(np.uint16)
    gap *= gap
    nearest = np.full((size, size, len(strokes)), 65535, np.uint16)
    squared = np.empty_like(nearest)
    for dx, dy in gap:
        np.minimum(nearest, np.add(dx[None], dy[:, None], out=squared), out=nearest)
    depth = (radius - np.sqrt(nearest.astype(np.float64)) / _UNITS) * size + 0.5
    return (np.clip(depth, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(2, 0, 1)
