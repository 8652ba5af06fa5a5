"""The page that the quickstart ends with: the data, samples, numbers, loss curves, and how long each stage took.

    python3 evaluations/quickstart_report.py --run-dir runs/quickstart

Reads what scripts/quickstart.sh leaves in --run-dir and writes report.html there: self-contained, no network.
"""
import base64
import html
import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.build import build_dataset
from utils import cli, images
from utils.cli import flag
from utils.files import replacing
from utils.training.logger import read_metrics

COLUMNS = 12

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
img {{ max-width: 100%; height: auto; image-rendering: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .9rem .25rem 0; text-align: left; }}
td:nth-child(n+2) {{ font-variant-numeric: tabular-nums; }} tr {{ border-bottom: 1px solid #e5e5e5; }}
small {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(kw_only=True)
class ReportFlags:
    """The report command."""

    run_dir: str = flag("runs/quickstart", "folder with tokenizer/, gpt/, reconstructions/, samples/, times.tsv, …")


def png(picture: np.ndarray, alt: str) -> str:
    """An <img> that carries a uint8 (H, W, 3) picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """An HTML table."""
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def curves(tokenizer: list[dict], gpt: list[dict], *, vocab_size: int) -> np.ndarray:
    """Loss against step of both trainings, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), dpi=110)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in tokenizer], [row["reconstruction"] for row in tokenizer])
    left.set(title="tokenizer: reconstruction loss", xlabel="step", yscale="log")
    right.plot([row["step"] for row in gpt], [row["loss"] for row in gpt])
    right.axhline(math.log(vocab_size), color="grey", linestyle=":", label=f"ln {vocab_size} (knows nothing)")
    right.set(title="GPT: cross-entropy per code", xlabel="step", ylim=(0, None))
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


def only(folder: Path, pattern: str) -> Path:
    """The newest match. Raises FileNotFoundError with what to do when there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds no {pattern}: run scripts/quickstart.sh to its end first")
    return found[-1]


def stage_times(path: Path) -> dict[str, float]:
    """Seconds per stage, summed over interrupted and resumed attempts."""
    times: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        name, seconds = line.split("\t")
        times[name] = times.get(name, 0.0) + float(seconds)
    return times


def main(flags: ReportFlags) -> None:
    """Write report.html, and samples.png for those who only want the pictures."""
    cli.require_package("matplotlib", purpose="the report, which draws plots,")
    root = Path(flags.run_dir)
    tokenizer_run, gpt_run = only(root / "tokenizer", "*-*"), only(root / "gpt", "*-*")
    tokenizer_rows, gpt_rows = (read_metrics(run / "metrics.jsonl") for run in (tokenizer_run, gpt_run))
    gpt_config = json.loads((gpt_run / "config.json").read_text())["model"]
    classes = gpt_config["classes"]
    quality = json.loads(only(root / "reconstructions", "*/results.json").read_text())
    accuracy = json.loads((root / "class_accuracy.json").read_text())
    distances = {name: json.loads((root / f"distance_{name}.json").read_text()) for name in ("samples", "heldout")}
    sampling = json.loads(only(root / "samples", "*/config.json").read_text())
    with np.load(only(root / "samples", "*.npz")) as content:
        samples, labels = content["arr_0"], content["arr_1"]
    times = stage_times(root / "times.tsv")
    data = build_dataset("emoji", None, size=tuple(gpt_config["image_size"]))
    sheet = np.stack([np.asarray(data.image(i)) for i in range(len(data))])

    vocab = gpt_config["vocab_size"]
    numbers = [
        ("Held-out reconstruction, PSNR", f"{quality['psnr']:.2f} dB", f"{quality['images']} emoji never trained on"),
        ("Held-out reconstruction, SSIM", f"{quality['ssim']:.3f}", ""),
        ("Codebook usage, training", f"{tokenizer_rows[-1]['codebook_usage']:.1%}",
         f"of {vocab} codes; perplexity {tokenizer_rows[-1]['codebook_perplexity']:.0f}"),
        ("GPT loss, start → end", f"{gpt_rows[0]['loss']:.3f} → {gpt_rows[-1]['loss']:.3f}",
         f"ln {vocab} = {math.log(vocab):.3f} is what guessing gives"),
        ("Samples recognised as their class", f"{accuracy['sample_accuracy']:.1%}",
         f"of {len(samples)}, by a classifier that never saw tokenizer or GPT"),
        ("Real held-out emoji recognised", f"{accuracy['heldout_accuracy']:.1%}", "by the same classifier"),
    ]
    for title, row in (("samples", distances["samples"]), ("real held-out", distances["heldout"])):
        ours, theirs = (row["protocol"][kind]["images"] for kind in ("sample", "reference"))
        numbers.append((f"Fréchet distance, {title}", f"{row['frechet_distance']:.2f}",
                        f"of {ours} to {theirs} training emoji in the classifier's features: no FID"))
    numbers += [(f"{name.capitalize()}, samples | real held-out",
                 f"{distances['samples'][name]:.3f} | {distances['heldout'][name]:.3f}",
                 "in the classifier's features") for name in ("precision", "recall")]
    per_class = [(name, *("–" if row[key] is None else f"{row[key]:.0%}" for key in ("samples", "heldout")))
                 for name, row in accuracy["per_class"].items()]
    spent = [(name, f"{seconds / 60:.1f} min") for name, seconds in times.items()]
    spent.append(("all", f"{sum(times.values()) / 60:.1f} min"))
    settings = ", ".join(f"{key} {sampling[key]}" for key in ("cfg_scale", "top_k", "top_p", "temperature", "seed"))
    body = "\n".join([
        "<h2>Samples, class by class</h2>", f"<p><small>{html.escape(settings)}; not chosen by hand</small></p>",
        class_rows(samples, labels, classes),
        "<h2>Numbers</h2>", table(numbers, ("", "", "")),
        "<h2>Recognised, by class</h2>", table(per_class, ("class", "samples", "real held-out")),
        "<h2>Reconstructions of held-out emoji</h2><p><small>above: real, below: through the tokenizer</small></p>",
        png(images.load_png(only(root / "reconstructions", "*.png")), "reconstructions"),
        "<h2>Loss curves</h2>", png(curves(tokenizer_rows, gpt_rows, vocab_size=vocab), "loss curves"),
        "<h2>The data</h2>", f"<p><small>{len(data)} training emoji, {data.classes and len(data.classes)} classes. "
        "OpenMoji, CC BY-SA 4.0</small></p>", class_rows(sheet, data.labels, classes),
        "<h2>Time</h2>", table(spent, ("stage", "")),
    ])
    with replacing(root / "report.html") as temporary:
        temporary.write_text(PAGE.format(title="From pixels to pictures", body=body))
    chosen = np.concatenate([samples[labels == label][:COLUMNS] for label in range(len(classes))])
    images.save_png(root / "samples.png", images.grid(chosen, columns=COLUMNS))
    for name, value, note in numbers:
        print(f"{name:<36}{value:>16}   {note}")
    print(f"report: {root / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, ReportFlags)
