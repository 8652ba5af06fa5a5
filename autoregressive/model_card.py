"""The model card (README.md) of a saved model: what it is, how to load it, what was measured, what was published.

Numbers are those that the training run wrote down, and those published for the recipe, which are marked as such.
"""
import json
import math
from pathlib import Path
from typing import Any

from autoregressive.released import LICENSES, RELEASED
from utils.checkpoints.hub import known_as
from utils.files import exists, names_in, plain, replacing
from utils.recipes import FOLDER, recipe_names
from utils.training.logger import read_metrics

NOT_SCORES = ("step", "lr", "grad_norm", "unreadable")  # of a row of metrics.jsonl
MARK = "<!-- Written anew whenever the model is saved: remove this line to keep your own text. -->"
LEFT_OUT = ("source",)  # of what a recipe expects


def training_record(given: str, checkpoint: Path) -> dict[str, Any]:
    """What is known of the training behind a checkpoint: {"measured": numbers of its last logged steps up to the
    checkpoint's, "recipe": name}, as far as there is anything."""
    found: dict[str, Any] = {}
    released, run = RELEASED.get(known_as(given)), checkpoint.absolute().parent.parent
    if released is not None:
        found["recipe"] = released.recipe
    if not checkpoint.stem.isdigit() or "metrics.jsonl" not in names_in(run):
        return found
    try:
        rows = read_metrics(run / "metrics.jsonl")
        recipe = json.loads((run / "config.json").read_text()).get("recipe")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged: nothing is known then
        return found
    measured: dict[str, float] = {}
    for row in rows:
        if isinstance(row.get("step"), int) and row["step"] <= int(checkpoint.stem):
            measured |= {name: value for name, value in row.items() if name not in NOT_SCORES}
            measured["step"] = row["step"]
    if measured:
        found["measured"] = measured
    if recipe in recipe_names():
        found["recipe"] = recipe
    return found


def title_of(config: dict[str, Any]) -> str:
    """A line that says what a model is."""
    if config.get("kind") == "tokenizer":
        return f"{config.get('vq_model')}: an image tokenizer with {config.get('codebook_size')} codes"
    grid = config.get("grid")
    of = f" of {grid[0]}x{grid[1]} codes" if isinstance(grid, list) and len(grid) == 2 else ""
    what = "what a text says" if config.get("gpt_type") == "t2i" else f"{config.get('num_classes')} classes"
    return f"{config.get('gpt_model')}: draws {what} as images{of}"


def numbers(found: Any) -> dict[str, str]:
    """Name → number as text; what else a config says, which a stranger may have written, is left out."""
    sound = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, int | float)
             and not isinstance(value, bool) and math.isfinite(value)} if isinstance(found, dict) else {}
    return {plain(name)[:60].replace("|", " "): f"{value:.6g}" for name, value in sound.items()}


def two_columns(head: str, rows: dict[str, str]) -> list[str]:
    """A table of two columns in Markdown."""
    return [f"| {head} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


def published(recipe: Any) -> list[str]:
    """The section with the numbers published for a recipe."""
    if not isinstance(recipe, str) or recipe not in recipe_names():
        return []
    content = json.loads((FOLDER / f"{recipe}.json").read_text())
    expected = content.get("expected", {})
    rows = {name: value for name, value in expected.items() if name not in LEFT_OUT}
    for name, inner in list(rows.items()):
        if isinstance(inner, dict):
            rows.pop(name)
            for size, scores in inner.items():
                one = scores if isinstance(scores, dict) else {str(size): scores}
                rows |= {f"{score}, {name.replace('_', ' ')} {size if one is scores else ''}".strip(): value
                         for score, value in one.items()}
    if not rows:
        return []
    return ["## Published", "", f"For the recipe `{recipe}` ({content['title']}); not measured on these weights.", "",
            *two_columns("published", numbers(rows)), f"Source: {expected.get('source', 'see the recipe')}", ""]


def model_card(config: dict[str, Any], *, parameters: int, license: str | None = None) -> str:
    """The card of a model with this config.json; `license`: its licence as the hub calls it, of a released file known.
    """
    source = str(config.get("source") or "")
    released = RELEASED.get(source.rpartition(":")[2].rpartition("/")[2])
    license = license or (LICENSES.get(released.repository) if released is not None else None)
    tokenizer, text = config.get("kind") == "tokenizer", config.get("gpt_type") == "t2i"
    flag = "--vq-ckpt" if tokenizer else "--gpt-ckpt"
    name = "Tokenizer" if tokenizer else "ARPG" if str(config.get("gpt_model")).startswith("ARPG") else "GPT"
    front = ["---", "library_name: llamagen", *([f"license: {license}"] if license else []),
             *(["pipeline_tag: text-to-image"] if text else []), "tags:", "- image-generation", "- llamagen",
             *(["- arxiv:2503.10568"] if name == "ARPG" else ["- arxiv:2406.06525"]), "---", ""]
    facts = {"parameters": f"{parameters / 1e6:.1f}M", "weights": plain(str(config.get("dtype", "")))}
    made = config.get("tokenizer")
    if isinstance(made, dict):
        facts["tokenizer of its codes"] = plain(f"{made.get('name')}, weights {str(made.get('weights_sha256'))[:12]}")
    classes = config.get("classes")
    if isinstance(classes, list) and len(classes) <= 100:
        facts["classes"] = plain(", ".join(map(str, classes))).replace("|", " ")
    if source:
        facts["made from"] = plain(source)
    body = [MARK, "", f"# {plain(title_of(config))}", "", *two_columns("this model", facts), "## Use", "", "```python",
            f"from autoregressive.hub import {name}", f'model = {name}.from_pretrained("owner/name")  # or a folder',
            "```", "", f"Every command takes it as `{flag} owner/name`, or this folder.", ""]
    measured = numbers(config.get("measured"))
    if measured:
        body += ["## Measured", "", "By the training of these weights, at its last logged steps.", "",
                 *two_columns("measured", measured)]
    body += published(config.get("recipe"))
    licence = f"The licence of the weights is {license}." if license else \
        "The licence of the weights is not stated here: whoever trained them decides it."
    return "\n".join([*front, *body, "## Licence", "", licence, ""])


def is_own_card(path: Path) -> bool:
    """Whether a file is a card of ours that nobody has taken over."""
    try:
        return MARK in path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def write_card(folder: Path, config: dict[str, Any], *, parameters: int) -> None:
    """Write README.md into the folder of a saved model, unless there is one of somebody else."""
    path = folder / "README.md"
    if not exists(path) or is_own_card(path):
        with replacing(path) as temporary:
            temporary.write_text(model_card(config, parameters=parameters))
