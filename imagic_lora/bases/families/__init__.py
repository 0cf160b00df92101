"""Model families, one file per family.

May import: core, bases. Must not know: adapters, training, sampling, commands.

- ``common.py``: what all families share: devices, the VAE, tokenizers, loading
- ``flows.py``: what the flow families share: their pipeline
- ``sd.py``: Stable Diffusion 1.x and 2.x
- ``sdxl.py``: Stable Diffusion XL
- ``sd3.py``: Stable Diffusion 3 and 3.5, and their transformer with one CLIP text encoder
- ``klein.py``: FLUX.2 klein
"""
