"""The notebook of the guide: the whole of it on the embedded base; what is in git has no outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

from imagic_lora.critters import render, scene_at

NOTEBOOK = Path(__file__).parents[2] / "docs/guide/notebook.ipynb"
CHOSEN = {
    "BASE": "critters", "PHOTO": "photo.png", "PROMPT": "a dog jumping", "PRESET": "cpu", "DTYPE": "auto",
    "SWEEP": ["--eta", "0.4:1:0.2", "--seeds", "1"], "SOURCE": "",
}  # fmt: skip


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def with_values(notebook: Any, values: dict[str, Any]) -> Any:
    """The notebook with other values in its cell of parameters; nothing else is changed."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source, flags=re.MULTILINE)
        assert count == 1, name
    return notebook


def test_the_notebook_in_git_has_no_outputs() -> None:
    """It is valid and small, and the page links lead to pages of the guide."""
    notebook = read()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert NOTEBOOK.stat().st_size < 30_000
    links = [link for cell in notebook.cells if cell.cell_type == "markdown" for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_whole_notebook_runs_on_the_embedded_base(tmp_path: Path) -> None:
    """From the first cell to the archive, on a CPU. Every cell that shows pictures has some."""
    from nbclient import NotebookClient  # its import takes a while, and only this test needs it

    render(scene_at("demo", 105)).save(tmp_path / "photo.png")
    notebook = with_values(read(), CHOSEN)
    NotebookClient(notebook, timeout=1500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert shown == [0, 0, 0, 1, 0, 0, 2, 2, 1, 0]
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "\x1b" not in text  # no bars and colours of a terminal
    assert re.search(r"Host memory: \d+\.\d GiB are predicted, \d+\.\d GiB are free", text)
    assert re.search(r"eta \d\.?\d* \(suggested\), seed 0", text)
    (edit,) = (tmp_path / "outputs/rex").glob("eta*-seed0.png")
    with Image.open(edit) as image:
        assert image.size == (64, 64)
    assert (tmp_path / "rex-home.zip").stat().st_size > 100_000
    assert (tmp_path / "rex-home/outputs/export/rex/embeddings.safetensors").is_file()
    nbformat.write(notebook, tmp_path / "executed.ipynb")
