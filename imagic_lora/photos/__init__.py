"""Reading photos and writing images.

May import: core. No diffusers. Must not know: models, adapters, commands.

- ``reading.py``: reading a photo of any format, in bounded time and memory, or rejecting it
- ``files/``: formats, opening within limits, and the colour space that a file declares
- ``colour/``: conversion to 8-bit sRGB on a white background
- ``canvas.py``: scaling and padding a photo to a tensor in [-1, 1] for a model, and the inverse
- ``png.py``: PNG files with metadata
- ``sheet.py``: sheets of labelled images
- ``plot.py``: line plots
"""
