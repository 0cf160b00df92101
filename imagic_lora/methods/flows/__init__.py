"""Methods for flows alone, which walk the levels of Euler's method.

May import: core, photos, bases, sampling, and the files above this folder. Must not know: benchmarks, commands.

- ``walking.py``: the common form of the methods: the levels, and guided velocities
- ``flowedit.py``: FlowEdit, which integrates the difference of two velocities
- ``rf_inversion.py``: RF-Inversion, which is pulled to a noise on the way up and to the photo on the way down
"""
