"""The benchmarks of the field, TEdBench and PIE-Bench, and pictures that anybody made.

May import: as bench. Must not know: commands.

- ``cases.py``: a case (photo, prompts, mask) and a picture (the edit of a case); masks; reading both
- ``tedbench.py``: the layout of TEdBench, and of the outputs that were published for it
- ``pie.py``: the layout of PIE-Bench, and of the outputs of its own code
- ``listed.py``: a list of pictures, CSV or JSONL
- ``run.py``: runs methods on cases
- ``scoring.py``: scores pictures, and keeps the scores so that an interrupted run can resume
- ``summary.py``: means with intervals over photos
- ``report.py``: the tables, the files, the sheet and the page (template ``page.html``)
"""
