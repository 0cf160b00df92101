"""Tone mapping of high dynamic range (PQ and HLG, ITU-R BT.2100) to sRGB.

1. Values become light in cd/m2: PQ by its EOTF; HLG as on a display of 1000 cd/m2, by its inverse OETF and its OOTF.
2. The reference white of 203 cd/m2 (ITU-R BT.2408) is the white of sRGB. If the image is brighter, the EETF of ITU-R BT.2390 maps the
   brightest channel of each pixel from the image's peak to that white. The other channels keep their ratio to it, so hues stay.
3. The light goes to the primaries of sRGB, clipped, and through the curve of sRGB.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .spaces import SRGB_PRIMARIES, ColourSpace, luminance, srgb_values, to_xyz

REFERENCE_WHITE = 203.0  # cd/m2
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2  # the nominal display of BT.2100: cd/m2, and the exponent of its OOTF
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_GAINS, _CODES = 2**12, 2**16  # entries of tables


def pq_light(signal: np.ndarray) -> np.ndarray:
    """The EOTF of PQ: from [0, 1] to cd/m2."""
    root = signal ** (1 / _M2)
    return 10_000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pq_light`."""
    root = (light / 10_000) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2


def hlg_light(signal: np.ndarray) -> np.ndarray:
    """The inverse OETF of HLG: from [0, 1] to the light of the scene in [0, 1]."""
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - _C) / _A) + _B) / 12)


def eetf(light: np.ndarray, peak: float) -> np.ndarray:
    """The EETF of BT.2390 from a peak to the reference white, without a lift of black: a Hermite spline from a knee on, in PQ.

    Args:
        light: in cd/m2, at most the peak.
        peak: in cd/m2.
    """
    if peak <= REFERENCE_WHITE:
        return light
    top = pq_signal(np.array(peak))
    values, white = pq_signal(light) / top, pq_signal(np.array(REFERENCE_WHITE)) / top
    knee = 1.5 * white - 0.5
    t = ((values - knee) / (1 - knee)).clip(0, 1)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * white
    return pq_light(np.where(values < knee, values, spline) * top)


class ToneMapping:
    """The conversion of one image, by tables: of light for each 8-bit value, of the gain for the brightest channel, of sRGB for light.

    Args:
        space: of the image; has an ``hdr`` transfer function.
        brightest: the largest value of the image in any channel, in [0, 255].
    """

    def __init__(self, space: ColourSpace, brightest: int) -> None:
        signal = space.signal(np.arange(256) / 255)
        if space.hdr == "PQ":
            self._light, self._luminance = pq_light(signal).astype(np.float32), None
            self._peak = float(self._light[brightest])
        else:
            scene = hlg_light(signal)
            self._light, self._luminance = scene.astype(np.float32), luminance(space.primaries).astype(np.float32)
            self._peak = _HLG_PEAK * float(scene[brightest]) ** _HLG_GAMMA
        self._peak = max(self._peak, 1.0)  # of an image that is black
        light = self._peak * ((np.arange(_GAINS) + 0.5) / _GAINS) ** 4  # evenly spaced fourth roots, which are close to what the eye sees
        self._gains = (eetf(light, self._peak) / light / REFERENCE_WHITE).astype(np.float32)
        self._matrix = np.linalg.solve(to_xyz(SRGB_PRIMARIES), to_xyz(space.primaries)).T.astype(np.float32)
        self._codes = (255 * srgb_values(np.arange(_CODES) / (_CODES - 1))).round().astype(np.uint8)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Converts an image of mode RGB."""
        light = self._light[np.asarray(image)]
        if self._luminance is not None:
            light *= _HLG_PEAK * (light @ self._luminance)[..., None] ** (_HLG_GAMMA - 1)
        brightest = np.maximum(np.maximum(light[..., 0], light[..., 1]), light[..., 2])  # 20 times as fast as light.max(-1)
        root = np.sqrt(np.sqrt(brightest / self._peak))
        light *= self._gains[np.minimum(root * _GAINS, _GAINS - 1).astype(np.uint16)][..., None]
        light = light @ self._matrix
        np.clip(light, 0, 1, out=light)
        light *= _CODES - 1
        light += 0.5
        return Image.fromarray(self._codes[light.astype(np.uint16)])
