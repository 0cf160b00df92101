"""A job, live: it reads the events on disk, so that it shows the same after a reload, in another tab, or after a restart of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nicegui import ui

from ...core.errors import ImagicError
from ...core.text import duration
from ..jobs import ENDED, Job, Kind
from ..running import OUTPUT
from ..studio import Studio
from ..supervisor import repeatable, resumable
from .forms import Form
from .picture import show_picture, thumbnail
from .sweepview import show_sweep

_EVERY = 0.5  # seconds between two looks
_POINTS = 600  # of a curve that is shown
Use = Callable[[dict[str, Any]], Any]
"""Called with the metadata of an image."""
STATES = {
    "queued": "waits", "running": "runs", "done": "done", "failed": "failed",
    "crashed": "crashed", "stopped": "stopped", "cancelled": "cancelled",
}  # fmt: skip


class JobPlace:
    """Where a tab shows its job. After a reload the last job of its kind is there again, or the one that runs.

    Args:
        studio: the studio.
        kind: of the jobs that are shown after a reload; None for none.
        use: as for :class:`JobView`.
        form: whose field shows the error of a job that is submitted here and fails.
        ended: as there, for jobs that are submitted here.
        guide: as for :meth:`guide`.
    """

    def __init__(
        self,
        studio: Studio,
        kind: str | None,
        use: Use,
        form: Form | None = None,
        ended: Callable[[], Any] = int,
        guide: Sequence[str] = (),
    ) -> None:
        self._studio, self._use, self._form, self._ended = studio, use, form, ended
        self._element = ui.element("div").classes("result")
        self._empty = True
        jobs = [job for job in studio.queue.jobs() if job.kind == kind]
        if jobs:
            self._show(next((job for job in jobs if job.state == "running"), jobs[-1]))
        self.guide(guide)

    def guide(self, sentences: Sequence[str]) -> None:
        """Shows sentences until there is a job: what the tab does, in the order in which it is done."""
        if not self._empty or not sentences:
            return
        self._element.clear()
        with self._element, ui.element("section").classes("guide").props('aria-label="What happens here"'):
            ui.label("What happens here").classes("heading")
            with ui.element("ol"):
                for text in sentences:
                    with ui.element("li"):
                        ui.label(text)

    def submit(self, kind: Kind, arguments: dict[str, Any]) -> None:
        """Adds a job to the queue, and shows it in the place of the last one.

        Raises:
            ImagicError: as :meth:`~imagic_lora.web.jobs.Queue.submit`.
        """
        self._show(self._studio.queue.submit(kind, arguments))

    def _show(self, job: Job) -> None:
        self._empty = False
        self._element.clear()
        with self._element:
            JobView(self._studio, job, self._use, self._done)

    def _done(self, job: Job) -> None:
        if self._form and job.problem:
            self._form.mark(job.problem.error())
        self._ended()


class JobView:
    """What is shown of a job. It updates itself until the job has ended.

    Args:
        studio: the studio.
        job: the job.
        use: called with the metadata of an image by "Use these again".
        ended: called once when the job has ended while it was shown.
    """

    def __init__(
        self,
        studio: Studio,
        job: Job,
        use: Use,
        ended: Callable[[Job], Any] = lambda job: None,
    ) -> None:
        self._studio, self._id, self._use, self._ended = studio, job.id, use, ended
        self._offset, self._shown, self._state = 0, set[str](), ""
        self._warned = set[str]()
        self._points: dict[str, list[list[float]]] = {}
        self._chart: ui.echart | None = None
        with ui.element("section").classes("job").props(f'aria-label="Job {job.kind}"'):
            self._heading = ui.label().classes("heading")
            self._bar = ui.linear_progress(value=0, show_value=False).props('instant-feedback aria-label="Progress"')
            self._text = ui.label().classes("live").props('role="status"')
            self._message = ui.label().classes("problem").props('role="alert"')
            self._warnings = ui.column()
            self._buttons = ui.row().classes("buttons")
            self._curves = ui.element("div").classes("field")
            self._strip = ui.row().classes("strip")
            self._grid = ui.row().classes("grid")
        self._message.visible = False
        self._timer = ui.timer(_EVERY, self.update)
        self.update()

    def update(self) -> None:
        """Shows what is new."""
        try:
            job = self._studio.queue.read(self._id)
        except ImagicError:
            self._heading.text = "This job was deleted."
            self._timer.deactivate()
            return
        while True:
            events, offset = self._studio.queue.events(self._id).read(self._offset)
            for event in events:
                self._add(event)
            if offset == self._offset:
                break
            self._offset = offset
        self._draw_curves()
        self._show_images()
        if job.state != self._state:
            first = not self._state
            self._state = job.state
            self._show_state(job)
            if job.state in ENDED:
                self._timer.deactivate()
                if not first:
                    self._ended(job)

    def _add(self, event: dict[str, Any]) -> None:
        """Shows an event."""
        left = "" if event.get("left") is None else f", {duration(event['left'])} left"
        if event["kind"] == "step":
            stages = event["stages"]
            before = sum(steps for name, steps in stages.items() if list(stages).index(name) < list(stages).index(event["stage"]))
            self._bar.value = (before + event["step"]) / sum(stages.values())
            relative = f", relative loss {event['relative']:.2f}" if "relative" in event else ""
            early = ": ends early, the relative loss no longer falls" if event["early_stop"] else ""
            self._text.text = (
                f"Stage {event['stage']}, step {event['step']} of {event['steps']}, loss {event['loss']:.4f}{relative}{left}{early}"
            )
            at = before + event["step"]
            self._points.setdefault(f"loss, {event['stage']}", []).append([at, event["loss"]])
            if "relative" in event:
                self._points.setdefault("relative loss", []).append([at, event["relative"]])
            if "preview" in event:
                with self._strip:
                    self._picture(event["preview"], f"Preview after step {event['step']}")
        elif event["kind"] == "progress":
            self._bar.value = event["done"] / event["total"] if event["total"] else 1
            self._text.text = f"{event['label']}: {event['done']:g} of {event['total']:g}{left}"
        elif event["text"] not in self._warned:
            self._warned.add(event["text"])
            with self._warnings:
                ui.label(f"Warning: {event['text']}").classes("warning")

    def _draw_curves(self) -> None:
        """Draws the losses."""
        if not self._points:
            return
        series = [
            {"name": name, "type": "line", "data": points[:: len(points) // _POINTS + 1], "showSymbol": name == "relative loss"}
            for name, points in self._points.items()
        ]
        if self._chart is None:
            axes = {"xAxis": {"type": "value", "name": "step"}, "yAxis": {"type": "log", "name": "loss"}, "animation": False}
            options = {**axes, "tooltip": {"trigger": "axis"}, "legend": {"top": 0}, "grid": {"left": 60, "right": 40}, "series": series}
            with self._curves:
                self._chart = ui.echart(options).classes("chart").props('role="img" aria-label="Loss over steps"')
        elif self._chart.options["series"] != series:
            self._chart.options["series"] = series
            self._chart.update()

    def _show_images(self) -> None:
        """Adds the images that are new in the folder of the job."""
        folder = self._studio.queue.folder(self._id)
        found = [*(folder / OUTPUT).glob("*.png"), *(folder / OUTPUT / "images").glob("*.png")]
        for path in sorted(found, key=lambda path: path.stat().st_mtime):
            if path.name not in self._shown and path.stat().st_size:
                self._shown.add(path.name)
                with self._grid:
                    self._picture(str(path.relative_to(folder)), path.stem)

    def _picture(self, name: str, label: str) -> None:
        """An image as a button that opens it."""
        thumbnail(f"/jobs/{self._id}/{name}", label, lambda: self._open(name))

    def _open(self, name: str) -> None:
        """Opens an image of the job in full size."""
        show_picture(self._studio.queue.folder(self._id) / name, f"/jobs/{self._id}/{name}", self._before(), self._use)

    def _before(self) -> str | None:
        """The address of the photo that the images of an edit came from."""
        job = self._studio.queue.read(self._id)
        if job.kind not in ("edit", "sweep"):
            return None
        uploaded = job.arguments.get("photo")
        return f"/{uploaded}" if uploaded else f"/adapters/{job.arguments['name']}/photo"

    def _show_state(self, job: Job) -> None:
        """Shows the state, the message and the buttons of the job."""
        took = f", {duration(job.ended - job.started)}" if job.ended and job.started else ""
        card = self._studio.supervisor.name_of(job)
        self._heading.text = f"{job.kind} {job.title[:80]}: {STATES[job.state]}{took}{f' ({card})' if card else ''}"
        self._bar.visible = job.state in ("queued", "running")
        self._message.text = str(job.problem.error()) if job.problem else job.message
        self._message.visible = bool(self._message.text)
        self._buttons.clear()
        queue, supervisor = self._studio.queue, self._studio.supervisor
        with self._buttons:
            if job.state == "running":
                ui.button("Stop", on_click=lambda: self._do(lambda: supervisor.stop(job.id))).tooltip("Saves what is done")
            if job.state in ("queued", "running"):
                ui.button("Cancel", on_click=lambda: self._do(lambda: supervisor.cancel(job.id))).props("outline")
            if repeatable(job):
                label = "Resume" if resumable(queue, job) else "Run again"
                ui.button(label, on_click=lambda: self._do(lambda: self._again(job)))
            for file in (job.result or {}).get("files", []) if job.kind == "export" else ():
                name = Path(file).relative_to(queue.folder(job.id))
                ui.link(f"Download {name.name}", f"/jobs/{job.id}/{name}?download=1")
            if job.kind == "compare" and job.state == "done":
                ui.link("Open the page of the comparison", f"/jobs/{job.id}/{OUTPUT}/index.html", new_tab=True)
        if job.kind == "sweep" and job.result:
            self._grid.clear()
            with self._curves:
                show_sweep(job.result, f"/jobs/{job.id}", self._open)

    def _again(self, job: Job) -> None:
        """Follows the job that continues this one."""
        self._id = self._studio.supervisor.resume(job.id).id
        self._offset, self._state, self._shown, self._points = 0, "", set(), {}
        self._warned.clear()
        self._text.text = ""
        for element in (self._grid, self._strip, self._curves, self._warnings):
            element.clear()
        self._chart = None
        self._timer.activate()

    def _do(self, action: Callable[[], Any]) -> None:
        """Does what a button says, and shows its error."""
        try:
            action()
        except ImagicError as error:
            self._message.text, self._message.visible = str(error), True
        self.update()
