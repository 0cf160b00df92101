"""The commands, one file a group. Each imports torch and diffusers only when it runs, if it needs them at all.

May import: everything. Only ``cli/app.py`` imports it.

- ``fit.py``: fit
- ``edit.py``: edit
- ``store.py``: list, show, verify, rm
- ``convert.py``: compress, export
- ``plan.py``: plan
- ``bases.py``: bases
- ``bench.py``: bench
- ``demo.py``: demo
- ``doctor.py``: doctor
"""
