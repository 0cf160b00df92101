"""Ways to edit an image, behind one contract.

May import: core, photos, bases, memory, adapters, sampling, training. Must not know: benchmarks, commands.

- ``method.py``: the contract, and what an edit costs
- ``imagic.py``: Imagic at any settings
- ``untuned.py``: the target prompt alone, and image to image (SDEdit)
- ``bounds.py``: the photo itself; the true edit through the VAE
"""
