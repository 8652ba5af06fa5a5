"""Small models with weights that are always the same, as files that a server loads: a GPT, an ARPG, a GPT of text."""
import json
from pathlib import Path

import torch

from autoregressive.models.registry import MODELS, recorded_options
from autoregressive.serve.served import ServedModel, ServeFlags, served_models
from tests.autoregressive.sample.editing import CLASSES, GRID, SIZE
from tests.data.references import filled
from tokenizer.tokenizer_image.vq_model import VQ_models

__all__ = ["CLASSES", "GRID", "SIZE"]
PREFIX, WIDTH = 16, 384  # of the text model: MiniLM's features


def save_models(folder: Path) -> Path:
    """Write the files, and the list of models that names them; its path."""
    tokenizer = filled(VQ_models["VQ-4-S"], "edit").state_dict()
    torch.save({"model": tokenizer, "config": {"vq_model": "VQ-4-S"}}, folder / "vq.pt")
    entries = []
    for name, text in (("GPT-S", False), ("ARPG-S", False), ("GPT-S", True)):
        sizes = {"vocab_size": 256, "grid": GRID, **({"model_type": "t2i", "caption_dim": WIDTH,
                                                      "cls_token_num": PREFIX} if text else {"num_classes": 3})}
        model, file = filled(MODELS[name], "text" if text else "edit", **sizes), f"{name}{'-text' * text}.pt"
        config = {"gpt_model": name, "grid": list(GRID), **recorded_options(name, {})}
        if name.startswith("ARPG"):
            config["class_at_origin"] = model.prefix_at_origin
        config |= {"gpt_type": "t2i", "cls_token_num": PREFIX, "caption_dim": WIDTH,
                   "text_encoder": {"name": "minilm"}} if text else {"classes": CLASSES}
        torch.save({"model": model.state_dict(), "config": config}, folder / file)
        entries.append({"name": {"GPT-S": "gpt", "ARPG-S": "arpg"}[name] if not text else "text", "cfg-scale": 3.0,
                        "gpt-ckpt": str(folder / file), "vq-ckpt": str(folder / "vq.pt"), "precision": "none",
                        "top-k": 0})
    (folder / "models.json").write_text(json.dumps(entries))
    return folder / "models.json"


def listed_models(path: Path) -> list[ServedModel]:
    """The models of a list."""
    return served_models(ServeFlags(models=str(path)))
