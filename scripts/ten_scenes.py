"""Ten pose edits of scenes used nowhere else: ``python scripts/ten_scenes.py --mode lora|full``.

Every scene is fitted with the defaults and edited with one eta and one seed. Prints what the judge sees and by how much tuning lowers
the reconstruction error at eta 0 against ``e_opt`` alone; writes ``docs/ten-scenes-MODE.png``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from diffusers.utils import logging
from PIL import Image

from imagic_lora.config import PRESETS, RunConfig, resolve
from imagic_lora.critters import POSES, Scene, render, scene_at
from imagic_lora.critters.judge import Judge
from imagic_lora.demo import embedding_alone
from imagic_lora.editor import Editor
from imagic_lora.images import sheet
from imagic_lora.imagic import fit, open_for, result
from imagic_lora.metrics import pixels, psnr
from imagic_lora.store import Store

DOCS = Path(__file__).parent.parent / "docs"


def asked(scene: Scene, index: int) -> str:
    """Another pose than the scene's own, each as often as the others."""
    others = [pose for pose in POSES if pose != scene.pose]
    return others[index % len(others)]


def measure(editor: Editor, scene: Scene, pose: str, config: RunConfig, store: Store) -> dict[str, Image.Image]:
    """The pictures of one scene: photo, e_opt on the untuned base, eta 0, the edit at the default eta, the true edit."""
    photo = store.root / "photo.png"
    picture = render(scene)
    picture.save(photo)
    editor.close()
    adapter = result(fit(photo, f"a {scene.animal} {pose}", config, store, "one", base=editor.base, overwrite=True))
    assert adapter is not None
    before = embedding_alone(editor, adapter, config.edit, config.seed)
    at_zero, edited = (one.image for one in editor.edit(adapter, [0.0, config.eta], [config.seed], config.edit))
    return {
        "photo": picture,
        "e_opt": before,
        "eta 0": at_zero,
        f"eta {config.eta:g}": edited,
        "true edit": render(scene.edited(pose=pose)),
    }


def lowered(pictures: dict[str, Image.Image]) -> float:
    """By what part tuning lowers the squared error of the reconstruction."""
    before, after = (10 ** (-psnr(pictures[name], pictures["photo"]) / 10) for name in ("e_opt", "eta 0"))
    return 1 - after / before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("lora", "full"), default="lora")
    parser.add_argument("--scenes", type=int, default=10)
    parser.add_argument("--split", choices=("claim", "choose"), default="claim", help="choose: for trying settings")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    config = resolve({"base": "critters", "tune": {"mode": args.mode}}, {}, PRESETS["critters"])
    editor, judge, rows, drops, done = Editor(open_for(config)), Judge.load(), [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for k in range(args.scenes):
            scene, start = scene_at(args.split, k), time.time()
            pose = asked(scene, k)
            pictures = measure(editor, scene, pose, config, Store(Path(folder)))
            (seen,) = judge.see(pixels([pictures[f"eta {config.eta:g}"]]))
            kept = [name for name in ("animal", "colour", "place", "thing") if seen[name] == getattr(scene, name)]
            done += seen["pose"] == pose and "animal" in kept
            drops.append(lowered(pictures))
            print(f"{k} {scene.animal} {scene.pose} -> {pose}: judge sees {seen['animal']} {seen['pose']}, kept {', '.join(kept)};"
                  f" error at eta 0 {-100 * drops[-1]:+.0f}%; {time.time() - start:.0f} s", flush=True)  # fmt: skip
            rows.append([(f"{name}: {pose}" if name.startswith("eta 0.") else name, image) for name, image in pictures.items()])
    editor.close()
    print(f"mode {args.mode}: the asked pose and the same animal in {done} of {args.scenes};", end=" ")
    print(f"tuning lowers the error at eta 0 by {100 * statistics.median(drops):.0f}% (median)")
    out = args.out or DOCS / f"ten-scenes-{args.mode}.png"
    out.parent.mkdir(exist_ok=True)
    sheet(rows, f"{args.split} scenes, mode {args.mode}, one eta, one seed", cell=128).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
