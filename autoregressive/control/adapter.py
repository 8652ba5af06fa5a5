"""The control adapter: a ViT over a picture of edges, depth or segments → what is added to a model for each cell.

As in ControlAR (arXiv 2410.02705): one token of timm's ViT for each cell of the grid, through a small MLP to the width
of the model. An ARPG adds a cell's token to the query that asks for the cell, or takes it as the query; a GPT adds it
to the token that predicts the cell, before three of its layers, through an MLP of each. The last layers start at zero,
so that a model with a new adapter is the model without.

    attach(model, AdapterArgs("vit_small_patch16_224", patch=16, image_size=(256, 256)))
"""
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from autoregressive.models.base import CodeModel
from autoregressive.models.conditions import CaptionMLP
from utils.cli import flag, require_package

Mode = Literal["add", "replace"]
PREFIX = "control."  # of the adapter's names in a state dict
SMALL = 10**7  # weights of a model for which a small adapter is enough
MOST = 2**14  # of any size in a config, which a stranger may have written


@dataclass(frozen=True)
class AdapterArgs:
    """What shapes an adapter: timm's name of the ViT, how many of its layers (None: all), pixels per cell side, size of
    the pictures in pixels; whether the tokens are added, or replace an ARPG's queries."""

    vit: str
    patch: int
    image_size: tuple[int, int]
    layers: int | None = None
    mode: Mode = "add"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        numbers = (self.patch, *self.image_size, 1 if self.layers is None else self.layers)
        sound = all(type(number) is int and 0 < number <= MOST for number in numbers) and len(self.image_size) == 2
        if not sound or not isinstance(self.vit, str):
            raise ValueError(f"{self} is no control adapter: expected the name of a ViT and whole numbers above 0")
        if self.mode not in get_args(Mode):
            raise ValueError(f"--control-mode is {self.mode!r}, expected one of {', '.join(get_args(Mode))}")

    def described(self) -> dict[str, Any]:
        """JSON-ready, for `from_config`."""
        return {**asdict(self), "image_size": list(self.image_size)}

    @classmethod
    def from_config(cls, config: Any, source: str) -> "AdapterArgs":
        """From what a checkpoint says. Raises ValueError where it says nothing that makes sense."""
        names = cls.__dataclass_fields__.keys()
        try:
            return cls(**{name: config[name] for name in names})
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{source} has a control adapter ({PREFIX}…), but its config does not say which: expected "
                             f"control with {', '.join(names)}") from None


@dataclass(kw_only=True)
class AdapterFlags:
    """The adapter that --control trains."""

    control_vit: str | None = flag(None, "timm's name of the ViT that looks at control pictures; its patches become as "
                                         "large as a code's pixels; None: vit_small_patch16_224, for models of less "
                                         "than 10 million weights vit_tiny_patch16_224 with 2 layers")
    control_layers: int | None = flag(None, "layers of that ViT; None: all that it has")
    control_mode: Mode = flag("add", "its tokens are added to the model, which starts as it was; replace: they are an "
                                     "ARPG's queries", choices=get_args(Mode))
    control_pretrained: bool = flag(False, "the ViT begins with timm's pretrained weights (fetched from its hub), else "
                                           "with random ones")

    def check_adapter(self, control: str | None) -> None:
        """Raise ValueError for flags that are of no use without --control."""
        for name in ("control_vit", "control_layers", "control_mode", "control_pretrained"):
            if control is None and getattr(self, name) != AdapterFlags.__dataclass_fields__[name].default:
                raise ValueError(f"--{name.replace('_', '-')} is for --control: which kind of control pictures?")

    def adapter_args(self, model: CodeModel, *, patch: int, image_size: tuple[int, int]) -> AdapterArgs:
        """For a model; patch: pixels per code side."""
        small = sum(p.numel() for p in model.parameters()) < SMALL
        vit = self.control_vit or ("vit_tiny_patch16_224" if small else "vit_small_patch16_224")
        layers = 2 if small and self.control_vit is None and self.control_layers is None else self.control_layers
        return AdapterArgs(vit, patch, tuple(image_size), layers, self.control_mode)


