"""What a training step does after the loss: the backward pass and the optimizers.

May import: the rest of training, core, memory. Must not know: commands.

- ``updates.py``: updates of parameters, after or during the backward pass
- ``optimizers.py``: optimizers by name, and the states of each as they are saved
- ``adafactor.py``: Adafactor, an optimizer with small states
"""
