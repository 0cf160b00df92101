"""Methods that invert the photo: they find a trajectory on which the source prompt gives the photo, and sample it with the target prompt.

May import: core, photos, bases, sampling, and the files above this folder. Must not know: benchmarks, commands.

- ``inverted.py``: what every inversion returns, and how it is sampled; the common form of the methods
- ``ddim.py``: DDIM inversion, and DDIB
- ``negative_prompt.py``: negative-prompt inversion, and proximal guidance
- ``null_text.py``: null-text inversion and its ablations
- ``edit_friendly.py``: edit-friendly inversion
- ``renoise.py``: ReNoise, fixed-point DDIM inversion
"""
