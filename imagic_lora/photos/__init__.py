"""Reading photos and writing images.

May import: core. No diffusers. Must not know: models, adapters, commands.

- ``reading.py``: reading a photo or a mask of any format, in bounded time and memory, or rejecting it
- ``files/``: formats, opening within limits, and the colour space that a file declares
- ``colour/``: conversion to 8-bit sRGB on a white background
- ``region.py``: a rectangle of a photo
- ``canvas.py``: scaling and padding a photo, or a region of it, to a tensor in [-1, 1] for a model, and the inverse
- ``mask.py``: masks of what may change: found from two images, feathered
- ``composite.py``: edits pasted into the photo at its full size
- ``png.py``: PNG files with metadata
- ``sheet.py``: sheets of labelled images
- ``plot.py``: line plots
- ``bars.py``: bar charts
- ``page.py``: HTML pages with images, which extend ``data/base.html``
"""
