"""The user study: raters choose between two edits of a photo (Imagic, arXiv 2210.09276, appendix C).

May import: core, photos, adapters (durable files); no torch. Must not know: how the edits were made.

- ``results.py``: the edits of a finished run of a benchmark, or of a comparison
- ``planning.py``: what each rater sees: questions, order, sides, the repeated question
- ``key.py``: the key of a study, which names the methods, and the file of answers; both checked
- ``page.py``: the page that raters open (template ``page.html``)
- ``rates.py``: preference rates, their intervals, careless raters
"""
