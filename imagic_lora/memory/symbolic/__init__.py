"""A U-Net and a VAE as tensors that have sizes only: the memory of a forward and a backward pass in milliseconds. No torch here.

May import: core, bases. Must not know: training, sampling, commands.

- ``tape.py``: a tensor with a size only, and a tape that keeps and frees as autograd does
- ``layers.py``: the layers of the models
- ``unet.py``: a U-Net
- ``vae.py``: half a VAE
"""
