"""What ``compare`` does, called by ``commands/compare.py``; the benchmarks use its settings and predictions too.

May import: every room but ``web``. Must not know: ``commands/``.

- ``models.py``: the captioner, and the models that score the edits
- ``setup.py``: settings, base and predictions
- ``running.py``: the run with its progress, and the files
"""
