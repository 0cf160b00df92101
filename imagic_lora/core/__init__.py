"""The base layer: errors, settings, device and precision, noise, conditioning.

May import: no other room, and no diffusers, transformers or peft. Must not know: photos, models, methods, commands.

- ``errors.py``: ImagicError, which the user can fix, NotFinite, Stopped and ImagicWarning
- ``config.py``: every setting and its default, as pydantic models
- ``device_config.py``: the same for device, precision and memory levers
- ``config_group.py``: what every group of settings has in common
- ``settings/``: recipes of bases, presets of cards, and the merging of all sources
- ``yaml_files.py``: YAML files, without duplicate keys and values that YAML 1.1 and 1.2 read differently
- ``validation.py``: the errors of pydantic in plain words
- ``machine.py``: the card, the free memory and bitsandbytes of this machine, without importing torch
- ``choices.py``: the values that ``auto`` stands for on a machine, with reasons, without importing torch
- ``launch.py``: the environment variables of ``accelerate launch``
- ``environment.py``: log levels of the libraries, set before they are imported
- ``runtime.py``: device and dtype as torch types, memory of a device, the processes of a distributed run
- ``noise.py``: noise and times as pure functions of seed, stage, step and sample
- ``text.py``: the check that text is UTF-8, text as a part of a file name, numbers and durations as text
- ``conditioning.py``: the encoded prompt, and the interpolation by eta
- ``tensors.py``: reading and writing safetensors files of finite numbers
"""
