"""Write a checkpoint's weights for other programs: safetensors with a config.json, or one of LlamaGen's layouts.

    python3 autoregressive/train/export.py --gpt-ckpt results/000-GPT-B --output my_gpt
    python3 autoregressive/train/export.py --released pretrained_models --output converted

Takes any checkpoint, a GPT's or (--vq-ckpt) a tokenizer's: its averaged weights if it has them, LoRA adapters merged.
Every command of this project reads the result; config.json describes the model, so that no other flags are needed. The
folders of safetensors are those that autoregressive/hub.py loads and saves.
"""
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.model_card import training_record, write_card
from autoregressive.models.base import CodeModel
from autoregressive.models.registry import facts_of, recorded_options
from autoregressive.released import RELEASED
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_gpt
from autoregressive.train.config import GPTFlags
from tokenizer.build import TokenizerFlags, fingerprint, load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli, files
from utils.checkpoints import containers
from utils.checkpoints.hub import HubName, hub_name, known_as
from utils.cli import flag
from utils.options import OutputFlags

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class ExportFlags(GPTFlags, TokenizerFlags, OutputFlags):
    """The export command. The flags that describe a model are for files that do not describe it themselves."""

    gpt_type: Literal["c2i", "t2i"] | None = None
    output: str = "export"
    released: str | None = flag(None, "convert all files with names of released ones (c2i_B_256.pt, vq_ds16_c2i.pt, "
                                      "arpg_300m.pt, …) in this folder, or repository of the hub, each to "
                                      "<output>/<name>")
    format: Literal["safetensors", "llamagen", "consolidated"] = flag(
        "safetensors", "safetensors: <output>/model.safetensors and config.json; llamagen: <output>.pt with "
        "{\"model\": …}; consolidated: <output>/consolidated.pth, the bare state dict",
        choices=("safetensors", "llamagen", "consolidated"))
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "type of the weights in the file", choices=tuple(DTYPES))


def load_model(flags: ExportFlags) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the CPU, loaded as for sampling, and the content of config.json."""
    if (flags.gpt_ckpt is None) == (flags.vq_ckpt is None):
        raise ValueError("which checkpoint? Give --gpt-ckpt or --vq-ckpt, one of them")
    source = flags.gpt_ckpt or flags.vq_ckpt
    known = {"source": str(hub_name(source) or Path(source).name)} | training_record(source, containers.resolve(source))
    if flags.vq_ckpt is not None:
        name, tokenizer = load_tokenizer(flags, device=CPU)
        said = containers.saved_config(containers.read(source))
        kept = {name: said[name] for name in ("measured", "recipe") if name in said}
        return tokenizer, described_tokenizer(tokenizer, {"vq_model": name} | kept | known)
    options = {field.name: getattr(flags, field.name) for field in fields(GPTFlags)}
    gpt, saved = load_gpt(SampleFlags(**options, precision="none"), device=CPU)
    if flags.image_size is not None:
        saved["grid"] = [side // (flags.downsample_size or 16) for side in flags.image_size]
    return gpt, described_gpt(gpt, saved | known)


def described_tokenizer(tokenizer: VQModel, saved: dict[str, Any]) -> dict[str, Any]:
    """config.json of a tokenizer; `saved`: what is known beside its weights."""
    config = tokenizer.config
    return saved | {"kind": "tokenizer", "codebook_size": config.codebook_size,
                    "codebook_embed_dim": config.codebook_embed_dim, "codebook_l2_norm": config.codebook_l2_norm,
                    "weights_sha256": tokenizer.rounded_from or fingerprint(tokenizer)}  # for copies in fewer bits


def described_gpt(gpt: CodeModel, saved: dict[str, Any]) -> dict[str, Any]:
    """The same of a GPT or an ARPG."""
    config = gpt.config
    found = {"gpt_model": facts_of(gpt.state_dict()).name(), **saved, "kind": "gpt", "gpt_type": config.model_type,
             "vocab_size": config.vocab_size, "cls_token_num": config.cls_token_num}
    if config.model_type == "c2i":
        found["num_classes"] = config.num_classes
    else:
        found |= {"num_classes": None, "caption_dim": config.caption_dim}
    if gpt.any_order:
        found["class_at_origin"] = config.class_at_origin
    found.pop("lora", None)
    return found


def check_bare(config: dict[str, Any]) -> None:
    """Raise ValueError for a model that would be taken for another where its config is not beside its weights."""
    name = config.get("gpt_model")
    for option, value in recorded_options(name, {}).items():
        if config[option] != value:
            raise ValueError(f"--format consolidated holds weights alone, of which an {name} is taken to have {option} "
                             f"{value}, and this one has {config[option]}: give --format safetensors or llamagen")


def convert(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict with its parameters in `dtype`; buffers (such as the codes that were used last) keep theirs."""
    parameters = dict(model.named_parameters())
    return {name: (value.to(dtype) if name in parameters else value).contiguous()
            for name, value in model.state_dict().items()}


