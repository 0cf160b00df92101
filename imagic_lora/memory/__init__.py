"""Predicts the memory of a run before it starts, chooses the settings that fit, and explains a lack of memory.

May import: core, bases. Must not know: training, sampling, commands. Only ``tracker.py`` and ``out_of_memory.py`` use torch.

- ``plan.py``: the plan of a run: the peak of every stage, and what it assumes
- ``prediction.py``: predicts the plan of a run
- ``rehearsed.py``: peaks of flow transformers that were rehearsed before
- ``presets.py``: the preset that fits this machine
- ``levers.py``: memory levers in order of their cost in time, and the bytes that the next one saves
- ``limits.py``: checks that a run fits the memory and the disk
- ``out_of_memory.py``: converts an out-of-memory exception into an error that names the stage and the next lever
- ``symbolic/``: models on tensors that have a size and no values
- ``trained.py``: bytes of what a mode trains
- ``optimizer_states.py``: bytes of Adam's 8-bit states
- ``tracker.py``: counts the bytes of all tensors while code runs
"""
