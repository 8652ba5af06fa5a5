"""The page that the quickstart ends with: the data, samples, numbers, loss curves, and how long each stage took.

    python3 evaluations/quickstart_report.py --run-dir runs/quickstart

Reads what scripts/quickstart.sh leaves in --run-dir and writes report.html there: self-contained, no network. A run
that has trained several models shows all of them.
"""
import contextlib
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.build import build_dataset
from evaluations.quickstart_text import read_text_part
from evaluations.report_page import PAGE, Part, only, png, read_json, table
from utils import cli, images
from utils.cli import flag
from utils.files import replacing
from utils.training.logger import read_metrics

COLUMNS = 12
STEPS = (8, 16, 32, 64)  # of an ARPG's sample sets
Model = Literal["gpt", "arpg", "t2i"]
FILES: dict[Model, tuple[str, str, str, str]] = {  # title, folder of samples, scores, what distances begin with
    "gpt": ("GPT", "samples", "class_accuracy", "distance"),
    "arpg": ("ARPG", "samples_arpg/64", "class_accuracy_arpg_64", "distance_arpg"),
}  # of classes; text: see quickstart_text.py

@dataclass(kw_only=True)
class ReportFlags:
    """The report command."""

    run_dir: str = flag("runs/quickstart", "folder with tokenizer/, gpt/, reconstructions/, samples/, times.tsv, …")
    model: Model = flag("gpt", "whose samples come first; those of the other follow if they are there",
                        choices=get_args(Model))


def curves(tokenizer: list[dict], parts: list[Part], *, vocab_size: int) -> np.ndarray:
    """Loss against step of all trainings, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=110)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in tokenizer], [row["reconstruction"] for row in tokenizer])
    left.set(title="tokenizer: reconstruction loss", xlabel="step", yscale="log")
    for part in parts:
        right.plot([row["step"] for row in part.log], [row["loss"] for row in part.log], label=part.name)
    right.axhline(math.log(vocab_size), color="grey", linestyle=":", label=f"ln {vocab_size} (knows nothing)")
    right.set(title="cross-entropy per code", xlabel="step", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def class_rows(pictures: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """One row of pictures per class, the name beside it."""
    parts = []
    for label, name in enumerate(classes):
        chosen = pictures[labels == label][:COLUMNS]
        if len(chosen):
            row = png(images.grid(chosen, columns=COLUMNS), name)
            parts.append(f"<tr><td>{html.escape(name)}</td><td>{row}</td></tr>")
    return "<table>" + "".join(parts) + "</table>"


def stage_times(path: Path) -> dict[str, float]:
    """Seconds per stage, summed over interrupted and resumed attempts."""
    times: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, seconds = line.split("\t")
        times[name] = times.get(name, 0.0) + float(seconds)
    return times


def time_per_image(folder: Path) -> str:
    """How long an image of a sample set took to draw and decode; – where a kill came before that was noted."""
    rows = [json.loads(line) for path in folder.glob("*.speed.jsonl") for line in path.read_text().splitlines()]
    if not rows:
        return "–"
    return f"{1000 * sum(row['seconds'] for row in rows) / sum(row['images'] for row in rows):.1f} ms"


def read_part(root: Path, model: Model) -> Part:
    """A model's samples and scores. Raises FileNotFoundError when the quickstart has not come to its end with it."""
    name, folder, scores, distance = FILES[model]
    run = only(root / model, "*-*")
    log, config = read_metrics(run / "metrics.jsonl"), json.loads((run / "config.json").read_text())["model"]
    accuracy = read_json(root / f"{scores}.json")
    distances = {kind: read_json(root / f"{distance}_{kind}.json") for kind in ("samples", "heldout")}
    sampling = json.loads(only(root / folder, "*/config.json").read_text())
    with np.load(only(root / folder, "*.npz")) as content:
        samples, labels = content["arr_0"], content["arr_1"]
    classes, vocab = config["classes"], config["vocab_size"]
    numbers = [
        (f"{name} loss, start → end", f"{log[0]['loss']:.3f} → {log[-1]['loss']:.3f}",
         f"ln {vocab} = {math.log(vocab):.3f} is what guessing gives"),
        ("Samples recognised as their class", f"{accuracy['sample_accuracy']:.1%}",
         f"of {len(samples)}, by a classifier that never saw tokenizer or {name}"),
        ("Real held-out emoji recognised", f"{accuracy['heldout_accuracy']:.1%}", "by the same classifier"),
    ]
    for title, row in (("samples", distances["samples"]), ("real held-out", distances["heldout"])):
        ours, theirs = (row["protocol"][kind]["images"] for kind in ("sample", "reference"))
        numbers.append((f"Fréchet distance, {title}", f"{row['frechet_distance']:.2f}",
                        f"of {ours} to {theirs} training emoji in the classifier's features: no FID"))
    numbers += [(f"{kind.capitalize()}, samples | real held-out",
                 f"{distances['samples'][kind]:.3f} | {distances['heldout'][kind]:.3f}",
                 "in the classifier's features") for kind in ("precision", "recall")]
    per_class = [(label, *("–" if row[key] is None else f"{row[key]:.0%}" for key in ("samples", "heldout")))
                 for label, row in accuracy["per_class"].items()]
    keys = [key for key in ("steps", "cfg_scale", "top_k", "top_p", "temperature", "seed") if key in sampling]
    settings = ", ".join(f"{key} {sampling[key]}" for key in keys)
    sections = "\n".join([
        f"<h2>{name}: samples, class by class</h2>",
        f"<p><small>{html.escape(settings)}; not chosen by hand</small></p>", class_rows(samples, labels, classes),
        *(arpg_sections(root, classes) if model == "arpg" else ()),
        f"<h2>{name}: numbers</h2>", table(numbers, ("", "", "")),
        f"<h2>{name}: recognised, by class</h2>", table(per_class, ("class", "samples", "real held-out"))])
    chosen = np.concatenate([samples[labels == label][:COLUMNS] for label in range(len(classes))])
    return Part(name, log, config, sections, numbers, images.grid(chosen, columns=COLUMNS))