def write_safetensors(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write config.json, then model.safetensors: where there are weights, there is their description."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with files.replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "model.safetensors"
    with files.replacing(path) as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {files.first_line(error)}: is the disk full?") from None
    return path


def write_folder(folder: Path, model: nn.Module, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Write a folder that `from_pretrained` and every command read: weights, config.json, a model card."""
    path = write_safetensors(folder, state, config)
    write_card(folder, config, parameters=sum(p.numel() for p in model.parameters()))
    return path


def released_in(place: str) -> list[str]:
    """The files with names of released ones in a folder, or of a repository of the hub. Raises ValueError for none."""
    name = hub_name(place)
    if name is not None:
        found = [str(HubName(name.repository, file, name.revision)) for file, one in RELEASED.items()
                 if one.repository == name.repository]
    else:
        found = [str(Path(place) / file) for file in RELEASED if files.exists(Path(place) / file)]
    if not found:
        raise ValueError(f"--released {place}: there is no file with the name of a released one, such as "
                         f"{files.few(list(RELEASED))}; repositories are "
                         f"{', '.join(sorted({one.repository for one in RELEASED.values()}))}")
    return found


def main(flags: ExportFlags) -> None:
    """Load, convert, write."""
    if flags.released is None:
        export(flags)
        return
    if flags.gpt_ckpt is not None or flags.vq_ckpt is not None or flags.gpt_model or flags.image_size:
        raise ValueError("--released says which checkpoints, and their names say what they are: leave --gpt-ckpt, "
                         "--vq-ckpt, --gpt-model and --image-size out")
    for given in released_in(flags.released):
        file = known_as(given)
        which = "vq_ckpt" if RELEASED[file].tokenizer is None else "gpt_ckpt"
        export(replace(flags, **{which: given}, output=str(Path(flags.output) / Path(file).stem)))


def export(flags: ExportFlags) -> None:
    """Convert one checkpoint."""
    model, config = load_model(flags)
    if flags.format == "consolidated":
        check_bare(config)
    source = flags.gpt_ckpt or flags.vq_ckpt
    state = convert(model, DTYPES[flags.dtype])
    config |= {"dtype": flags.dtype, "source_sha256": containers.content_hash(source)}
    output = Path(flags.output)
    if flags.format == "safetensors":
        path = write_folder(output, model, state, config)
    elif flags.format == "llamagen":  # LlamaGen reads "model" only; the config saves our own commands the flags
        path = output if output.suffix == ".pt" else output.with_name(f"{output.name}.pt")
        containers.save({"model": state, "config": config}, path)
    else:
        path = output / "consolidated.pth"
        containers.save(state, path)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters of {source} in {flags.dtype}: {path}")


if __name__ == "__main__":
    cli.run(main, ExportFlags)
