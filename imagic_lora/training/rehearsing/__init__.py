"""The exact memory plan: runs the real code on fake tensors.

May import: the rest of training, core, bases, memory, adapters. Must not know: commands.

- ``rehearsal.py``: runs the stages of a fit, and makes the plan of what was counted
- ``peaks.py``: the peak of a training stage, of sampling and of decoding
- ``random_base.py``: bases of true size with random weights
- ``fake_tensors.py``: makes fake tensors on the CPU act as tensors on CUDA do
"""
