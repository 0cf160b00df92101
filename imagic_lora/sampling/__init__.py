"""Stage 3: conditioning and denoiser to images.

May import: core, photos, bases, memory, adapters. Must not know: training, methods, commands.

- ``generate.py``: images from conditionings and seeds, in batches
- ``inversion.py``: the noise that gives the photo back: DDIM inversion, edit-friendly inversion
- ``pipelines.py``: calls of diffusers' pipelines
- ``checks.py``: what is checked before anything is sampled
- ``editor.py``: one base in memory, many adapters
"""
