"""Are samples recognised as the class that was asked for?

    python3 evaluations/c2i/class_accuracy.py --samples samples/SETTINGS.npz --dataset emoji --output accuracy.json

A small convolutional classifier is trained on the real training pictures alone (no tokenizer, no GPT, no pretrained
weights), checked on real held-out pictures, and then asked to name the samples. It stands in for FID and IS where a
data set is too small for them; the accuracy on samples is the reverse of arXiv 1905.10887's "classification
accuracy score" (which trains on samples and tests on real pictures) and says nothing about diversity. To measure that,
the classifier up to its last features is saved as accuracy_features.pt (TorchScript), for evaluator.py --features.
The classifier itself is kept in the cache folder: other samples of the same data set are judged by the same one.

Images are uint8 (N, H, W, 3) throughout, as in the npz sample sets.
"""

import contextlib
import hashlib
import itertools
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.augmentation import center_crop
from dataset.build import DataFlags, ImageDataset, build_dataset, flagged_dataset
from dataset.pictures import UnreadableError
from dataset.unreadable import PassedOver
from utils import cli, dist
from utils.cli import flag
from utils.files import cache_folder, file_hash, plain, replacing
from utils.images import to_float
from utils.options import OutputFlags, SeedFlags
from utils.seeding import derive_seed

WIDTHS = (24, 48, 96, 192)
STEPS = 450
BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1


