"""Stages 1 and 2: a photo and a target prompt to a stored adapter.

May import: core, photos, bases, memory, adapters, sampling (for the preview). Must not know: methods, benchmarks, commands.

- ``fit.py``: fit(), the story: check, open, encode, embed, tune, preview, store
- ``configure.py``: the settings of a run from what was given
- ``objective.py``: the denoising loss
- ``stage.py``: what a stage is, and the one loop that drives it
- ``embed.py``: stage 1, the text embedding
- ``tune.py``: stage 2, the denoiser
- ``optimizers.py``: Adam in 32 or 8 bits, after or inside the backward pass
- ``run.py``: photo, prompt and base of one fit, encoded; what it leaves in the store
- ``saving.py``: checkpoints, stopping and resuming, around the loop
- ``checkpoints.py``: checkpoints on the disk
- ``rehearsal.py``: the exact memory plan: the real code on tensors without values
"""
