"""A form from settings: every field empty until somebody gives a value, with its default shown; errors stand beside their field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement

from ...core.errors import ImagicError
from ..fields import Setting, arguments_of, field_of, nested, value_at

_HINT = 130  # letters below a field


class Form:
    """Fields by name, and where errors are shown.

    Attributes:
        fields: the elements by name; the name of a setting is its path.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self._flags: dict[str, str] = {}
        self._banner: ui.label | None = None
        self._settings: dict[str, Setting] = {}
        self._hidden: set[str] = set()
        self._arguments: dict[str, Setting] = {}

    def text(self, name: str, label: str, hint: str = "", flag: str | None = None, value: str = "", **options: Any) -> ui.input:
        """Adds a field of text.

        Args:
            name: its name.
            label: its label.
            hint: the line below it.
            flag: the flag of the command line, by which errors name it.
            value: what it holds at first.
            options: of NiceGUI's ``ui.input``.
        """
        element = ui.input(label, value=value, **options).props(f'outlined dense for="{name}"').classes("field")
        _hint(element, hint)
        return self.add(name, element, flag)

    def add(self, name: str, element: Any, flag: str | None = None) -> Any:
        """Adds an element that holds a value."""
        self.fields[name], self._flags[name] = element, flag or f"--{name.replace('_', '-')}"
        return element

    def settings(self, settings: Sequence[Setting], change: Callable[[], Any] | None = None, values: Any = None) -> None:
        """Adds a field for each setting.

        Args:
            settings: the settings.
            change: called when a value changes.
            values: a model that holds the defaults to show; None shows the built-in ones.
        """
        for setting in settings:
            default = setting.default if values is None else value_at(values, setting.path)
            self._settings[setting.path] = setting
            element = _element(setting, default, change)
            self.add(setting.path, element, setting.flag)

    def arguments(self, function: Callable[..., Any], *names: str) -> None:
        """Adds a field for each of these arguments of the function of a command."""
        for argument in arguments_of(function, names):
            self._arguments[argument.path] = argument
            self.add(argument.path, _element(argument, argument.default, None), argument.flag)

    def given_arguments(self) -> dict[str, Any]:
        """Returns the arguments that were given.

        Raises:
            ImagicError: a number is not whole where only whole numbers are allowed.
        """
        return self._values(self._arguments)

    def show_defaults(self, values: Any, but: Sequence[str] = ()) -> None:
        """Shows other defaults.

        Args:
            values: a model that holds them.
            but: paths of settings whose shown default stays.
        """
        for path, setting in self._settings.items():
            if path not in but and path.split(".")[0] not in but:
                _show_default(self.fields[path], setting, value_at(values, path))

    def given(self) -> dict[str, Any]:
        """Returns the settings that were given, nested as in a YAML file.

        Raises:
            ImagicError: as :meth:`given_arguments`.
        """
        return nested(self._values({path: one for path, one in self._settings.items() if path not in self._hidden}))

    def offer(self, reads: Callable[[str], bool]) -> set[str]:
        """Shows the settings that are read, and hides the others, which are then not given. Returns the paths of those that are shown.

        Args:
            reads: whether a setting is read, by its path.
        """
        self._hidden = {path for path in self._settings if not reads(path)}
        for path in self._settings:
            self.fields[path].visible = path not in self._hidden
        return set(self._settings) - self._hidden

    def _values(self, settings: dict[str, Setting]) -> dict[str, Any]:
        """What the fields of these settings hold; nothing for an empty field."""
        found = {path: _value(setting, self.fields[path].value) for path, setting in settings.items()}
        return {path: value for path, value in found.items() if value is not None}

    def set(self, values: dict[str, Any]) -> None:
        """Gives settings by path; the others become empty."""
        for path, setting in self._settings.items():
            value = values.get(path)
            self.fields[path].value = ("yes" if value else "no") if setting.kind == "bool" and value is not None else value

    def banner(self) -> None:
        """Places the text of errors that name no field of the form."""
        self._banner = ui.label().classes("problem").props('role="alert"')
        self._banner.visible = False

    def clear(self) -> None:
        """Removes all errors."""
        for element in self.fields.values():
            if isinstance(element, ValidationElement):
                element.error = None
        if self._banner:
            self._banner.visible = False

    def show(self, error: ImagicError) -> None:
        """Shows an error beside the field that it names, otherwise in the banner."""
        if not self.mark(error) and self._banner:
            self._banner.text, self._banner.visible = str(error), True

    def mark(self, error: ImagicError) -> bool:
        """Shows an error beside the field that it names; returns whether it names one."""
        self.clear()
        name = field_of(error.got, self._flags)
        field = self.fields[name] if name else None
        if isinstance(field, ValidationElement):
            field.error = str(error)
        return isinstance(field, ValidationElement)


def _element(setting: Setting, default: Any, change: Callable[[], Any] | None) -> Any:
    """The element of a setting."""
    if setting.kind in ("choice", "bool"):
        options = {None: "", **{name: name for name in (setting.choices or ("yes", "no"))}}
        element: Any = ui.select(options, label=setting.label, value=None, on_change=change)
    elif setting.kind in ("int", "float"):
        low, high = (None if value is None or abs(value) > 2**53 else value for value in (setting.low, setting.high))
        step = 1 if setting.kind == "int" else None
        element = ui.number(setting.label, min=low, max=high, step=step, precision=0 if step else None, on_change=change)
        element.props("clearable")
    elif setting.kind == "lines":
        element = ui.textarea(setting.flag.removeprefix("--"), on_change=change).props("clearable autogrow")
    else:
        element = ui.input(setting.label, on_change=change).props("clearable")
    element.props(f'outlined dense debounce="400" for="{setting.path}"').classes("field")
    _hint(element, setting.help)
    _show_default(element, setting, default)
    return element


def _value(setting: Setting, value: Any) -> Any:
    """The value of a field; None for an empty one.

    Raises:
        ImagicError: it is not a whole number, but has to be.
    """
    value = value.strip() if isinstance(value, str) else value
    if value in (None, ""):
        return None
    if setting.kind == "int":
        if int(value) != value:
            raise ImagicError(f"{setting.flag} {value:g}", "a whole number", "choose another number")
        return int(value)
    if setting.kind == "lines":
        return [line.strip() for line in value.splitlines() if line.strip()]
    return value == "yes" if setting.kind == "bool" else value


def _show_default(element: Any, setting: Setting, default: Any) -> None:
    """Shows the default of a setting in its empty field."""
    shown = {True: "yes", False: "no"}.get(default, default) if setting.kind == "bool" else default
    text = "" if shown in (None, "") else f"{shown:g}" if isinstance(shown, float) else str(shown)
    if isinstance(element, ui.select):
        element.set_options({None: f"default: {text}", **{name: name for name in setting.choices or ("yes", "no")}})
        element.props("stack-label")
    else:
        element.props(f'stack-label placeholder="{text}"')


def _hint(element: Any, text: str) -> None:
    """The first sentences of a help text below a field, and all of it where the pointer rests."""
    if text:
        first, *others = text.rstrip(".").split(". ")
        while others and len(first) + len(others[0]) < _HINT:
            first += f". {others.pop(0)}"
        element.props["hint"] = first
        if others:
            with element:
                ui.tooltip(text).classes("help")
