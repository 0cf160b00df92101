"""What a run costs in memory, before it starts.

May import: core, bases. Must not know: training, sampling, commands. No torch but in ``tracker.py`` and ``out_of_memory.py``.

- ``plan.py``: the peak of every stage, predicted
- ``presets.py``: the preset that fits this machine
- ``levers.py``: memory levers in order of their cost in time, and what the next one saves
- ``limits.py``: a run that does not fit memory or disk is refused
- ``out_of_memory.py``: running out of memory, as an error that names the stage and the next lever
- ``symbolic/``: models as tensors that have sizes only
- ``optimizer_states.py``: bytes of Adam's 8-bit states
- ``tracker.py``: bytes of all tensors, counted as a run goes on
"""
