"""Benchmarks: methods on cases, scored.

May import: everything but the command line. Must not know: who asked.

- ``critters.py``: CritterBench: every method on every case, resumable
- ``cases.py``: its cases: a photo, a target prompt, the true edit
- ``catalogue.py``: the methods by name, and the reference recipes beside this file
- ``scores.py``: what an edit is worth
- ``metrics.py``: PSNR, SSIM, and the CLIP of the embedded world
- ``summary.py``: means and their intervals
- ``page.py``: tables, and the HTML page
- ``worker.py``: the start of a worker process
"""
