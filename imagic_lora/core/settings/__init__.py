"""The settings of a run: the sources that fill the models of ``core/config.py``, their merging, and the checks of the result.

May import: the rest of core. Must not know: photos, models, methods, commands.

- ``resolve.py``: merges all sources into the settings of a run
- ``recipes.py``: recipes of bases
- ``presets.py``: presets of cards
- ``merging.py``: merges nested mappings, and names their differences
- ``reading.py``: validates settings, of a YAML file or any source
- ``clashes.py``: settings that exclude each other
- ``unread.py``: settings that the method of a fit does not read
"""
