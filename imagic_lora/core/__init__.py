"""The ground: errors, configs, device and precision, noise, conditioning.

May import: nothing of ours, and no diffusers, transformers or peft. Must not know: photos, models, methods, commands.

- ``errors.py``: ImagicError, which the user can mend, and ImagicWarning
- ``config.py``: every setting and its default, as pydantic models
- ``settings.py``: recipes of bases, presets of cards, YAML; how they are merged
- ``machine.py``: the card and the free memory of this machine, without torch
- ``choices.py``: what ``auto`` comes to there, with reasons, without torch
- ``environment.py``: environment variables of a process, set before a library is imported
- ``runtime.py``: device and dtype as torch types, memory of a device, processes
- ``noise.py``: noise and timesteps as functions of their key
- ``conditioning.py``: the encoded prompt, and eta
- ``tensors.py``: safetensors in and out, finite numbers only
"""