@dataclass(kw_only=True)
class AccuracyFlags(DataFlags, SeedFlags, OutputFlags):
    """The scoring command. --image-size is that of the samples."""

    samples: str = flag(cli.REQUIRED, "npz with uint8 images arr_0 and requested labels arr_1, as sample_ddp.py writes")
    output: str = "class_accuracy.json"


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    mirrored: bool = True,
) -> nn.Module:
    """Train a classifier from scratch on uint8 images (N, H, W, 3) and labels (N,); return it in eval mode.

    `mirrored`: mirror images are shown too, as of the same class.
    A class is drawn in proportion to the square root of its size: a compromise between drawing all pictures equally
    often and drawing all classes equally often.
    About 0.16 s a step for 64 x 64 pictures on two CPU cores.
    Raises ValueError when shapes disagree or a class has no picture.
    """
    _check(images, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(num_classes).to(device).to(memory_format=torch.channels_last).train()
    matrices, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)

    pictures, targets = to_float(images), torch.as_tensor(labels)  # (N, 3, H, W) in [-1, 1], (N,)
    weights = torch.bincount(targets, minlength=num_classes).double()[targets] ** -0.5
    for _ in tqdm(range(steps), desc="classifier", unit="step", mininterval=1.0):
        batch = torch.multinomial(weights, BATCH, replacement=True, generator=generator)
        augmented = augment(pictures[batch], generator=generator, mirrored=mirrored).to(device)
        loss = F.cross_entropy(model(augmented), targets[batch].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def predict(
    model: nn.Module, images: np.ndarray, *, device: torch.device | str = "cpu", batch: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted labels (N,) int64 and probabilities (N, classes) float32 for uint8 images (N, H, W, 3).

    Probabilities are the mean over a picture and its mirror image, as training shows both.
    """
    parts = []
    for start in range(0, len(images), batch):
        pictures = to_float(images[start : start + batch]).to(device)  # (B, 3, H, W)
        parts.append((model(pictures).softmax(-1) + model(pictures.flip(-1)).softmax(-1)) / 2)
    probabilities = torch.cat(parts).cpu().numpy()
    return probabilities.argmax(-1), probabilities


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Count pictures by (true label, predicted label): int64 (classes, classes)."""
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_accuracies(confusion: np.ndarray) -> np.ndarray:
    """Return the share recognised in each class, float64 (classes,); NaN for a class without pictures."""
    counts = confusion.sum(1)
    return np.where(counts > 0, confusion.diagonal() / np.maximum(counts, 1), np.nan)


def balanced_accuracy(confusion: np.ndarray) -> float:
    """Return the mean of the class accuracies over classes that have pictures."""
    return float(np.nanmean(class_accuracies(confusion)))


def plain_accuracy(confusion: np.ndarray) -> float:
    """Return the share of all pictures that were recognised."""
    return float(confusion.trace() / confusion.sum())


def evaluate_samples(
    samples: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    train_set: tuple[np.ndarray, np.ndarray],
    heldout_set: tuple[np.ndarray, np.ndarray],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    steps: int = STEPS,
    features: Path | None = None,
    kept: Path | None = None,
) -> dict:
    """Train on `train_set`, check on `heldout_set`, score samples uint8 (N, H, W, 3) against requested labels (N,).

    The sets are (images uint8 (N, H, W, 3), labels (N,)). `features`: the file for the network without its last layer.
    `kept`: the file for the whole network; one that is there is read, and nothing trained.
    Returns {"heldout_accuracy", "heldout_balanced_accuracy", "sample_accuracy", "sample_balanced_accuracy",
    "per_class": {name: {"heldout", "samples", "count"}}, "confusion"}. Accuracies are shares in [0, 1], None for a
    class without pictures; "count" is the number of samples of the class; row i of "confusion" counts as which classes
    the samples requested as class i were recognised.
    """
    labels = np.asarray(labels, dtype=np.int64)
    _check(samples, labels, len(classes), every_class=False)
    if samples.shape[1:] != train_set[0].shape[1:]:
        raise ValueError(f"samples are {samples.shape[1:]}, the training pictures {train_set[0].shape[1:]}: "
                         "see --image-size")
    model = kept and read_classifier(kept, num_classes=len(classes), device=device)
    if model is None:
        model = train_classifier(*train_set, num_classes=len(classes), steps=steps, seed=seed, device=device)
        if kept is not None:
            keep_classifier(model, kept)
    if features is not None:
        save_features(model, features)
    heldout, drawn = (
        confusion_matrix(truth, predict(model, images, device=device)[0], num_classes=len(classes))
        for images, truth in (heldout_set, (samples, labels))
    )
    rows = zip(classes, class_accuracies(heldout), class_accuracies(drawn), drawn.sum(1), strict=True)
    return {
        "heldout_accuracy": plain_accuracy(heldout),
        "heldout_balanced_accuracy": balanced_accuracy(heldout),
        "sample_accuracy": plain_accuracy(drawn),
        "sample_balanced_accuracy": balanced_accuracy(drawn),
        "per_class": {
            name: {"heldout": _share(real), "samples": _share(sampled), "count": int(count)}
            for name, real, sampled, count in rows
        },
        "confusion": drawn.tolist(),
    }


def format_table(result: dict) -> str:
    """Lay out what `evaluate_samples` returned as one line per class, with the classes most often seen instead."""
    names = [plain(name) for name in result["per_class"]]
    lines = [f"{'class':<12}{'held-out':>10}{'samples':>10}{'count':>7}   taken for"]
    for i, row in enumerate(result["per_class"].values()):
        wrong = sorted(((n, names[j]) for j, n in enumerate(result["confusion"][i]) if n and j != i), reverse=True)
        shares = (f"{'-' if row[key] is None else format(row[key], '.1%'):>10}" for key in ("heldout", "samples"))
        taken = ", ".join(f"{n} {c}" for n, c in wrong[:3])
        lines.append(f"{names[i]:<12}{''.join(shares)}{row['count']:>7}   {taken}")
    lines.append(f"{'all':<12}{result['heldout_accuracy']:>10.1%}{result['sample_accuracy']:>10.1%}")
    return "\n".join(lines)


class SmallCNN(nn.Module):
    """Four levels of residual 3x3 convolutions with BatchNorm, then the mean over positions: any image size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(WIDTHS[0])
        )
        self.levels = nn.Sequential(*(HalvingLevel(a, b) for a, b in itertools.pairwise(WIDTHS)))
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to logits (B, classes)."""
        features = self.levels(F.relu(self.stem(images)))  # (B, D, H/16, W/16)
        return self.head(features.mean((2, 3)))


class HalvingLevel(nn.Module):
    """Halve the picture, change the width, add one residual convolution."""

    def __init__(self, width: int, next_width: int) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(width, next_width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(next_width), nn.ReLU()
        )
        self.residual = nn.Sequential(
            nn.Conv2d(next_width, next_width, 3, padding=1, bias=False), nn.BatchNorm2d(next_width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return F.relu(x + self.residual(x))


def keep_classifier(model: SmallCNN, path: Path) -> None:
    """Save a classifier's weights. Where there is no room for them, the next call trains again."""
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with contextlib.suppress(OSError), replacing(path) as temporary:
        save_file(state, temporary)


def read_classifier(path: Path, *, num_classes: int, device: torch.device | str) -> SmallCNN | None:
    """The classifier that `keep_classifier` saved, in eval mode; None where there is none, or a damaged file."""
    model = SmallCNN(num_classes)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        return None
    return model.to(device).to(memory_format=torch.channels_last).eval()


def save_features(model: SmallCNN, path: Path) -> None:
    """Save the network from images (B, 3, H, W) in [-1, 1] to features (B, D) as TorchScript."""
    body = nn.Sequential(model.stem, nn.ReLU(), model.levels, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files run anywhere, without our code
        program = torch.jit.trace(body, torch.zeros(2, 3, 64, 64, device=next(model.parameters()).device))
    with replacing(path) as temporary:
        program.save(str(temporary))


def stack_images(data: ImageDataset, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """All readable pictures of a data set, centre-cropped → (uint8 (N, H, W, 3), labels (N,))."""
    pictures, labels, passed_over = [], [], PassedOver()
    for i in range(len(data)):
        try:
            pictures.append(center_crop(data.image(i), size))
        except UnreadableError as error:
            passed_over.tell([str(error)])
            continue
        labels.append(data.labels[i])
    if not pictures:
        raise ValueError(f"none of the {len(data)} images can be read")
    return np.stack(pictures), np.array(labels)


def split_sets(flags: AccuracyFlags) -> tuple[list[str], tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(class names, training set, held-out set): the emoji's own split, else a random tenth is held out."""
    data = flagged_dataset(flags)
    if data.classes is None:
        raise ValueError(f"--dataset {flags.dataset} has no classes to recognise")
    pictures, labels = stack_images(data, flags.image_size)
    if flags.dataset == "emoji":
        heldout = build_dataset("emoji_heldout", None, size=flags.image_size)
        return data.classes, (pictures, labels), stack_images(heldout, flags.image_size)
    order = np.random.default_rng(derive_seed(flags.global_seed)).permutation(len(labels))
    train, rest = order[len(order) // 10:], order[:len(order) // 10]
    return data.classes, (pictures[train], labels[train]), (pictures[rest], labels[rest])


def main(flags: AccuracyFlags) -> None:
    """Score a sample set; a result that is already there for these very samples and pictures is kept."""
    process = dist.setup()
    path, output = Path(flags.samples), Path(flags.output)
    if not path.is_file():
        raise FileNotFoundError(f"no sample set at {path}")
    classes, train_set, heldout_set = split_sets(flags)
    made_of = {"samples_sha256": file_hash(path), "dataset": flags.dataset, "image_size": list(flags.image_size),
               "exif_orientation": flags.exif_orientation, "seed": flags.global_seed,
               "pictures_sha256": pictures_hash(classes, train_set, heldout_set),
               "code_sha256": file_hash(__file__), "torch": torch.__version__}
    features = output.with_name(f"{output.stem}_features.pt")
    if is_up_to_date(output, features, made_of):
        print(f"{output} is up to date: nothing to do")
        return
    with np.load(path) as content:
        if not {"arr_0", "arr_1"} <= set(content.files):
            raise ValueError(f"{path} has no arr_0 and arr_1: the images, and the class that each was sampled for")
        samples, labels = content["arr_0"], content["arr_1"]
    trained_by = {**made_of, "samples_sha256": None, "device": process.device.type}
    name = hashlib.sha256(json.dumps(trained_by, sort_keys=True).encode()).hexdigest()[:16]
    result = evaluate_samples(samples, labels, classes, train_set, heldout_set, device=process.device,
                              seed=flags.global_seed, features=features,
                              kept=cache_folder() / "classifiers" / f"{name}.safetensors")
    with replacing(output) as temporary:
        temporary.write_text(json.dumps({**made_of, "features_sha256": file_hash(features), **result}, indent=2) + "\n")
    print(format_table(result))


def pictures_hash(classes: list[str], *sets: tuple[np.ndarray, np.ndarray]) -> str:
    """SHA-256 of all that a classifier is trained and checked on: names, pictures with their size, labels."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    for array in itertools.chain.from_iterable(sets):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def is_up_to_date(output: Path, features: Path, made_of: dict) -> bool:
    """Whether `output` is the result of just that, and `features` are those of its classifier."""
    if not output.is_file() or not features.is_file():
        return False
    try:
        found = json.loads(output.read_text())
    except ValueError:
        return False
    wanted = {**made_of, "features_sha256": file_hash(features)}
    return isinstance(found, dict) and all(found.get(key) == value for key, value in wanted.items())


def augment(images: Tensor, *, generator: torch.Generator, mirrored: bool = True) -> Tensor:
    """Flip, shift, scale, turn, tint and blur images (B, 3, H, W) in [-1, 1], each picture in its own way.

    The blur makes the classifier indifferent to the softness that a tokenizer leaves. New border pixels are white.
    """
    b = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    angle, scale, flip = uniform(-0.2, 0.2), uniform(0.85, 1.25), uniform(-1, 1).sign()
    flip = flip if mirrored else flip.abs()
    rows = (scale * flip * angle.cos(), -scale * angle.sin(), uniform(-0.15, 0.15),
            scale * flip * angle.sin(), scale * angle.cos(), uniform(-0.15, 0.15))  # fmt: skip
    grid = F.affine_grid(torch.stack(rows, 1).view(b, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1  # zero padding is white after the shift

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(-0.3, 1, 1, 1, 1).clamp(min=0))
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(0.6, 1.3, 1, 1, 1)  # saturation
    images = images * uniform(0.8, 1.1, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)  # contrast and tint
    return images.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def _check(images: np.ndarray, labels: np.ndarray, num_classes: int, *, every_class: bool = True) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(labels):
        raise ValueError(f"got {images.dtype} images {images.shape} and {len(labels)} labels, "
                         "expected uint8 (N, H, W, 3) and (N,)")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, at least one")
    if every_class and len(np.unique(labels)) < num_classes:
        missing = num_classes - len(np.unique(labels))
        raise ValueError(f"{missing} of {num_classes} classes have no picture to learn from")


def _share(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


if __name__ == "__main__":
    cli.run(main, AccuracyFlags)
