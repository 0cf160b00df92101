"""The page, in NiceGUI: what it shows and what its buttons call. Nothing here knows a setting, a limit or a default.

- ``page.py``: the header, the tabs, colours and styles
- ``forms.py``: a form from settings; errors beside the field that they name
- ``photos.py``: the fields that take photos, with their previews and a region
- ``masking.py``: the field that takes a mask: the brush and its tools, or a file
- ``drawing.js``: the photo that the pointer draws on
- ``drafts.py``: a half-filled form survives a reload, in the browser
- ``choice.py``: the gallery of adapters
- ``jobview.py``: a job while it runs and when it has ended: progress, curve, previews, images, buttons
- ``sweepview.py``: the result of a sweep: plot and table, whose points and cells open their images
- ``picture.py``: one image in full size: its settings, before and after, download
- ``fit.py``, ``queue.py``, ``edit.py``, ``sweep.py``, ``compare.py``, ``adapters.py``: one tab each
"""
