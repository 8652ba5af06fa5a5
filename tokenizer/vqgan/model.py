"""The ImageNet VQGANs of taming-transformers (arXiv 2012.09841), as our VQModel.

The layers are those of VQ-16 with a codebook of 256 dimensions that is not normalised; only the names differ.
"""
import re
from dataclasses import replace

import torch

from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_model import PRESETS, VQConfig, VQModel
from utils.checkpoints import containers

VQGANS: dict[str, VQConfig] = {
    f"vqgan_imagenet_f16_{size}": replace(PRESETS["VQ-16"], codebook_size=size, codebook_embed_dim=256,
                                          codebook_l2_norm=False) for size in (1024, 16384)}


def load_vqgan(name: str, path: str | None, *, device: torch.device) -> VQModel:
    """The VQGAN of a taming-transformers checkpoint (Lightning's, with or without its loss), in eval mode.

    Raises ValueError or FileNotFoundError when `path` is not given, not there, or does not hold that model.
    """
    if path is None:
        raise ValueError(f"--vqgan {name} needs --local-weights: the file last.ckpt that taming-transformers "
                         "published under this name")
    model = VQModel(VQGANS[name])
    state = containers.weights(containers.read(path), path)
    levels = len(model.config.decoder_ch_mult)
    ours = {from_taming(key, levels): value for key, value in state.items() if not key.startswith("loss.")}
    ours["quantize.codebook_used"] = model.quantize.codebook_used  # taming keeps no such record
    containers.load_strict(model, ours, path)
    return to_channels_last(model.eval().requires_grad_(False).to(device))


def from_taming(key: str, levels: int) -> str:
    """Our name of a taming weight. Its decoder counts levels from the output, ours from the input."""
    key = re.sub(r"^encoder\.down\.(\d+)", r"encoder.conv_blocks.\1", key)
    key = re.sub(r"^decoder\.up\.(\d+)", lambda found: f"decoder.conv_blocks.{levels - 1 - int(found[1])}", key)
    key = re.sub(r"^(\w+\.conv_blocks\.\d+)\.block\.", r"\1.res.", key)
    for place, middle in enumerate(("block_1", "attn_1", "block_2")):
        key = key.replace(f".mid.{middle}.", f".mid.{place}.")
    return key
