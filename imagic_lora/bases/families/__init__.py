"""Model families, one file per family.

May import: core, bases. Must not know: adapters, training, sampling, commands.

- ``sd.py``: Stable Diffusion 1.x and 2.x
- ``sdxl.py``: Stable Diffusion XL
"""
