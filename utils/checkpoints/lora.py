"""Low-rank adapters in a state dict, as peft names them, and what they come to (LoRA, arXiv 2106.09685).

An adapted matrix W stands in the file as `<layer>.base_layer.weight` beside `<layer>.lora_A.default.weight` (rank, in)
and `<layer>.lora_B.default.weight` (out, rank). peft itself is not needed to read it.
"""
from typing import Any

from torch import Tensor

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def plain_name(name: str) -> str:
    """What a tensor is called in the model without adapters."""
    return name.replace(BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a tensor is there only because of the adapters."""
    return DOWN in name or UP in name


def merge_lora(state: dict[str, Tensor], config: dict[str, Any], *, source: object) -> dict[str, Tensor]:
    """W + alpha / rank * B A under the plain names, added in fp32 and kept in W's type; without adapters: `state`.

    `config` is that of the checkpoint, its entry "lora" has rank and alpha. Raises ValueError, naming `source`, when
    that entry or half of an adapter is missing.
    """
    if not any(is_adapter(name) or BASE in name for name in state):
        return state
    lora = config.get("lora")
    if not isinstance(lora, dict) or not {"rank", "alpha"} <= lora.keys():
        raise ValueError(f"{source} holds LoRA adapters, but its config does not say their rank and alpha")
    merged = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        if BASE in name:
            down, up = (state.get(name.replace(BASE, part)) for part in (DOWN, UP))
            if down is None or up is None:
                raise ValueError(f"{source} holds {name} without both of its LoRA matrices")
            value = (value.float() + lora["alpha"] / lora["rank"] * (up.float() @ down.float())).to(value.dtype)
        merged[plain_name(name)] = value
    return merged
