"""What this machine measures: peak memory and speed of every stage of a fit, beside the predictions.

May import: every room but fleet and cli. Must not know: how the figures are shown. Only ``stages.py`` and ``__main__.py`` import torch.

- ``runs.py``: the runs that fit the machine, by mode and preset, with their plans
- ``stages.py``: measures the stages of one run
- ``__main__.py``: the process that does it, one for each run
- ``process.py``: starts that process, and ends it when its time is up
- ``report.py``: the report as JSON and Markdown
"""