def arpg_sections(root: Path, classes: list[str]) -> list[str]:
    """Samples by number of steps: time, class accuracy, pictures; held-out pictures edited, and drawn from edges."""
    rows, pictures = [], []
    for steps in STEPS:
        folder = root / "samples_arpg" / str(steps)
        accuracy = read_json(root / f"class_accuracy_arpg_{steps}.json")
        with np.load(only(folder, "*.npz")) as content:
            samples, labels = content["arr_0"], content["arr_1"]
        rows.append((str(steps), time_per_image(folder), f"{accuracy['sample_accuracy']:.1%}"))
        first = np.stack([samples[labels == label][0] for label in range(len(classes)) if (labels == label).any()])
        row = png(images.grid(first, columns=COLUMNS), f"{steps} steps")
        pictures.append(f"<tr><td>{steps} steps</td><td>{row}</td></tr>")
    return ["<h2>ARPG: fewer steps</h2>",
            f"<p><small>{len(samples)} images each, drawn in batches; the time is that of codes and pixels. Below, the "
            "first image of each class</small></p>", table(rows, ("steps", "time per image", "recognised")),
            f"<table>{''.join(pictures)}</table>",
            "<h2>ARPG: inpainting</h2><p><small>held-out emoji: original | mask | four results; what is grey is drawn "
            "anew beside what was asked for</small></p>",
            *(png(images.load_png(only(root / "inpainted" / name, "strip.png")), name) for name in classes),
            "<h2>ARPG: drawn from edges</h2><p><small>edges of the same emoji, and samples that follow them</small>"
            "</p>",
            png(images.load_png(only(root, "edges.png")), "edges and samples")]


def finished_parts(root: Path, model: Model) -> list[Part]:
    """The part of `model`, and after it those of the others with which the quickstart has come to its end too."""
    parts = []
    for one in sorted(get_args(Model), key=lambda one: one != model):
        with contextlib.suppress(*[FileNotFoundError] * (one != model)):
            parts.append(read_text_part(root) if one == "t2i" else read_part(root, one))
    return parts


def main(flags: ReportFlags) -> None:
    """Write report.html, and the samples as a PNG for those who only want the pictures."""
    cli.require_package("matplotlib", purpose="the report, which draws plots,")
    root = Path(flags.run_dir)
    parts = finished_parts(root, flags.model)
    tokenizer_rows = read_metrics(only(root / "tokenizer", "*-*") / "metrics.jsonl")
    quality = json.loads(only(root / "reconstructions", "*/results.json").read_text())
    times = stage_times(root / "times.tsv")
    config, vocab = parts[0].config, parts[0].vocab_size
    data = build_dataset("emoji", None, size=tuple(config["image_size"]))
    sheet = np.stack([np.asarray(data.image(i)) for i in range(len(data))])
    numbers = [
        ("Held-out reconstruction, PSNR", f"{quality['psnr']:.2f} dB", f"{quality['images']} emoji never trained on"),
        ("Held-out reconstruction, SSIM", f"{quality['ssim']:.3f}", ""),
        ("Codebook usage, training", f"{tokenizer_rows[-1]['codebook_usage']:.1%}",
         f"of {vocab} codes; perplexity {tokenizer_rows[-1]['codebook_perplexity']:.0f}"),
    ]
    spent = [(name, f"{seconds / 60:.1f} min") for name, seconds in times.items()]
    spent.append(("all", f"{sum(times.values()) / 60:.1f} min"))
    body = "\n".join([
        *(part.sections for part in parts),
        "<h2>Tokenizer</h2>", table(numbers, ("", "", "")),
        "<h2>Reconstructions of held-out emoji</h2><p><small>above: real, below: through the tokenizer</small></p>",
        png(images.load_png(only(root / "reconstructions", "*.png")), "reconstructions"),
        "<h2>Loss curves</h2>", png(curves(tokenizer_rows, parts, vocab_size=vocab), "loss curves"),
        "<h2>The data</h2>", f"<p><small>{len(data)} training emoji, {data.classes and len(data.classes)} classes. "
        "OpenMoji, CC BY-SA 4.0</small></p>", class_rows(sheet, data.labels, data.classes),
        "<h2>Time</h2>", table(spent, ("stage", "")),
    ])
    with replacing(root / "report.html") as temporary:
        temporary.write_text(PAGE.format(title="From pixels to pictures", body=body))
    folder = "samples_t2i" if flags.model == "t2i" else FILES[flags.model][1].partition("/")[0]
    images.save_png(root / f"{folder}.png", parts[0].pictures)
    for name, value, note in [*numbers, *parts[0].numbers]:
        print(f"{name:<36}{value:>16}   {note}")
    print(f"report: {root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, ReportFlags)
