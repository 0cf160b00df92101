"""The tab Queue: what runs, what waits and in which order, what has ended."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from nicegui import ui

from ...core.errors import ImagicError
from ..jobs import ENDED, Job
from ..studio import Studio
from ..supervisor import repeatable, resumable
from .jobview import STATES, JobView, Use

_SHOWN = 50  # jobs that have ended


class QueueTab:
    """All jobs.

    Args:
        studio: the studio.
        use: called with the metadata of an image by "Use these again".
    """

    def __init__(self, studio: Studio, use: Use) -> None:
        self._studio, self._use = studio, use
        self._seen: Any = None
        self._problem = ui.label().classes("problem").props('role="alert"')
        self._problem.visible = False
        self._running = ui.element("div").classes("field")
        self._shown_ids: list[str] = []
        self._list = ui.element("div").classes("field")
        self._update()
        ui.timer(0.7, self._update)

    def _update(self) -> None:
        """Shows the jobs if one of them has changed."""
        jobs = self._studio.queue.jobs()
        seen = [(job.id, job.state, job.place) for job in jobs]
        if seen == self._seen:
            return
        self._seen = seen
        running = [job for job in jobs if job.state == "running"]
        shown = [job.id for job in running]
        if running and not set(shown) <= set(self._shown_ids):  # those that have ended stay until another one runs
            self._shown_ids = shown
            self._running.clear()
            with self._running:
                for job in running:
                    JobView(self._studio, job, self._use)
        self._list.clear()
        with self._list:
            waiting = self._studio.queue.waiting()
            ready = {job.id for job in self._studio.queue.ready()}
            ui.label(f"Waiting ({len(waiting)})").classes("heading").props('role="heading" aria-level="2"')
            for index, job in enumerate(waiting):
                self._waiting(job, index, len(waiting), job.id in ready)
            ended = [job for job in reversed(jobs) if job.state in ENDED]
            ui.label(f"Ended ({len(ended)})").classes("heading").props('role="heading" aria-level="2"')
            for job in ended[:_SHOWN]:
                self._ended(job)

    def _waiting(self, job: Job, index: int, count: int, ready: bool) -> None:
        queue, held = self._studio.queue, "" if ready else " (waits for another job of this adapter)"
        with ui.row().classes("line"):
            ui.label(f"{index + 1}. {job.kind} {job.title[:60]}{held}").classes("grow")
            buttons: list[tuple[str, str, Callable[[], Any], bool]] = [
                ("Earlier", "Move up", lambda: queue.move(job.id, -1), index > 0),
                ("Later", "Move down", lambda: queue.move(job.id, 1), index < count - 1),
                ("Cancel", "Cancel", lambda: self._studio.supervisor.cancel(job.id), True),
            ]
            for label, what, action, enabled in buttons:
                button = ui.button(label, on_click=partial(self._do, action)).props("flat dense")
                button.props(f'aria-label="{what}: {job.kind}"').set_enabled(enabled)

    def _ended(self, job: Job) -> None:
        text = job.problem.got if job.problem else job.message
        with ui.row().classes("line"):
            ui.label(f"{job.kind} {job.title[:60]}: {STATES[job.state]}" + (f" ({text[:300]})" if text else "")).classes("grow")
            if job.kind != "unreadable":
                ui.button("Show", on_click=lambda: self._show(job)).props("flat dense")
            if repeatable(job):
                label = "Resume" if resumable(self._studio.queue, job) else "Run again"
                ui.button(label, on_click=lambda: self._do(lambda: self._studio.supervisor.resume(job.id))).props("flat dense")
            ui.button("Delete", on_click=lambda: self._do(lambda: self._studio.queue.remove(job.id))).props("flat dense")

    def _show(self, job: Job) -> None:
        with ui.dialog().props('aria-label="Job"') as dialog, ui.card().classes("picture"):
            ui.button("Close", on_click=dialog.close).props("outline")
            JobView(self._studio, job, lambda metadata: (dialog.close(), self._use(metadata)))
        dialog.on("hide", dialog.delete)
        dialog.open()

    def _do(self, action: Callable[[], Any]) -> None:
        """Does what a button says, and shows its error."""
        self._problem.visible = False
        try:
            action()
        except ImagicError as error:
            self._problem.text, self._problem.visible = str(error), True
        self._update()
