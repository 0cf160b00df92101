"""The commands, one file for each group. A command imports torch and diffusers inside its function, and only if it needs them.

May import: every room. Only ``cli/app.py``, the worker of the studio and the tests import it.

- ``fit.py``: fit
- ``batch.py``: batch
- ``edit.py``: edit
- ``sweep.py``: sweep
- ``compare.py``: compare
- ``methods.py``: methods
- ``reproduce.py``: reproduce
- ``store.py``: list, show, verify, rename, rm
- ``importing.py``: import
- ``convert.py``: compress, export
- ``plan.py``: plan
- ``bases.py``: bases
- ``bench.py``: bench
- ``field.py``: bench tedbench, bench pie, bench score
- ``study.py``: study
- ``demo.py``: demo
- ``doctor.py``: doctor
- ``web.py``: web
"""