class ControlAdapter(nn.Module):
    """Pictures (B, 1 or 3, H, W) in [-1, 1] → (places, B, L, D)."""

    def __init__(self, args: AdapterArgs, dim: int, *, layers: int) -> None:
        """dim: the model's width; layers: before how many of its layers something is added, 0: to the queries."""
        super().__init__()
        self.patch, self.replaces = args.patch, args.mode == "replace"
        self.vit = build_vit(args)
        self.tokens = CaptionMLP(self.vit.embed_dim, dim)
        self.injections = nn.ModuleList(CaptionMLP(dim, dim) for _ in range(layers))

    def zero_at_start(self) -> list[str]:
        """Names of the weights that start at zero: the last ones, but where the tokens replace what would be there."""
        if self.injections:
            return [f"injections.{i}.fc2.weight" for i in range(len(self.injections))]
        return [] if self.replaces else ["tokens.fc2.weight"]

    def forward(self, pictures: Tensor, grid: tuple[int, int]) -> Tensor:
        """See the class. Raises ValueError for pictures of another size than `grid` (h, w) cells."""
        size = tuple(side * self.patch for side in grid)
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or pictures.shape[2:] != size:
            raise ValueError(f"control pictures are {tuple(pictures.shape)}, expected (batch, 1 or 3, {size[0]}, "
                             f"{size[1]}): one cell is {self.patch} pixels")
        pictures = pictures.to(self.tokens.fc1.weight).expand(-1, 3, -1, -1)
        cells = self.vit.forward_features(pictures)[:, self.vit.num_prefix_tokens:]  # (B, L, width)
        tokens = self.tokens(cells)  # (B, L, D)
        return torch.stack([injection(tokens) for injection in self.injections] or [tokens])


def build_vit(args: AdapterArgs, *, pretrained: bool = False) -> nn.Module:
    """timm's ViT for pictures of any size, its table of positions for those of `args`. Raises ValueError for what is no
    plain ViT, and where pretrained weights cannot be had."""
    require_package("timm", purpose="a control adapter")
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(args.vit) or not args.vit.startswith("vit_"):  # no URL, no folder: a config may name it
        raise ValueError(f"--control-vit is {args.vit!r}, expected a plain ViT of timm such as vit_small_patch16_224")
    try:
        vit = timm.create_model(args.vit, pretrained=pretrained, num_classes=0, global_pool="",
                                img_size=args.image_size, patch_size=args.patch, dynamic_img_size=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"pretrained weights of {args.vit} could not be had ({reason}): leave --control-pretrained "
                         "out to begin with random ones") from None
    except TypeError:  # it takes no such arguments
        vit = None
    if not isinstance(vit, VisionTransformer) or list(vit.named_buffers()):
        raise ValueError(f"--control-vit {args.vit} is no plain ViT: choose one such as vit_small_patch16_224")
    if args.layers is not None:
        if args.layers > len(vit.blocks):
            raise ValueError(f"--control-layers is {args.layers}, {args.vit} has {len(vit.blocks)}")
        vit.blocks = vit.blocks[:args.layers]
    return vit


def attach(model: CodeModel, args: AdapterArgs) -> None:
    """Give a model an adapter, without values where the model is on the meta device. Its other names stay."""
    if model.config.model_type != "c2i":
        raise ValueError("control is for models that are conditioned on classes")
    if args.mode == "replace" and not model.any_order:
        raise ValueError("--control-mode replace is for ARPG, whose queries it replaces: a GPT takes add")
    with next(model.parameters()).device:
        model.control = ControlAdapter(args, model.config.dim, layers=len(model.control_layers))
    model.control.train(model.training)


def pretrained_values(args: AdapterArgs) -> dict[str, Tensor]:
    """timm's pretrained weights of the ViT by their names in the model, fetched on first use."""
    return {f"{PREFIX}vit.{name}": value for name, value in build_vit(args, pretrained=True).state_dict().items()}
