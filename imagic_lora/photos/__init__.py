"""Photos in, images out.

May import: core. No diffusers. Must not know: models, adapters, commands.

- ``reading.py``: a photo from anywhere, read right or refused, in bounded time and memory
- ``colour.py``: its colours to 8-bit sRGB on white
- ``canvas.py``: the photo scaled and padded for a model, as a tensor in [-1, 1]; and back
- ``png.py``: PNG files that hold how they were made
- ``sheet.py``: labelled images in rows
"""
