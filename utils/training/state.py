"""What a training checkpoint holds, by name: {"model.…", "ema.…", "optimizer.<parameter>.<moment>", …} → tensors.

The tensors are those that the run works with, whole or sharded, so reading a checkpoint means filling them.
"""
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import dist
from utils.checkpoints import containers, llamagen_fsdp, sharded
from utils.files import first_line
from utils.finite import check_finite
from utils.training import parallel
from utils.training.ema import EMA
from utils.training.loss_scale import LossScale

OPTIMIZER_KEYS = {"model": "optimizer", "discriminator": "optimizer_disc"}  # names in LlamaGen's checkpoint files
IS_OF_RANK = re.compile(r"^\w+@\d+\.")  # a name that `_name_of_rank` gives
FRESH_START = "to start from its weights alone, see --finetune and --init-from"


class TrainingState:
    """Modules, optimizers, averages and loss scale of a run."""

    def __init__(self, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], *, ema: EMA | None,
                 scale: LossScale, rank: int) -> None:
        self.modules, self.optimizers, self.ema, self.scale, self.rank = modules, optimizers, ema, scale, rank

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as this process holds it. The names are the same on all processes."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
            for parameter_name, parameter in module.named_parameters():
                for key, value in self.optimizers[name].state.get(parameter, {}).items():
                    found[f"{OPTIMIZER_KEYS[name]}.{parameter_name}.{key}"] = value
        if self.ema is not None:
            found |= {f"ema.{name}": value for name, value in self.ema.averages.items()}
        if self.scale.enabled:
            found |= {"scaler.scale": self.scale.scale, "scaler.streak": self.scale.streak}
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Those of `tensors` that forward passes may change, and so may differ between processes."""
        return {f"{name}.{key}": value for name, module in self.modules.items()
                for key, value in module.named_buffers()}

    def to_save(self) -> dict[str, Tensor]:
        """`tensors` by the names that a checkpoint gives them. All processes must ask at once.

        A buffer of process r that is not as process 0 has it is `name@r.…` in place of `name.…`.
        """
        found = self.tensors()
        own = {name: _digest(value) for name, value in self.buffers().items() if name in found}
        first = dist.broadcast_object(own)
        return {_name_of_rank(name, self.rank) if own.get(name) != first.get(name) else name: value
                for name, value in found.items()}

    def load(self, path: Path) -> dict[str, Any]:
        """Fill everything from a training checkpoint, a folder of ours, LlamaGen's file or FSDP folder → other facts.

        All processes call this together, and raise together: ValueError naming what does not fit or is not finite.
        Averages start at the weights when the checkpoint has none; a process that the checkpoint does not know takes
        process 0's buffers. The moments of an FSDP folder without a whole optimizer stay as they are, and the facts
        have a "note" about it.
        """
        with dist.failing_together():
            folder = sharded.is_sharded(path)
            of_fsdp = llamagen_fsdp.folder_of(path)
            content = sharded.read_facts(path) if folder else (
                containers.read(path) if of_fsdp is None else llamagen_fsdp.read_consolidated(of_fsdp))
            values = None if folder else self.flat(content, path)
        lacking = self.add_moments(values, of_fsdp)
        if lacking:
            content["note"] = f"the optimizer begins anew, its moments could not be taken from {of_fsdp}: {lacking}"
        with dist.failing_together():
            sizes = sharded.sizes_in(path) if values is None else {name: value.shape for name, value in values.items()}
            self.check(sizes, content, path)
            averaged = any(name.startswith("ema.") for name in sizes)
            wanted = {name: own for name, own in self.tensors().items()
                      if not (name.startswith("ema.") and not averaged)
                      and not (name.startswith("optimizer.") and lacking)
                      and not (name.startswith("scaler.") and name not in sizes)}  # trained in another precision
            self.compare(wanted, sizes, path)
            sources = {name: of_rank if (of_rank := _name_of_rank(name, self.rank)) in sizes else name
                       for name in wanted}
        if values is None:
            sharded.load_into(path, {sources[name]: own for name, own in wanted.items()})
        else:
            for name, own in wanted.items():
                value = values[sources[name]]
                parallel.copy_whole_into(own, value.whole() if isinstance(value, llamagen_fsdp.Pieces) else value)
        with dist.failing_together():
            check_finite({name: parallel.local_part(own) for name, own in wanted.items()}, path)
        if self.ema is not None and not averaged:
            self.ema.restart()
        return content

    def check(self, sizes: dict[str, torch.Size], content: dict[str, Any], path: Path) -> None:
        """Raise ValueError for what is no training checkpoint of this kind."""
        for name in self.modules:
            there = [any(key.startswith(f"{part}.") for key in sizes) for part in (name, OPTIMIZER_KEYS[name])]
            if "steps" not in content or not (all(there) or (there[0] and "note" in content)):
                raise ValueError(f"{path} has no {name} with its optimizer: it is no training checkpoint of this kind "
                                 f"({FRESH_START})")

    @staticmethod
    def compare(wanted: dict[str, Tensor], sizes: dict[str, torch.Size], path: Path) -> None:
        """Raise ValueError naming tensors that are missing, too many or of another shape."""
        problems = [f"missing {name}" for name in wanted if name not in sizes]
        problems += [f"unexpected {name}" for name in sizes
                     if name not in wanted and not IS_OF_RANK.search(name) and not name.startswith(("ema.", "scaler."))]
        problems += [f"{name} is {tuple(sizes[name])}, expected {tuple(own.shape)}"
                     for name, own in wanted.items() if name in sizes and sizes[name] != own.shape]
        containers.refuse(problems, path, "this run")

    def add_moments(self, values: dict[str, Any] | None, folder: Path | None) -> str:
        """Add the optimizer's tensors of LlamaGen's FSDP folder, if it is one, to `values`.

        Returns why there are none to take, the same on all processes; "" if they are there, or `folder` is none.
        """
        if folder is None:
            return ""
        shapes = {name: p.shape for name, p in self.modules["model"].named_parameters() if p.requires_grad}
        found, lacking = {}, []
        try:
            found = llamagen_fsdp.moments(folder, shapes)
        except (OSError, ValueError) as error:
            lacking = [first_line(error)]
        except (LookupError, TypeError, AttributeError) as error:
            lacking = [f"its optimizer files are no AdamW state dicts ({type(error).__name__}: {first_line(error)})"]
        lacking = dist.gather_lists(lacking)
        if not lacking:
            values |= {f"optimizer.{name}": value for name, value in found.items()}
        return lacking[0] if lacking else ""

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
                trained = [key for key, parameter in module.named_parameters() if parameter.requires_grad]
                in_one = sizes_of(saved["param_groups"]) == [len(trained)]  # as LlamaGen trains its tokenizer
                if not in_one and sizes_of(saved["param_groups"]) != sizes_of(groups):
                    raise ValueError(f"{path} holds an optimizer of other parameter groups ({FRESH_START})")
                numbers = [number for group in saved["param_groups"] for number in group["params"]]
                own = trained if in_one else [names[parameter] for group in groups for parameter in group["params"]]
                for number, key in zip(numbers, own, strict=True):
                    moments = saved["state"].get(number, {})
                    if not saved["state"]:  # it has not made a step yet: our own moments, which are zero
                        moments = self.optimizers[name].state[module.get_parameter(key)]
                    found |= {f"{OPTIMIZER_KEYS[name]}.{key}.{moment}": torch.as_tensor(value, dtype=torch.float32)
                              for moment, value in moments.items()}
        return found


def sizes_of(groups: list[dict[str, Any]]) -> list[int]:
    """How many parameters each group has."""
    return [len(group["params"]) for group in groups]


def _name_of_rank(name: str, rank: int) -> str:
    """What a buffer of a process that differs from process 0's is called: "model.x" → "model@2.x"."""
    module, rest = name.split(".", 1)
    return f"{module}@{rank}.{rest}"


def _digest(tensor: Tensor) -> str:
    """A hash of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
