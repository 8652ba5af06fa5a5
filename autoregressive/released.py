"""The released files by name: what their tensors do not say, and where on the hub they lie.

Presets, classes and vocabulary are seen in the weights; the size of the images is in a file's name alone.
"""
from dataclasses import dataclass
from pathlib import Path

from autoregressive.models.registry import StateFacts
from utils.checkpoints.hub import hub_name, known_as

LLAMAGEN, LLAMAGEN_TEXT, ARPG_HOME = "FoundationVision/LlamaGen", "peizesun/llamagen_t2i", "hp-l33/ARPG"


@dataclass(frozen=True)
class Released:
    """A released file."""

    repository: str
    model: str  # its preset
    recipe: str  # that has its published numbers, see scripts/recipes
    size: int = 256  # of the images, in pixels
    tokenizer: str | None = None  # the file of the tokenizer whose codes it draws; None: it is one


RELEASED = {
    "vq_ds16_c2i.pt": Released(LLAMAGEN, "VQ-16", "vq_16"),
    "vq_ds8_c2i.pt": Released(LLAMAGEN, "VQ-8", "vq_8"),
    "vq_ds16_t2i.pt": Released(LLAMAGEN_TEXT, "VQ-16", "vq_16"),
    **{f"c2i_{name}_{size}.pt": Released(LLAMAGEN, f"GPT-{name}", f"c2i_{name}_{size}", size, "vq_ds16_c2i.pt")
       for name, size in (("B", 256), ("B", 384), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))},
    "t2i_XL_stage1_256.pt": Released(LLAMAGEN_TEXT, "GPT-XL", "t2i_XL_256", 256, "vq_ds16_t2i.pt"),
    "t2i_XL_stage2_512.pt": Released(LLAMAGEN_TEXT, "GPT-XL", "t2i_XL_512", 512, "vq_ds16_t2i.pt"),
    **{f"arpg_{weights}.pt": Released(ARPG_HOME, model, f"{model.replace('ARPG-', 'arpg_')}_256", 256, "vq_ds16_c2i.pt")
       for weights, model in (("300m", "ARPG-L"), ("700m", "ARPG-XL"), ("1b", "ARPG-XXL"))},
}
LICENSES = {LLAMAGEN: "mit", LLAMAGEN_TEXT: "mit"}  # of repositories whose licence is known
PATCH = 16  # pixels along a code's side, of all released models of codes


def released_grid(path: str | Path, facts: StateFacts) -> dict[str, list[int]]:
    """{"grid": [h, w]} of a file that has the name and the preset of a released one, else nothing."""
    known = RELEASED.get(known_as(path))
    if known is None or known.tokenizer is None or facts.preset() != known.model:
        return {}
    return {"grid": [known.size // PATCH] * 2}


def tokenizer_of(path: str | Path) -> str | None:
    """Where the tokenizer of a released file lies: beside it if that is here, else on the hub. None for other files."""
    known = RELEASED.get(known_as(path))
    if known is None or known.tokenizer is None:
        return None
    beside = Path(path).with_name(known.tokenizer)
    if hub_name(path) is None and beside.exists():
        return str(beside)
    return f"{RELEASED[known.tokenizer].repository}:{known.tokenizer}"
