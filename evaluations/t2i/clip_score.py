"""CLIP score: how well pictures fit their captions, by the cosine of CLIP's embeddings (arXiv 2103.00020, 2104.08718).

As in LlamaGen, which took it from GigaGAN's evaluation: the mean cosine itself, neither scaled by 100 or 2.5 nor
clipped at 0; "A photo depicts " is put before captions; rounding lowers some pixels by one level (`through_floats`).
"""
import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_tensor

from evaluations.c2i.inception import exact_fp32
from evaluations.c2i.inception_weights import is_torchscript, load_torchscript
from evaluations.t2i.sample_folder import Squares, share_of
from utils import dist, files
from utils.checkpoints import containers

PREFIX = "A photo depicts "
CLIP_PROTOCOL = f"mean cosine; '{PREFIX}' + caption; centre square, LANCZOS, truncated to 8 bits (GigaGAN)"
OPENAI = "ViT-B/32"
CLIP_MODELS = {  # name in the protocol: open_clip's names of architecture and weights
    OPENAI: ("ViT-B-32-quickgelu", "openai"),  # its plain ViT-B-32 has another activation than these weights
    "ViT-g-14": ("ViT-g-14", "laion2b_s12b_b42k"),
}
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in the state of OpenAI's TorchScript files


@dataclass(frozen=True)
class ClipNetwork:
    """A CLIP model in eval mode with its preprocessing."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]  # → (3, H, W)
    tokenize: Callable[[list[str]], Tensor]  # → (B, context length), cut with the end-of-text token last
    dtype: torch.dtype
    described: dict[str, str]

    @torch.inference_mode()
    @exact_fp32()
    def cosines(self, views: Tensor, captions: list[str]) -> Tensor:
        """Preprocessed pictures (B, 3, H, W) and as many captions → cosines (B,), float32, on the CPU."""
        device = self.model.logit_scale.device
        pictures = self.model.encode_image(views.to(device, self.dtype)).float()  # (B, D)
        texts = self.model.encode_text(self.tokenize([PREFIX + caption for caption in captions]).to(device)).float()
        return F.cosine_similarity(pictures, texts).cpu()


def load_clip(name: str, weights: str | None, *, device: torch.device) -> ClipNetwork:
    """CLIP by the protocol's or open_clip's name. `weights`: its file; None: what open_clip has or fetches.

    OpenAI's model runs in fp16 on a GPU, as its authors do; all else in fp32. Raises ValueError or FileNotFoundError.
    """
    try:
        import open_clip
    except ImportError:
        raise ValueError("the CLIP score needs open_clip: pip install open_clip_torch") from None
    architecture, tag = CLIP_MODELS.get(name, (name, None))
    if architecture not in open_clip.list_models():
        raise ValueError(f"--clip-model4eval {name} is unknown: choose from {', '.join(CLIP_MODELS)}, or with "
                         "--clip-weights any architecture of open_clip")
    if weights is None and tag is None:
        raise ValueError(f"--clip-model4eval {name}: give a file with its weights by --clip-weights")
    path = Path(weights) if weights else fetch(architecture, tag)
    state = clip_state(path)
    precision = "fp16" if name == OPENAI and device.type == "cuda" else "fp32"
    with quiet():
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, precision=precision, device=device)
    containers.load_strict(model, state, path)
    described = {"model": name, "architecture": architecture, "file": path.name, "sha256": files.file_hash(path),
                 "precision": precision}
    return ClipNetwork(model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(architecture),
                       torch.float16 if precision == "fp16" else torch.float32, described)


def fetch(architecture: str, tag: str) -> Path:
    """The weights file that open_clip keeps, or downloads now. Raises ValueError when the download fails."""
    import open_clip

    try:
        with quiet():
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, tag)))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the CLIP weights {architecture} {tag} could not be downloaded: give a file by "
                         f"--clip-weights ({files.first_line(error)[:200]})") from None


def clip_state(path: Path) -> dict[str, Tensor]:
    """The weights in a file of OpenAI (TorchScript) or open_clip. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--clip-weights: no file at {path}")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and is_torchscript(path):
        state = load_torchscript(path).state_dict()
        return {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    return containers.weights(containers.read(path), path)


def through_floats(image: Image.Image) -> Image.Image:
    """A picture turned into floats in [-1, 1] and back, truncated: 63 of the 256 levels come back one lower.

    A mistake of the original that is part of all published scores; kept so that ours compare with them. (x + 1) * 127.5
    in fp32 ends just below the whole number for those levels; our own pictures are written with 127.5 x + 128, which
    does not.
    """
    x = normalize(to_tensor(image), [0.5] * 3, [0.5] * 3)
    pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def clip_view(image: Image.Image, *, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
    """A square picture as CLIP gets it (3, H, W)."""
    return preprocess(through_floats(image))


def clip_score(clip: ClipNetwork, files: list[Path], captions: list[str], process: dist.Process, *, size: int,
               batch_size: int, num_workers: int) -> float:
    """The mean cosine of pictures and captions, in [-1, 1]; cosines in fp32, mean in fp64. All processes share the work
    and get the same number.
    """
    squares = Squares(files, size, functools.partial(clip_view, preprocess=clip.preprocess))
    total = torch.zeros((), dtype=torch.float64, device=process.device)
    for indices, views in share_of(squares, process, batch_size=batch_size, num_workers=num_workers, title="CLIP"):
        total += clip.cosines(views, [captions[i] for i in indices.tolist()]).double().sum().to(process.device)
    score = float(dist.total(total)) / len(files)
    if not math.isfinite(score):
        raise ValueError("the CLIP score is not a number: the weights do not belong to this model")
    return score


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's log: what is wrong is said once, in an error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
