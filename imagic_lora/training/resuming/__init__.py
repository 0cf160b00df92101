"""Saving, stopping and resuming the stages of a fit.

May import: what training may import, and the stages. Must not know: how a fit is put together (``fit.py``).

- ``stages.py``: saves, stops and resumes the stages around the training loop
- ``interrupting.py``: stops a fit while images are sampled
- ``checkpoints.py``: reads and writes checkpoints on disk
- ``unfinished.py``: what is left of an unfinished fit of a name, before a fit starts and after it
"""
