"""The studio in the browser (extra ``web``): ``imagic-lora web``. It may import every other room; only the command imports it.
The server never imports torch: worker processes run models, and they call the functions of the command line.

- ``jobs.py``: a job, and the queue of jobs in the store's folder
- ``places.py``: where workers run: one place for each card
- ``worker.py``: a process that runs one job after another
- ``running.py``: one job: the call of the command's function, its progress as events
- ``supervisor.py``: starts the workers, stops and cancels their jobs, explains how they ended
- ``studio.py``: what the pages share
- ``uploads.py``: uploaded photos and masks, painted masks, and their previews
- ``fields.py``: the fields of a form, from the settings models and the functions of the commands
- ``masks.py``: the mask of a photo, which later edits start with
- ``planning.py``: the memory plan, by a process of its own
- ``guard.py``: who may speak to the server
- ``server.py``: the server: addresses of images, the page
- ``pages/``: the page: one file a tab
"""
