"""The benchmarks of the field: their published layouts with every oddity, runs that resume, the files, and hostile folders."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import Run, array, each
from layouts import flags, save_models, scene, write_list, write_pie, write_tedbench
from models import save_captioner
from PIL import Image

import imagic_lora.bench.field.run as running
from imagic_lora.bench.evaluator.evaluator import Evaluator, Settings
from imagic_lora.bench.evaluator.sources import Sources
from imagic_lora.bench.field.cases import decoded_mask
from imagic_lora.bench.field.listed import read_pictures
from imagic_lora.bench.field.pie import pie_outputs, read_pie
from imagic_lora.bench.field.run import FieldBench
from imagic_lora.bench.field.scoring import scored
from imagic_lora.bench.field.tedbench import output_stem, read_tedbench, tedbench_outputs
from imagic_lora.bench.intervals import bootstrapped
from imagic_lora.core.config import RunConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.methods.method import Context, Cost, EditRequest, EditResult, Method, Passes
from imagic_lora.photos.reading import read_metadata

SDEDIT = ["--methods", "sdedit", "--set", "steps=2"]
PIXELS = Settings(Sources(("pixels",)), 64)


@pytest.fixture(scope="module")
def tedbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tedbench(tmp_path_factory.mktemp("field") / "tedbench")


@pytest.fixture(scope="module")
def pie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pie(tmp_path_factory.mktemp("field") / "pie")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def rows_in(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# layouts


def test_tedbench_is_read_as_published(tedbench: Path) -> None:
    """Names of outputs, prompts with their full stops; a JPEG named .png, RGBA and gray are RGB photos."""
    cases = read_tedbench(tedbench)
    assert [case.name for case in cases][:2] == ["bird.jpeg-A_bird_flies", "bird.png-A_bird_naps"]
    assert cases[4].name == "tree_1.jpeg-A_tree._Old"
    assert [case.prompt for case in cases][4:] == ["A tree. Old.", "A dead tree."]
    photos = [case.read_photo() for case in cases]
    assert {photo.mode for photo in photos} == {"RGB"}
    assert np.array_equal(array(photos[0]), array(photos[1]))
    assert array(photos[2])[0].min() >= 250  # what is transparent is white
    assert {(case.source_prompt, case.mask, case.group, case.problem) for case in cases} == {(None, None, None, None)}


def test_pie_is_read_as_published(pie: Path) -> None:
    """Without brackets, with classes; masks by runs, of which one is too long and one list is empty."""
    cases = read_pie(pie)
    assert [(case.name, case.source_prompt, case.prompt, case.group) for case in cases] == [
        ("000000000000", "a red cat", "a blue cat", "random"),
        ("111000000000", "a cat", "a dog", "change object"),
        ("922000000001", "a cat and a dog", "a cat", "change style"),
    ]
    expected = np.zeros((3, 512, 512), int)
    expected[0, 100:102, 50:250], expected[1, 400:] = 255, 255
    for case, mask in zip(cases, expected, strict=True):
        found = case.read_mask(case.read_photo().size)
        assert found is not None
        assert np.array_equal(array(found), mask)


def test_a_mask_in_runs_is_decoded_pixel_by_pixel() -> None:
    """As the published loop does."""
    generator = np.random.default_rng(0)
    runs = [
        int(value) for pair in zip(generator.integers(0, 512 * 512, 200), generator.integers(0, 700, 200), strict=True) for value in pair
    ]
    expected = np.zeros(512 * 512, int)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for pixel in range(start, min(start + length, 512 * 512)):
            expected[pixel] = 255
    assert np.array_equal(array(decoded_mask(runs, (512, 512))).ravel(), expected)


@each(
    "change, problem",
    [
        ({"mask": [5]}, "pairs of whole numbers"),
        ({"mask": [5, "x"]}, "pairs of whole numbers"),
        ({"mask": None}, "pairs of whole numbers"),
        ({"mask": [512 * 512, 3]}, "a run of 3 pixels at 262144"),
        ({"mask": [-1, 3]}, "a run of 3 pixels at -1"),
        ({"editing_type_id": "10"}, "editing_type_id is '10'"),
        ({"editing_prompt": "[]"}, "is empty"),
        ({"editing_prompt": 7}, "editing_prompt is 7"),
        ({"image_path": "../secret.png"}, "leads out of"),
        ({"image_path": "/etc/passwd"}, "leads out of"),
    ],
)
def test_a_wrong_entry_of_pie_is_a_problem_of_its_case(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    """The others are read."""
    cases = read_pie(write_pie(tmp_path / "pie", n1=change))
    assert [case.problem is None for case in cases] == [True, False, True]
    assert problem in str(cases[1].problem)


@each(
    "entry, problem",
    [
        ({"img_name": "bird.jpeg"}, "no target_text"),
        ({"img_name": "../x.png", "target_text": "a"}, "leads out of"),
        ({"img_name": "bird.jpeg", "target_text": " "}, "target_text is ' '"),
        ("bird.jpeg", "a str"),
        ({"img_name": "bird.png", "target_text": "A bird naps."}, "listed twice"),
    ],
)
def test_a_wrong_entry_of_tedbench_is_a_problem_of_its_case(tmp_path: Path, entry: Any, problem: str) -> None:
    """The others are read."""
    folder = write_tedbench(tmp_path / "tedbench")
    entries = json.loads((folder / "input_list.json").read_text())
    write_list(folder, [*entries, entry])
    cases = read_tedbench(folder)
    assert [case.problem is None for case in cases] == [True] * 6 + [False]
    assert problem in str(cases[-1].problem)


@each(
    "command, spoil",
    {
        "no list": ("tedbench", lambda folder: (folder / "input_list.json").unlink()),
        "no JSON": ("tedbench", lambda folder: (folder / "input_list.json").write_text("[{")),
        "deep JSON": ("tedbench", lambda folder: (folder / "input_list.json").write_text("[" * 100_000)),
        "an object": ("tedbench", lambda folder: write_list(folder, {"img_name": "x"})),
        "empty": ("tedbench", lambda folder: write_list(folder, [])),
        "a folder for a list": ("tedbench", lambda folder: [(folder / "input_list.json").unlink(), (folder / "input_list.json").mkdir()]),
        "no photos": ("tedbench", lambda folder: (folder / "originals").rename(folder / "other")),
        "a list for a mapping": ("pie", lambda folder: (folder / "mapping_file.json").write_text("[1]")),
        "bytes": ("pie", lambda folder: (folder / "mapping_file.json").write_bytes(b"\xff\x00")),
        "no images": ("pie", lambda folder: (folder / "annotation_images").rename(folder / "other")),
    }.values(),
)
def test_a_folder_of_another_layout_is_refused(run: Run, tmp_path: Path, command: str, spoil: Callable[[Path], Any]) -> None:
    """With exit code 2, before the base is loaded."""
    folder = {"tedbench": write_tedbench, "pie": write_pie}[command](tmp_path / "folder")
    spoil(folder)
    code, _, err = run("bench", command, folder, "--base", "no-such-base", "--out", tmp_path / "out")
    assert code == 2
    assert "no-such-base" not in err
    assert not (tmp_path / "out").exists()


# published outputs


def test_published_outputs_of_tedbench_are_found(tedbench: Path, tmp_path: Path) -> None:
    """Named as Imagic's, or as Forgedit's with its settings and another dash; what is missing, or there twice, is a problem."""
    cases = read_tedbench(tedbench)
    imagic, forgedit = tmp_path / "imagic", tmp_path / "forgedit"
    imagic.mkdir()
    forgedit.mkdir()
    for case in cases[:5]:
        spaces = case.index == 2  # as one of Imagic's was first published
        scene(9).save(imagic / (f"{case.photo.name}-A sitting dog.png" if spaces else f"{output_stem(case.photo.name, case.prompt)}.png"))
        settings = "_guidance_scale=7.5__textalpha=0.7_alpha=1.2000000000000002_"
        scene(9).save(forgedit / f"0_orig_{case.prompt}{settings}{case.photo.name.replace('2_', '2-')}.png")
    scene(8).save(forgedit / f"1_orig_{cases[0].prompt}_guidance_scale=7.5_bird.jpeg.png")
    found = tedbench_outputs(cases, imagic)
    assert [picture.path is not None for picture in found] == [True] * 5 + [False]
    assert found[5].problem == f"no output in {imagic}; expected tree_1.jpeg-A_dead_tree.png"
    found = tedbench_outputs(cases, forgedit)
    assert [picture.path is not None for picture in found] == [False] + [True] * 4 + [False]
    assert str(found[0].problem).startswith("2 outputs in")
    assert {picture.row for picture in found} == {"forgedit"}


def test_published_outputs_of_pie_are_the_last_panels_of_strips(pie: Path, tmp_path: Path) -> None:
    """Or plain pictures; the row is the method, whether its folder is named or the one inside; other sizes are errors."""
    cases, root = read_pie(pie), tmp_path / "ddim+p2p" / "annotation_images"
    for number, case in enumerate(cases):
        path = root / case.photo.relative_to(pie / "annotation_images")
        path.parent.mkdir(parents=True)
        strip = Image.new("RGB", (2048, 512) if number == 0 else (512, 512) if number == 1 else (700, 512))
        strip.paste(scene(5, (512, 512)), (strip.width - 512, 0))
        strip.save(path, "JPEG", quality=95)
    for folder in (tmp_path / "ddim+p2p", root):
        found = pie_outputs(cases, folder)
        assert {picture.row for picture in found} == {"ddim+p2p"}
        for picture in found[:2]:
            subject = picture.read(picture.case.read_photo())
            assert subject.lossy
            assert abs(array(subject.edited) - array(scene(5, (512, 512)))).mean() < 3
        with pytest.raises(ImagicError, match="700 x 512 pixels"):
            found[2].read(cases[2].read_photo())


def written(folder: Path, lines: Sequence[Sequence[str]], name: str = "pictures.csv") -> Path:
    """A folder with two pictures, two masks and a list."""
    folder.mkdir(exist_ok=True)
    scene(1, (60, 48)).save(folder / "a.png")
    scene(2, (60, 48)).save(folder / "b.jpg")
    Image.linear_gradient("L").resize((60, 48)).save(folder / "mask.png")
    Image.new("L", (60, 48)).save(folder / "black.png")
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder


HEADER = ["source", "edited", "prompt", "source_prompt", "mask", "method", "class"]


def test_a_list_is_scored(run: Run, tmp_path: Path, models: dict[str, Path]) -> None:
    """Rows by method; a black mask has no region; a missing file is counted and named; each figure says its model and how it is made."""
    lines = [
        HEADER,
        ["a.png", "b.jpg", "a <b>cat</b>", "a dog", "mask.png", "ours", "x"],
        ["a.png", "a.png", "a <b>cat</b>", "a dog", "mask.png", "copy", "x"],
    ]
    lines += [["b.jpg", "missing.png", "a cow", "", "black.png", "ours", "y"], ["b.jpg", "a.png", "a cow", "", "black.png", "copy", "y"]]
    folder = written(tmp_path / "mine", lines)
    code, out, _ = run("bench", "score", folder, "--size", 64, *flags(models, "clip-b32", "dino"), "--offline", "--json")
    assert code == 0
    summary = json.loads(out)
    assert (summary["version"], summary["benchmark"], summary["pictures"], summary["failed"], summary["photos"]) == (1, "Pictures", 4, 1, 2)
    assert {name: (row["pictures"], row["failed"]) for name, row in summary["rows"].items()} == {"ours": (2, 1), "copy": (2, 0)}
    assert [error["row"] for error in summary["errors"]] == ["ours"]
    assert "missing.png" in summary["errors"][0]["error"]
    copy = summary["rows"]["copy"]
    assert copy["groups"]["x"]["psnr"]["mean"] == 100
    assert copy["measures"]["psnr"]["count"] == 2
    assert copy["measures"]["psnr_edited"]["count"] == 1
    assert copy["measures"]["psnr"]["low"] < copy["measures"]["psnr"]["mean"] < copy["measures"]["psnr"]["high"]
    about = summary["evaluator"]["measures"]["clip_b32"]
    assert about["model"] == str(models["clip-b32"])
    assert about["weights"].startswith("sha256 ")
    assert "4,000 resamples" in summary["interval"]
    written_files = Path(summary["page"]).parent
    assert json.loads((written_files / "summary.json").read_text())["rows"] == summary["rows"]
    scores = rows_in(written_files / "scores.csv")
    assert [row["row"] for row in scores] == ["ours", "copy", "ours", "copy"]
    assert float(scores[1]["psnr"]) == 100
    assert "missing.png" in scores[2]["error"]
    page = (written_files / "index.html").read_text()
    assert "<b>cat" not in page
    assert "a &lt;b&gt;cat&lt;/b&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 2 + 3  # two photos and three edits
    with Image.open(written_files / "sheet.png") as sheet:
        assert sheet.width > sheet.height / 2


def test_a_list_in_jsonl_reads_as_csv(tmp_path: Path) -> None:
    """Lines of several methods on the same edit share a case."""
    folder = written(
        tmp_path / "mine", [HEADER, ["a.png", "b.jpg", "a cat", "", "", "ours", ""], ["a.png", "a.png", "a cat", "", "", "copy", ""]]
    )
    rows = [{"source": "a.png", "edited": "b.jpg", "prompt": "a cat", "method": "ours"}]
    rows += [{"source": "a.png", "edited": "a.png", "prompt": "a cat", "method": "copy"}]
    (folder / "pictures.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = read_pictures(folder / "pictures.csv")
    second = read_pictures(folder / "pictures.jsonl")
    assert [(one.row, one.path, one.case.prompt, one.case.index) for one in first] == [
        (one.row, one.path, one.case.prompt, one.case.index) for one in second
    ]
    assert {one.case.index for one in first} == {0}


@each(
    "lines, message",
    [
        ([["a", "b"]], "no column source"),
        ([["source", "edited"], ["a.png", "b.jpg"]], "no column prompt"),
        ([["source", "edited", "prompt", "promt"], ["a.png", "b.jpg", "x", "y"]], "unknown column 'promt'"),
        ([["source", "edited", "prompt"]], "no photos"),
        ([["source", "edited", "prompt"], ["a.png", "b.jpg", "x"], ["a.png", "a.png", "x"]], "has the edit of line 2 already"),
        ([["source", "edited", "prompt"], ["a.png", "no.png", "x"]], "every picture failed"),
    ],
)
def test_a_wrong_list_is_refused(run: Run, tmp_path: Path, lines: list[list[str]], message: str) -> None:
    """With exit code 2."""
    code, _, err = run("bench", "score", written(tmp_path / "mine", lines), "--metrics", "pixels")
    assert code == 2
    assert message in err


@each(
    "arguments, message",
    [
        (["{}"], "has no list of pictures"),
        (["nothing"], "is no folder and no list"),
        (["{}", "--tedbench", "x", "--pie", "y"], "--tedbench and --pie"),
        (["{}", "--size", 63], "--size 63"),
        (["{}", "--pie", "y", "--size", 64], "--size 64 with --pie"),
        (["{}", "--workers", 0], "--workers 0"),
        (["{}", "--metrics", "pixels", "--offline"], "--offline with --metrics pixels"),
    ],
)
def test_wrong_arguments_of_score_are_refused(run: Run, tmp_path: Path, arguments: list[Any], message: str) -> None:
    """With exit code 2, and the message names them."""
    code, _, err = run("bench", "score", *(str(argument).format(tmp_path) for argument in arguments))
    assert code == 2
    assert message in err


# runs


def test_tedbench_is_run_and_scored(run: Run, folder: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """A method of the catalogue on a tiny base. A broken photo, a missing one and a wrong entry are counted and end nothing."""
    bench = write_tedbench(tmp_path / "tedbench")
    entries = json.loads((bench / "input_list.json").read_text())
    (bench / "originals" / "broken.jpeg").write_bytes((bench / "originals" / "bird.jpeg").read_bytes()[:300])
    write_list(bench, [*entries, {"img_name": "broken.jpeg", "target_text": "a"}, {"img_name": "gone.png", "target_text": "b"}, 7])
    names = ["--size", 64, *flags(models, "clip-l14"), "--offline", "--out", tmp_path / "out"]
    command = ["bench", "tedbench", bench, "--base", folder, "--device", "cpu", *SDEDIT, "--seed", 3, *names]
    code, out, err = run(*command, "--json")
    assert code == 0, err
    summary = json.loads(out)
    row = summary["rows"]["sdedit"]
    assert (row["pictures"], row["failed"], summary["photos"], summary["failed"]) == (9, 3, 3, 3)
    assert {error["case"] for error in summary["errors"]} == {"broken.jpeg-a", "gone.png-b", "entry 8"}
    assert "broken" in summary["errors"][0]["error"]
    assert (summary["seed"], summary["methods"]["sdedit"]["sdedit"]["steps"]) == (3, 2)
    assert (row["measures"]["clip_l14"]["count"], row["cost"]["forward"]) == (6, 2)
    edit = tmp_path / "out" / "cases" / "0002" / "sdedit.png"
    with Image.open(edit) as image:
        assert image.size == (48, 40)
    assert read_metadata(edit)["target_prompt"] == "A sitting dog."
    assert (tmp_path / "out" / "sheet.png").is_file()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "gone.png" in page
    before = edit.stat().st_mtime_ns
    code, out, _ = run(*command, "--json")
    assert (code, edit.stat().st_mtime_ns) == (0, before)
    assert json.loads(out)["rows"]["sdedit"] == row


@pytest.mark.slow
def test_pie_is_run_with_its_masks_and_as_published(run: Run, folder: Path, pie: Path, tmp_path: Path) -> None:
    """A method that needs a mask gets that of the case, and the summary says so; --as-published scores the same edits otherwise."""
    masked = ["--methods", "blended-latent", "--set", "steps=2"]
    names = ["--metrics", "pixels", "--out", tmp_path / "out", "--json"]
    command = ["bench", "pie", pie, "--base", folder, "--device", "cpu", *masked, "--classes", "1,9", *names]
    code, out, err = run(*command)
    assert code == 0, err
    right = json.loads(out)
    assert right["errors"] == []
    assert (right["cases"], right["seed"], right["mask_given"], right["benchmark"]) == (2, 1234, ["blended-latent"], "PIE-Bench")
    assert set(right["rows"]["blended-latent"]["groups"]) == {"change object", "change style"}
    assert right["rows"]["blended-latent"]["measures"]["mse_edited"]["count"] == 1
    edits = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("blended-latent.png")}
    code, out, _ = run(*command, "--as-published")
    wrong = json.loads(out)
    assert edits == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("blended-latent.png")}
    assert wrong["rows"]["blended-latent"]["measures"]["mse_edited"]["count"] == 2  # the border is always masked
    assert wrong["rows"]["blended-latent"]["measures"]["mse"]["mean"] != right["rows"]["blended-latent"]["measures"]["mse"]["mean"]  # JPEG
    assert "to which the border" in wrong["evaluator"]["measures"]["mse_edited"]["preprocessing"]


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_captions_make_methods_possible_that_need_them(run: Run, folder: Path, tedbench: Path, tmp_path: Path) -> None:
    """From a file, or by a model that is asked once; a method without them is refused, or left out of a group with the reason."""
    names = ["--metrics", "pixels", "--size", 64, "--cases", 2, "--device", "cpu", "--out", tmp_path / "out"]
    command = ["bench", "tedbench", tedbench, "--base", folder, "--methods", "ddib", "--set", "steps=2", *names]
    code, _, err = run(*command)
    assert code == 2
    assert "method ddib on TEdBench, which has no source prompt" in err
    assert "--captions" in err
    captions = {name: f"a {name[0]}" for name in ("bird.jpeg", "dog2_standing.png", "bird.png", "tree_1.jpeg")}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    code, out, err = run(*command, "--captions", tmp_path / "captions.json", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["captions"], summary["cases"]) == ("from the file captions.json", 2)
    assert read_metadata(tmp_path / "out" / "cases" / "0003" / "ddib.png")["source_prompt"] == "a d"
    (tmp_path / "captions.json").write_text(json.dumps({"bird.jpeg": "a bird"}))
    code, _, err = run(*command, "--captions", tmp_path / "captions.json")
    assert code == 2
    assert "has no caption of dog2_standing.png" in err
    captioner = save_captioner(tmp_path / "captioner")
    code, out, err = run(*command, "--captions", "auto", "--captioner", captioner, "--offline", "--json")
    assert code == 0, err
    assert json.loads(out)["captions"] == f"by {captioner}"
    assert set(json.loads((tmp_path / "out" / "captions.json").read_text())["captions"]) == {"bird.jpeg", "dog2_standing.png"}


@each(
    "arguments, message",
    [
        (["--methods", "nonsense"], "nonsense"),
        (["--methods", "blended-latent"], "TEdBench, which has no mask"),
        (["--methods", "flowedit", "--captions", "auto"], "captioner"),
        (["--cases", 0], "--cases 0"),
        (["--captioner", "x"], "--captioner without --captions auto"),
        (["--metrics", "clip-l14", "--model", "clip-l14=nobody/nothing", "--offline"], "leave clip-l14 out of --metrics"),
        (["--set", "steps=2", "--methods", "sdedit,ddim-inversion"], "--set with --methods"),
        (["--seed", 2**32], "seed 4294967296"),
    ],
)
def test_wrong_arguments_of_a_run_are_refused(run: Run, folder: Path, tedbench: Path, arguments: list[Any], message: str) -> None:
    """With exit code 2, before anything is edited."""
    more = ["--offline"] if "auto" in arguments else []
    metrics = [] if "--metrics" in arguments else ["--metrics", "clip-l14" if more else "pixels"]
    code, _, err = run("bench", "tedbench", tedbench, "--base", folder, *arguments, *metrics, *more)
    assert code == 2
    assert message in err
    assert not list(Path().rglob("cases"))


class Counter(Method):
    """Gives the photo with a mark, and keeps a line for each call; kills its process at a call, or fails on a prompt."""

    name, rows, settings = "counter", ("counter",), {}

    def __init__(self, log: Path, kill_at: int | None = None, fails: str = "") -> None:
        self.log, self.kill_at, self.fails = log, kill_at, fails

    def edit(self, context: Context, request: EditRequest) -> Iterator[EditResult]:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{request.target_prompt}\n")
        if len(self.calls()) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.target_prompt == self.fails:
            raise ValueError("odd weather")
        yield EditResult("counter", request.photo.point([255 - value for value in range(256)] * 3), Cost(2, 0, 0.5))

    def passes(self, base: Any) -> dict[str, Passes]:
        return {"counter": Passes(2)}

    def calls(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def bench(tedbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FieldBench]:
    """Makes a run of a counting method, which needs no base."""
    monkeypatch.setattr(running, "opened", lambda config: None)

    def make(**options: Any) -> FieldBench:
        counter = Counter(tmp_path / "calls", **options)
        return FieldBench(read_tedbench(tedbench), [counter], tmp_path / "out", RunConfig(), "tiny fp32", 0)

    return make


def in_killed_child(work: Callable[[], Any]) -> None:
    """Does work in a child process, which must be killed within it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_run_resumes_case_by_case(bench: Callable[..., FieldBench], tmp_path: Path) -> None:
    """What was done stays, and the case in which it was killed is done again."""
    killed = bench(kill_at=3)
    in_killed_child(lambda: list(killed.results()))
    whole = bench()
    assert len(whole.methods[0].calls()) == 3  # pyright: ignore[reportAttributeAccessIssue]
    results = list(whole.results())
    prompts = [case.prompt for case in whole.cases]
    assert (tmp_path / "calls").read_text().splitlines() == prompts[:3] + prompts[2:]
    assert [result.error for result in results] == [None] * 6
    assert all(picture.path and picture.path.is_file() for picture in whole.pictures(results))


