"""Methods of editing a photo, with one common interface.

May import: core, photos, bases, memory, adapters, sampling, training. Must not know: benchmarks, commands.

- ``method.py``: the interface (request, result, context) and the measured cost of an edit
- ``imagic.py``: Imagic, in either mode and with any settings
- ``untuned.py``: methods without a fit: the target prompt alone, and image to image (SDEdit)
- ``bounds.py``: reference rows: the unedited photo, and the true edit encoded and decoded by the VAE
"""
