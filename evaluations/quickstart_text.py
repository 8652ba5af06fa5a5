"""The quickstart's part on text: prompts beside their pictures, those that training never had marked, and how often a
picture shows its prompt."""
import html
import json
import math
from pathlib import Path

import numpy as np

from dataset.emoji import open_emoji
from evaluations.report_page import Part, only, png, read_json, table
from evaluations.t2i.sample_folder import read_samples
from utils import images
from utils.training.logger import read_metrics

SHOWN = 48  # of the prompts that training had, evenly spaced


def read_text_part(root: Path) -> Part:
    """The text model's samples and scores. Raises FileNotFoundError when the quickstart has not come to its end."""
    run = only(root / "t2i", "*-*")
    log, config = read_metrics(run / "metrics.jsonl"), json.loads((run / "config.json").read_text())["model"]
    scores = {kind: read_json(root / f"retrieval_{kind}.json") for kind in ("seen", "unseen")}
    rows = {kind: prompt_rows(only(root / f"samples_t2i_{kind}", "*/captions.txt").parent) for kind in scores}
    emoji = open_emoji("emoji_all", size=config["image_size"][0])
    real = {caption: np.asarray(emoji.image(i)) for i, caption in enumerate(emoji.captions)}
    classes = dict(zip(emoji.captions, emoji.labels.tolist(), strict=True))
    vocab = config["vocab_size"]
    numbers = [("Text model's loss, start → end", f"{log[0]['loss']:.3f} → {log[-1]['loss']:.3f}",
                f"ln {vocab} = {math.log(vocab):.3f} is what guessing gives")]
    for kind, what in (("seen", "prompts of training"), ("unseen", "prompts never seen")):
        score = scores[kind]
        numbers += [(f"Picture found by {what}, first", f"{score['top1']:.1%}",
                     f"of {score['samples']}, among {score['real_pictures']} real ones; chance {score['chance']:.1%}"),
                    ("… among the first five", f"{score['top5']:.1%}", ""),
                    ("… of the prompt's class at least", f"{same_class(score['nearest'], rows[kind], classes):.1%}",
                     "its picture found first is of that of eight classes")]
    numbers.append(("Real pictures found", f"{scores['seen']['real']:.1%}", "by the same network, trained on them"))
    seen = list(rows["seen"])[::max(1, len(rows["seen"]) // SHOWN)][:SHOWN]
    sections = "\n".join([
        "<h2>Text: prompts that training never had</h2><p><small>Each word was in other captions. Last in a row: the "
        "real emoji, which the text model was never shown; not chosen by hand</small></p>",
        prompt_table(rows["unseen"], real),
        "<h2>Text: prompts of training</h2><p><small>some of them, evenly spaced; last in a row: the real emoji</small>"
        "</p>",
        prompt_table({prompt: rows["seen"][prompt] for prompt in seen}, real),
        "<h2>Text: numbers</h2>", table(numbers, ("", "", ""))])
    chosen = {**{prompt: rows["unseen"][prompt][:1] for prompt in list(rows["unseen"])[:24]},
              **{prompt: rows["seen"][prompt][:1] for prompt in seen[:24]}}
    pictures = images.grid(np.concatenate(list(chosen.values())), columns=12, labels=[
        f"{'* ' * (prompt in rows['unseen'])}{prompt}" for prompt in chosen])
    return Part("text", log, config, sections, numbers, pictures)


def prompt_rows(folder: Path) -> dict[str, np.ndarray]:
    """{prompt: its pictures, uint8 (n, H, W, 3)} of a folder of samples."""
    rows: dict[str, list[np.ndarray]] = {}
    files, captions, _ = read_samples(folder)
    for file, caption in zip(files, captions, strict=True):
        rows.setdefault(caption, []).append(images.load_png(file))
    return {caption: np.stack(pictures) for caption, pictures in rows.items()}


def same_class(nearest: list[str], rows: dict[str, np.ndarray], classes: dict[str, int]) -> float:
    """How often the caption that is nearest to a sample is of the class of its prompt; samples as in `rows`."""
    prompts = [prompt for prompt, pictures in rows.items() for _ in pictures]
    return float(np.mean([classes[one] == classes[other] for one, other in zip(nearest, prompts, strict=True)]))


def prompt_table(rows: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> str:
    """Prompts beside their pictures and the real one, two to a line."""
    cells = [f"<td>{html.escape(prompt)}</td><td>"
             + png(images.grid(np.concatenate([pictures, real[prompt][None]]), columns=len(pictures) + 1), prompt)
             + "</td>" for prompt, pictures in rows.items()]
    lines = [f"<tr>{''.join(cells[i:i + 2])}</tr>" for i in range(0, len(cells), 2)]
    return f"<table>{''.join(lines)}</table>"
