"""What a training checkpoint holds, by name: {"model.…", "ema.…", "optimizer.<parameter>.<moment>", …} → tensors.

The tensors are those that the run works with, whole or sharded, so reading a checkpoint means filling them.
"""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoints import containers, sharded
from utils.training import parallel
from utils.training.ema import EMA
from utils.training.loss_scale import LossScale

OPTIMIZER_KEYS = {"model": "optimizer", "discriminator": "optimizer_disc"}  # names in LlamaGen's checkpoint files
FRESH_START = "to start from its weights alone, see --finetune and --init-from"


class TrainingState:
    """Modules, optimizers, averages and loss scale of a run."""

    def __init__(self, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], *, ema: EMA | None,
                 scale: LossScale, rank: int) -> None:
        self.modules, self.optimizers, self.ema, self.scale, self.rank = modules, optimizers, ema, scale, rank

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as this process holds it. Buffers differ between processes: those of rank r > 0 are `name@r.…`"""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            buffers = {key for key, _ in module.named_buffers()}
            for key, value in module.state_dict().items():
                found[f"{name}@{self.rank}.{key}" if self.rank and key in buffers else f"{name}.{key}"] = value
            for parameter_name, parameter in module.named_parameters():
                for key, value in self.optimizers[name].state.get(parameter, {}).items():
                    found[f"{OPTIMIZER_KEYS[name]}.{parameter_name}.{key}"] = value
        if self.ema is not None:
            found |= {f"ema.{name}": value for name, value in self.ema.averages.items()}
        if self.scale.enabled:
            found |= {"scaler.scale": self.scale.scale, "scaler.streak": self.scale.streak}
        return found

    def load(self, path: Path) -> dict[str, Any]:
        """Fill everything from a training checkpoint, a folder of ours or a file of LlamaGen's → its other facts.

        Raises ValueError naming what does not fit. Averages that the checkpoint has not start at the weights.
        """
        folder = sharded.is_sharded(path)
        content = sharded.read_facts(path) if folder else containers.read(path)
        values = None if folder else self.flat(content, path)
        sizes = sharded.sizes_in(path) if values is None else {name: value.shape for name, value in values.items()}
        self.check(sizes, content, path)
        self.make_moments(sizes)
        wanted: dict[str, Tensor] = {}
        for name, own in self.tensors().items():
            if name in sizes or not name.startswith(("ema.", "scaler.")):
                source = name if name in sizes else name.replace(f"@{self.rank}.", ".", 1)
                wanted[source] = own
        self.compare(wanted, sizes, path)
        if values is None:
            sharded.load_into(path, wanted)
        else:
            for name, own in wanted.items():
                parallel.copy_whole_into(own, values[name])
        if self.ema is not None:
            self.ema.restart(name for name in self.ema.averages if f"ema.{name}" not in sizes)
        return content

    def check(self, sizes: dict[str, torch.Size], content: dict[str, Any], path: Path) -> None:
        """Raise ValueError for what is no training checkpoint of this kind."""
        for name in self.modules:
            there = [any(key.startswith(f"{part}.") for key in sizes) for part in (name, OPTIMIZER_KEYS[name])]
            if "steps" not in content or not there[0] or (content["steps"] > 0 and not there[1]):
                raise ValueError(f"{path} has no {name} with its optimizer: it is no training checkpoint of this kind "
                                 f"({FRESH_START})")

    def make_moments(self, sizes: dict[str, torch.Size]) -> None:
        """Create the optimizer's tensors that a checkpoint has, to be filled."""
        for name, module in self.modules.items():
            optimizer = self.optimizers[name]
            trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            for parameter_name, parameter in module.named_parameters():
                prefix = f"{OPTIMIZER_KEYS[name]}.{parameter_name}."
                keys = [key.removeprefix(prefix) for key in sizes if key.startswith(prefix)]
                if parameter in trained:
                    optimizer.state[parameter] = {
                        key: torch.zeros_like(parameter, requires_grad=False) if key != "step" else
                        torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else "cpu")
                        for key in keys}

    @staticmethod
    def compare(wanted: dict[str, Tensor], sizes: dict[str, torch.Size], path: Path) -> None:
        """Raise ValueError naming tensors that are missing, too many or of another shape."""
        problems = [f"missing {name}" for name in wanted if name not in sizes]
        problems += [f"unexpected {name}" for name in sizes
                     if name not in wanted and "@" not in name
                     and not name.startswith(("ema.", "scaler.", "optimizer"))]
        problems += [f"{name} is {tuple(sizes[name])}, expected {tuple(own.shape)}"
                     for name, own in wanted.items() if name in sizes and sizes[name] != own.shape]
        containers.refuse(problems, path, "this run")

    def flat(self, content: dict[str, Any], path: Path) -> dict[str, Tensor]:
        """The tensors of a one-file checkpoint ({"model", "optimizer", …}) by our names."""
        found: dict[str, Tensor] = {}
        for part in ("model", "discriminator", "ema"):
            if part in content:
                state = containers.weights(content, path, prefer=(part,))
                found |= {f"{part}.{name}": value for name, value in state.items()}
        for name, module in self.modules.items():
            saved = content.get(OPTIMIZER_KEYS[name])
            if isinstance(saved, dict) and "param_groups" in saved:  # moments are numbered in the order of the groups
                names = {parameter: key for key, parameter in module.named_parameters()}
                groups = self.optimizers[name].param_groups
                if sizes_of(saved["param_groups"]) != sizes_of(groups):
                    raise ValueError(f"{path} holds an optimizer of other parameter groups ({FRESH_START})")
                numbers = [number for group in saved["param_groups"] for number in group["params"]]
                own = [names[parameter] for group in groups for parameter in group["params"]]
                for number, key in zip(numbers, own, strict=True):
                    found |= {f"{OPTIMIZER_KEYS[name]}.{key}.{moment}": torch.as_tensor(value, dtype=torch.float32)
                              for moment, value in saved["state"].get(number, {}).items()}
        return found


def sizes_of(groups: list[dict[str, Any]]) -> list[int]:
    """How many parameters each group has."""
    return [len(group["params"]) for group in groups]
