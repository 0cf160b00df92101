"""Several methods on one photo: what each needs and costs, their edits and scores, one sheet and one page.

May import: as methods. Must not know: benchmarks, commands.

- ``candidates.py``: the methods that can run, with predicted passes and memory, and why others are left out
- ``running.py``: runs the candidates one after another, and scores their edits
- ``report.py``: the sheet, the HTML page (template ``page.html``) and the results as JSON
- ``captions.py``: a caption of the photo by a model of transformers
"""
