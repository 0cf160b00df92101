"""Stages 1 and 2, or stage 1 alone in mode embedding: from a photo and a target prompt to a stored adapter.

May import: core, photos, bases, memory, adapters, sampling (for the preview). Must not know: methods, benchmarks, commands.

- ``fit.py``: fit(), the whole sequence: check, open, encode, embed, tune, preview, store
- ``together.py``: fit_together(), the same sequence for several photos at once
- ``member.py``: the fit of one photo of such a group
- ``grouping.py``: the photos that are fitted together, sorted by the size of their canvas
- ``shared.py``: stages of several fits in step, with one call of the denoiser for all
- ``configure.py``: merges flags, file, preset and recipe into the settings of a run
- ``inputs.py``: the photos and the prompt of a fit, checked by what its method needs
- ``objective.py``: the denoising loss
- ``stage.py``: the training stage, and the training loop of both stages
- ``embed.py``: stage 1, optimises the text embedding
- ``tune.py``: stage 2, trains the denoiser
- ``prior.py``: DreamBooth, the class pictures and stage 2 beside them
- ``word.py``: textual inversion, the stage that trains the vectors of a new word
- ``updating/``: the optimizers, after or during the backward pass
- ``encode.py``: encodes photo and prompt
- ``run.py``: the state of one fit with its encoded inputs, and the files it writes to the store
- ``monitoring/``: relative loss and early stopping, previews during stage 2, TensorBoard
- ``resuming/``: checkpoints on disk; saving, stopping and resuming the stages around the training loop
- ``rehearsing/``: the exact memory plan: runs the real code on fake tensors
"""