def test_what_an_edit_depends_on_makes_it_run_again(bench: Callable[..., FieldBench], tmp_path: Path) -> None:
    """Another photo, prompt, caption, seed or base; nothing else does."""
    first = bench()
    list(first.results())
    key = first.key(first.methods[0], 0, first.cases[0])
    assert key == bench().key(first.methods[0], 0, first.cases[0])
    case = first.cases[0]
    others = [
        case.__class__(**vars(case) | change)
        for change in ({"prompt": "x"}, {"source_prompt": "x"}, {"photo": first.cases[2].photo}, {"mask": (1, 2)})
    ]
    changed = [
        FieldBench(first.cases, first.methods, first.out, first.config, base, seed) for base, seed in (("tiny fp32", 1), ("tiny fp16", 0))
    ]
    keys = [first.key(first.methods[0], 0, other) for other in others] + [run.key(first.methods[0], 0, case) for run in changed]
    assert len({key, *keys}) == 7


def test_a_case_that_fails_is_counted_and_tried_again(bench: Callable[..., FieldBench], tmp_path: Path) -> None:
    """The others are done; its traceback is kept."""
    failing = bench(fails="A dead tree.")
    results = list(failing.results())
    pictures = failing.pictures(results)
    assert [picture.path is not None for picture in pictures] == [True] * 5 + [False]
    found = sorted(scored(pictures, PIXELS, {}, tmp_path / "out", 1), key=lambda one: one.place)
    assert [one.error is None for one in found] == [True] * 5 + [False]
    assert "odd weather" in str(found[5].error)
    assert found[5].photo == found[4].photo  # its photo is shown
    assert all(result.error is None for result in bench().results())
    assert len(failing.methods[0].calls()) == 7  # pyright: ignore[reportAttributeAccessIssue]


