"""A U-Net and a VAE on tensors that have a size and no values: the peak memory of a pass in milliseconds. No torch here.

May import: core, bases. Must not know: training, sampling, commands.

- ``tape.py``: a symbolic tensor, and a tape that saves and frees tensors as autograd does
- ``layers.py``: the layers of the models
- ``unet.py``: the U-Net
- ``vae.py``: encoder and decoder of the VAE
"""
