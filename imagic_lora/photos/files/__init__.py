"""Files of images: their formats, and what they say of their pixels.

May import: core, and ``colour`` of this room. Must not know: models, adapters, commands.

- ``formats.py``: the format of a file, by its first bytes
- ``opening.py``: opening an image that is neither too large nor too slow to decode
- ``checks.py``: rejecting what takes too long to decode or would be read wrong
- ``declared.py``: the colour space that a file declares
- ``tags.py``: tags of TIFF and EXIF
- ``boxes.py``: boxes of AVIF
"""
