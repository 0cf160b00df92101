"""Files of images: formats, limits, and what their headers say.

May import: core, and ``colour`` of this room. Must not know: models, adapters, commands.

- ``formats.py``: the format of a file, by its first bytes
- ``opening.py``: opening an image that is neither too large nor too slow to decode
"""
