"""Many photos: a list is checked, and its photos are fitted and edited one after another, or by Ray on several devices (extra ``ray``).

May import: core, photos, bases, memory, adapters, sampling, training. Must not know: methods, benchmarks, commands.

- ``lists.py``: reads a list: CSV, JSONL, YAML, or a folder
- ``columns.py``: the columns of a list, which are the settings of a fit
- ``table.py``: the checked entries of a list
- ``work.py``: fits and edits a group of photos
- ``outcome.py``: what came of a photo; whether the adapter that a line asks for is stored
- ``batch.py``: what of a list is done and what is left; the results
- ``sheet.py``: the contact sheet (template ``page.html``)
- ``on_ray.py``: the same work in actors of Ray; alone imports ray
"""
