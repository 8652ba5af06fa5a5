"""Write a checkpoint's weights for other programs: safetensors with a config.json, or one of LlamaGen's layouts.

    python3 autoregressive/train/export.py --gpt-ckpt results/000-GPT-B --output my_gpt

Takes any checkpoint, a GPT's or (--vq-ckpt) a tokenizer's: its averaged weights if it has them, LoRA adapters merged.
Every command of this project reads the result; config.json describes the model, so that no other flags are needed.
"""
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.models.registry import recorded_options
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_gpt
from autoregressive.train.config import GPTFlags
from tokenizer.build import TokenizerFlags, fingerprint, load_tokenizer
from utils import cli, files
from utils.checkpoints import containers
from utils.cli import flag
from utils.options import OutputFlags

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(kw_only=True)
class ExportFlags(GPTFlags, TokenizerFlags, OutputFlags):
    """The export command. The flags that describe a model are for files that do not describe it themselves."""

    output: str = "export"
    format: Literal["safetensors", "llamagen", "consolidated"] = flag(
        "safetensors", "safetensors: <output>/model.safetensors and config.json; llamagen: <output>.pt with "
        "{\"model\": …}; consolidated: <output>/consolidated.pth, the bare state dict",
        choices=("safetensors", "llamagen", "consolidated"))
    dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "type of the weights in the file", choices=tuple(DTYPES))


def load_model(flags: ExportFlags) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the CPU, loaded as for sampling, and the content of config.json."""
    if (flags.gpt_ckpt is None) == (flags.vq_ckpt is None):
        raise ValueError("which checkpoint? Give --gpt-ckpt or --vq-ckpt, one of them")
    if flags.vq_ckpt is not None:
        name, tokenizer = load_tokenizer(flags, device=CPU)
        config = {"kind": "tokenizer", "vq_model": name, "codebook_size": tokenizer.config.codebook_size,
                  "codebook_embed_dim": tokenizer.config.codebook_embed_dim,
                  "codebook_l2_norm": tokenizer.config.codebook_l2_norm,
                  "weights_sha256": tokenizer.rounded_from or fingerprint(tokenizer)}  # for copies in fewer bits
        return tokenizer, config
    options = {field.name: getattr(flags, field.name) for field in fields(GPTFlags)}
    gpt, saved = load_gpt(SampleFlags(**options, precision="none"), device=CPU)
    config = {"gpt_model": flags.gpt_model or "GPT-B", "gpt_type": flags.gpt_type, **saved, "kind": "gpt",
              "vocab_size": gpt.config.vocab_size, "cls_token_num": gpt.config.cls_token_num}
    if gpt.config.model_type == "c2i":
        config["num_classes"] = gpt.config.num_classes
    else:
        config |= {"num_classes": None, "caption_dim": gpt.config.caption_dim}
    if flags.image_size is not None:
        config["grid"] = [side // (flags.downsample_size or 16) for side in flags.image_size]
    config.pop("lora", None)
    return gpt, config


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


def main(flags: ExportFlags) -> None:
    """Load, convert, write."""
    model, config = load_model(flags)
    if flags.format == "consolidated":
        check_bare(config)
    source = flags.gpt_ckpt or flags.vq_ckpt
    state = convert(model, DTYPES[flags.dtype])
    config |= {"dtype": flags.dtype, "source": Path(source).name, "source_sha256": containers.content_hash(source)}
    output = Path(flags.output)
    if flags.format == "safetensors":
        path = write_safetensors(output, state, config)
    elif flags.format == "llamagen":  # LlamaGen reads "model" only; the config saves our own commands the flags
        path = output if output.suffix == ".pt" else output.with_name(f"{output.name}.pt")
        containers.save({"model": state, "config": config}, path)
    else:
        path = output / "consolidated.pth"
        containers.save(state, path)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters of {source} in {flags.dtype}: {path}")


if __name__ == "__main__":
    cli.run(main, ExportFlags)