def test_a_killed_scoring_resumes_picture_by_picture(
    bench: Callable[..., FieldBench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept scores are the same numbers; other settings or another picture are scored anew."""
    done = bench()
    pictures = done.pictures(list(done.results()))
    log, original = tmp_path / "scored", Evaluator.scores

    def counted(self: Evaluator, subject: Any) -> dict[str, float]:
        with log.open("a") as file:
            file.write("x")
        if log.stat().st_size == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, subject)

    monkeypatch.setattr(Evaluator, "scores", counted)
    in_killed_child(lambda: list(scored(pictures, PIXELS, {}, tmp_path / "out", 1)))
    with (tmp_path / "out" / "scores.jsonl").open("a") as file:
        file.write('{"key": "cut')  # as a writer that was killed within a line
    first = list(scored(pictures, PIXELS, {}, tmp_path / "out", 1))
    assert log.stat().st_size == 4 + 3
    again = list(scored(pictures, PIXELS, {}, tmp_path / "out", 1))
    assert log.stat().st_size == 7
    assert {one.place: one.values for one in first} == {one.place: one.values for one in again}
    scene(7, (48, 40)).save(str(pictures[0].path))
    running.file_hash.cache_clear()
    list(scored(pictures, PIXELS, {}, tmp_path / "out", 1))
    assert log.stat().st_size == 8
    list(scored(pictures[:2], Settings(Sources(("pixels",)), 65), {}, tmp_path / "out", 1))
    assert log.stat().st_size == 10
    list(scored(pictures[:2], PIXELS, {"clip-b32": "other"}, tmp_path / "out", 1))
    assert log.stat().st_size == 12


@pytest.mark.slow
def test_two_workers_give_what_one_gives(run: Run, folder: Path, tedbench: Path, tmp_path: Path) -> None:
    """The same edits and the same scores, in the same order."""
    found = []
    for workers in (1, 2):
        names = ["--metrics", "pixels", "--size", 64, "--workers", workers, "--out", tmp_path / str(workers), "--device", "cpu"]
        code, out, err = run("bench", "tedbench", tedbench, "--base", folder, *SDEDIT, *names, "--json")
        assert code == 0, err
        found.append(json.loads(out)["rows"]["sdedit"]["measures"])
    assert found[0] == found[1]
    tables = [rows_in(tmp_path / str(workers) / "scores.csv") for workers in (1, 2)]
    assert [[row["case"], row["psnr"]] for row in tables[0]] == [[row["case"], row["psnr"]] for row in tables[1]]


# intervals


def test_an_interval_over_photos_draws_photos() -> None:
    """Two photos, of one and of three values: a draw has one of three means, the middle one half of the time."""
    found = bootstrapped([0, 1, 1, 1], ["a", "b", "b", "b"])
    assert found is not None
    assert (found.mean, found.low, found.high) == (0.75, 0, 1)
    values = np.random.default_rng(0).normal(size=60).tolist()
    alone, together = bootstrapped(values), bootstrapped(values * 3, list(range(60)) * 3)
    assert alone is not None
    assert together is not None
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    single = bootstrapped(values, list(range(60)))
    assert single == alone
