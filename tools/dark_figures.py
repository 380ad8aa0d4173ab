"""A dark page's version of each drawing: light ink on no paper, in the same hues.

A drawing is ink on the paper of `transformer_course.figures`. What a pixel holds of which ink is
read from its colour; the ink is replaced by its light counterpart, the paper by nothing. Blue stays
blue and pale stays pale, which turning the picture's colours round does not do. Pictures and heat
maps have no such version: their text says what dark and pale mean.
"""

import base64
import hashlib
import io
import re
import sys

import numpy as np
from PIL import Image

from cells import ROOT

sys.path.insert(0, str(ROOT))
from transformer_course.figures import COLORS, PAPER

LIGHT = '#3d9bdc', '#ec7a1c', '#1fbf8f', '#dd8fbb', '#f2bf45', '#8fd0f5', '#ececec'
NEAR = 30  # of 255: a colour farther from all inks than this is an ink of its own
MOST = 0.1  # of the pixels: with more of such colours it is a picture, whatever drew it
INKED, DIVISION = '<div class="ink">', re.compile(r'<(/?)div\b')
DRAWING = re.compile(
    r'(<img alt="[^"]*" )src="data:image/png;base64,([^"]+)"([^>]*? class="img-fluid[^"]*")([^>]*>)'
)


def rgb(colors):
    "Colours such as '#0072B2' as numbers, (n, 3)."
    return np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colors], float)


def unmixed(colors):
    "For each colour (n, 3): the ink that is in it, how much of it (0 to 1), and what is not told."
    paper = rgb([PAPER])
    inks = rgb(COLORS) - paper  # (7, 3)
    away = colors - paper  # (n, 3)
    share = np.clip(away @ inks.T / (inks**2).sum(1), 0, 1)  # (n, 7)
    rest = np.linalg.norm(away[:, None] - share[..., None] * inks, axis=2)
    which = rest.argmin(1)
    at = np.arange(len(colors)), which
    return which, share[at], rest[at]


def extended(colors):
    "The full ink of colours that are no ink of ours, light enough for a dark page, and its share."
    paper = rgb([PAPER])
    away = np.minimum(colors - paper, -1e-6)  # from the paper to the colour
    share = (-away / paper).max(1, keepdims=True)  # of the way to where a channel ends
    full = np.clip(paper + away / share, 1, 255)
    bright = full * (236 / full.max(1, keepdims=True))
    return 0.85 * bright + 0.15 * 255, share[:, 0]


def for_dark(png):
    "The dark version of a drawing: PNG with a palette, without paper; None of what is a picture."
    shown = Image.open(io.BytesIO(png))
    dpi = {'dpi': shown.info['dpi']} if 'dpi' in shown.info else {}
    if shown.mode != 'P':
        how = dict(method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        shown = shown.convert('RGB').quantize(256, **how)
    colors = np.array(shown.getpalette('RGB'), float).reshape(-1, 3)
    pixels = np.bincount(np.asarray(shown).ravel(), minlength=len(colors))
    which, share, rest = unmixed(colors)
    known = rest < NEAR
    if pixels[~known].sum() > MOST * pixels.sum():
        return None
    other, part = extended(colors)
    light = np.where(known[:, None], rgb(LIGHT)[which], other)
    seen = np.where(known, share, part)
    shown.putpalette(light.round().astype('uint8').tobytes())
    made, see = io.BytesIO(), (255 * seen).round().astype('uint8').tobytes()
    shown.save(made, 'PNG', optimize=True, transparency=see, **dpi)
    return made.getvalue()


def dark_drawings(text, folder, address):
    "A page in which each drawing has its dark version beside it, as a file in `folder`."

    def both(m):
        png = for_dark(base64.b64decode(m[2]))
        if png is None:
            return m[0]
        name = f'{hashlib.sha256(png).hexdigest()[:16]}.png'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png)
        light, dark = (f'{m[3][:-1]} {kind}"' for kind in ('on-light', 'on-dark'))
        return (
            f'{m[1]}src="data:image/png;base64,{m[2]}"{light}{m[4]}'
            f'{m[1]}src="{address}/{name}" loading="lazy"{dark}{m[4]}'
        )

    first, *inked = text.split(INKED)
    for piece in inked:
        end = end_of_division(piece)
        first += INKED + DRAWING.sub(both, piece[:end]) + piece[end:]
    return first


def end_of_division(text):
    "Where the division ends whose content `text` begins with."
    depth = 1
    for m in DIVISION.finditer(text):
        depth += -1 if m[1] else 1
        if not depth:
            return m.start()
    return len(text)
