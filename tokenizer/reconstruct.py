"""Reconstruct images and measure how close they come: VQ, taming VQGAN, SD/SDXL VAE, Consistency Decoder, or identity.

    bash scripts/tokenizer/reconstruction_vq.sh --data-path /data/imagenet/val --vq-ckpt vq_ds16_c2i.pt
    bash scripts/tokenizer/val.sh --data-path /data/imagenet/val

Writes <sample-dir>/<settings>/000000.png … in the order of the data set, the npz for ADM's evaluator, a grid of sixteen
inputs (chosen by --global-seed) above reconstructions, and results.json. Each image counts once on any number of
processes; one that cannot be read is left out and named. `val.sh` (identity) writes the centre crops as they are: the
reference for rFID.

With --image-size-eval reconstructions are resized (bicubic, no antialias) before they become 8-bit; PSNR, SSIM and
LPIPS compare them with inputs that are resized in the same way and stay floats. The reference set for their rFID is
cropped to that size, not resized (val.sh with --image-size). All this is LlamaGen's (arXiv 2406.06525), whose names of
the npz and of a file of results are there too: see tokenizer/original_names.py.

In results.json `psnr` is the mean in dB over the images that the reconstruction changed (the PSNR of an identical one
is infinite; null if all are identical), `identical` counts the others; `ssim` has the data range 1, `ssim_llamagen` 2
as in LlamaGen's tables; codebook_usage and codebook_perplexity are over the whole set, usage_queue65536 over the first
65,536 codes of a shuffled pass: the paper's measure, null for a smaller set.
"""
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.augmentation import center_crop
from dataset.build import DataFlags, ImageDataset, flagged_dataset
from dataset.loader import CentreCrops, worker_count
from dataset.unreadable import PassedOver, split_readable
from evaluations.similarity import psnr, ssim, unit_range
from tokenizer.build import check_image_size, in_chunks
from tokenizer.original_names import give_original_name, original_name
from tokenizer.reconstructors import Reconstructor, ReconstructorFlags, build_reconstructor
from tokenizer.tokenizer_image.lpips import LPIPSFlags, perceptual_loss
from tokenizer.tokenizer_image.quantize import USAGE_WINDOW
from tokenizer.vae.model import VAE
from utils import cli, dist, images
from utils.checkpoints.containers import content_hash, resolve
from utils.checkpoints.hub import hub_name
from utils.cli import flag
from utils.files import file_hash, replacing, sweep
from utils.options import BatchFlags, RecipeFlags, SetFlags, WorkerFlags

GRID_IMAGES = 16


@dataclass(kw_only=True)
class ReconstructFlags(DataFlags, ReconstructorFlags, LPIPSFlags, BatchFlags, SetFlags, WorkerFlags, RecipeFlags):
    """The reconstruction command."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("reconstruct",)
    lpips: bool = flag(False, "measure LPIPS too (--lpips-backbone implies it)")
    sample_dir: str = "reconstructions"
    num_workers: int = 4


class CodebookUsage:
    """Which codes a set of images uses; each process counts its share of the images."""

    def __init__(self, codebook_size: int, *, count: int, seed: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.places = np.random.default_rng(seed).permutation(count)  # of each image in a shuffled pass
        self.queue: list[tuple[int, np.ndarray]] = []  # (place, codes) of the first ones, as many as the window needs

    def add(self, indices: list[int], codes: Tensor) -> None:
        """Count the codes (B, L) of images `indices`."""
        codes = codes.cpu()
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))
        self.queue += [(int(self.places[index]), row) for index, row in zip(indices, codes.numpy(), strict=True)]
        self.queue = sorted(self.queue, key=itemgetter(0))[:-(-USAGE_WINDOW // codes.shape[1])]

    def results(self, *, device: torch.device) -> dict[str, float | None]:
        """The results over all processes; `device`: where their tensors are exchanged."""
        counts = dist.total(self.counts.to(device)).cpu()
        queue = sorted(dist.gather_lists(self.queue), key=itemgetter(0))
        window = np.concatenate([row for _, row in queue] or [np.zeros(0, int)])[:USAGE_WINDOW]
        share = counts / counts.sum().double()
        return {"codebook_usage": float((counts > 0).double().mean()),
                "codebook_perplexity": float(torch.exp(-torch.special.xlogy(share, share).sum())),
                "usage_queue65536": len(np.unique(window)) / len(counts) if len(window) == USAGE_WINDOW else None}


def planes(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) → uint8 (B, 3, H, W)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) at another size, bicubic without antialias; values may leave the range of the input."""
    return pixels if pixels.shape[-2:] == size else F.interpolate(pixels, size=size, mode="bicubic")


def scores(inputs: Tensor, made: Tensor, *, perceptual: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    """Images (B, 3, H, W), uint8 or of range [0, 1] → sums over them of what `means` names, (6,) float64."""
    inputs, made = unit_range(inputs), unit_range(made)
    decibels = psnr(inputs, made)
    identical = decibels.isinf()
    distances = torch.zeros_like(decibels)
    if perceptual is not None:
        pairs = (2 * torch.cat([inputs, made], 1) - 1).float()  # (B, 6, H, W)
        distances = in_chunks(lambda pair: perceptual(pair[:, :3], pair[:, 3:]).flatten(), pairs,
                              pixels=math.prod(pairs.shape[-2:]))
    return torch.column_stack([torch.ones_like(decibels), identical, decibels.where(~identical, 0),
                               ssim(inputs, made, data_ranges=(1.0, 2.0)), distances]).sum(0)


def means(sums: Tensor, *, lpips: bool) -> dict[str, int | float | None]:
    """The sums of `scores` → what results.json says."""
    count, identical, decibels, ssim_1, ssim_2, distances = sums.tolist()
    return {"images": int(count), "identical": int(identical),
            "psnr": decibels / (count - identical) if count > identical else None,
            "ssim": ssim_1 / count, "ssim_llamagen": ssim_2 / count, **({"lpips": distances / count} if lpips else {})}


def origin(flags: ReconstructFlags, reconstructor: Reconstructor, *, lpips: bool) -> dict[str, object]:
    """How the numbers were made, for results.json."""
    packages = ["torch", *(["diffusers"] if isinstance(reconstructor, VAE) else []), *(["lpips"] if lpips else [])]
    return {"reconstructor": flags.reconstructor, "tokenizer": reconstructor.name,
            "checkpoint_sha256": reconstructor.weights and content_hash(reconstructor.weights),
            "lpips_backbone_sha256": flags.lpips_backbone and file_hash(flags.lpips_backbone),
            "dataset": flags.dataset, "exif_orientation": flags.exif_orientation, "image_size": list(flags.image_size),
            "image_size_eval": list(size_for_scoring(flags)), "seed": flags.global_seed,
            "versions": {package: importlib.metadata.version(package) for package in packages}}


def size_for_scoring(flags: ReconstructFlags) -> tuple[int, int]:
    """Height and width of what is kept. Of LlamaGen's scripts only that of VQ resizes where nothing is said."""
    return flags.scored_size(flags.image_size) if flags.reconstructor == "vq" else \
        flags.image_size_eval or flags.image_size


def set_folder(flags: ReconstructFlags, name: str) -> Path:
    """The folder of the set, named by its settings and weights."""
    size, size_eval = cli.shown(flags.image_size), cli.shown(size_for_scoring(flags))
    weights = flags.vq_ckpt if flags.reconstructor == "vq" else flags.local_weights
    return Path(flags.sample_dir) / "-".join([
        f"val_{flags.dataset}" if flags.reconstructor == "identity" else f"{name}-{flags.dataset}",
        f"size-{size}-eval-{size_eval}", *([(hub_name(weights) or resolve(weights)).stem] if weights else [])])


def main(flags: ReconstructFlags) -> None:
    """Reconstruct the whole data set."""
    process = dist.setup()
    data = flagged_dataset(flags)
    reconstructor = build_reconstructor(flags, device=process.device)
    check_image_size(flags.image_size, reconstructor.downsample)
    if flags.per_proc_batch_size < 1:
        raise ValueError(f"--per-proc-batch-size is {flags.per_proc_batch_size}, expected at least 1")
    lpips = flags.lpips or flags.lpips_backbone is not None
    perceptual = perceptual_loss(flags.lpips_backbone, device=process.device) if lpips else None
    folder = set_folder(flags, reconstructor.name)
    if process.is_main:  # a set without results.json counts as unfinished
        (folder / "results.json").unlink(missing_ok=True)
    sums, broken, usage = reconstruct_share(flags, data, reconstructor, perceptual=perceptual, folder=folder,
                                            process=process)
    sums = dist.total(sums)
    broken = dist.gather_lists(broken)
    numbers = usage.results(device=process.device) if usage else {}
    if not sums[0]:
        raise ValueError(f"none of the {len(data)} images could be read")
    if not process.is_main:
        return
    made = sorted(set(range(len(data))) - set(broken))
    pack(folder, data, made, seed=flags.global_seed, size=flags.image_size)
    results = {**means(sums, lpips=lpips), "unreadable": sorted(map(data.name, broken)), **numbers,
               **origin(flags, reconstructor, lpips=lpips)}
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    name = original_name(flags, reconstructor, dataset=flags.dataset, size=flags.image_size,
                         scored=size_for_scoring(flags))
    measured = {} if flags.reconstructor == "identity" else {"psnr": results["psnr"], "ssim": results["ssim_llamagen"]}
    said = give_original_name(folder, name, **measured)
    print(f"{told(results)}; {folder}" + (f"\n{said}" if said else ""))


@torch.no_grad()
def reconstruct_share(flags: ReconstructFlags, data: ImageDataset, reconstructor: Reconstructor, *,
                      perceptual: Callable[[Tensor, Tensor], Tensor] | None, folder: Path,
                      process: dist.Process) -> tuple[Tensor, list[int], CodebookUsage | None]:
    """Reconstruct and save this process's images → (sums of `scores`, unreadable images, usage if there are codes)."""
    size = size_for_scoring(flags)
    sums, broken = torch.zeros(6, dtype=torch.float64, device=process.device), []
    usage, passed_over = None, PassedOver()
    if reconstructor.codebook_size:
        usage = CodebookUsage(reconstructor.codebook_size, count=len(data), seed=flags.global_seed)
    mine = range(process.rank, len(data), process.world_size)
    bar = tqdm(total=len(mine), desc=reconstructor.name, unit="image", mininterval=1.0, disable=not process.is_main)
    for batch in DataLoader(CentreCrops(data, mine, flags.image_size), batch_size=flags.per_proc_batch_size,
                            num_workers=worker_count(flags.num_workers), collate_fn=list):
        bar.update(len(batch))
        indices, pictures, unreadable = split_readable(batch, passed_over)
        broken += unreadable
        if not indices:
            continue
        pictures = np.stack(pictures)
        pixels = images.to_float(pictures).to(process.device)
        made, codes = reconstructor(pixels, indices)
        if usage:
            usage.add(indices, codes)
        saved = images.to_uint8(resized(made, size))
        for index, picture in zip(indices, saved, strict=True):
            images.save_png(folder / f"{index:06d}.png", picture)
        # inputs that keep their size are compared as bytes, so that identical images are recognised
        inputs = planes(pictures) if size == flags.image_size else (resized(pixels, size) + 1) / 2
        sums += scores(inputs.to(process.device), planes(saved).to(process.device), perceptual=perceptual)
    bar.close()
    return sums, broken, usage


def pack(folder: Path, data: ImageDataset, made: list[int], *, seed: int, size: tuple[int, int]) -> None:
    """Write the npz of images `made` and the grid beside their folder; remove an earlier run's files from it."""
    names = {i: f"{i:06d}.png" for i in made}
    sweep(folder)
    for name in {path.name for path in folder.glob("*.png")} - set(names.values()):
        (folder / name).unlink()
    shown = np.random.default_rng(seed).permutation(made)[:GRID_IMAGES]
    outputs = np.stack([images.load_png(folder / names[i]) for i in shown])
    crops = images.to_float(np.stack([center_crop(data.image(int(i)), size) for i in shown]))
    inputs = images.to_uint8(resized(crops, outputs.shape[1:3]))
    images.save_png(folder.with_name(f"{folder.name}.png"),
                    images.grid(np.concatenate([inputs, outputs]), columns=len(shown)))
    images.pack_folder(folder, list(names.values()))


def told(results: dict) -> str:
    """The numbers in one line."""
    decibels, identical = results["psnr"], results["identical"]
    parts = ["all identical" if decibels is None else f"PSNR {decibels:.2f} dB", f"SSIM {results['ssim']:.3f}"]
    if identical and decibels is not None:
        parts[0] += f" ({identical} identical ones aside)"
    if "lpips" in results:
        parts.append(f"LPIPS {results['lpips']:.3f}")
    if "codebook_usage" in results:
        parts.append(f"codebook usage {results['codebook_usage']:.1%}")
    if results["unreadable"]:
        parts.append(f"{len(results['unreadable'])} unreadable images skipped")
    return f"{results['images']} images: {', '.join(parts)}"


if __name__ == "__main__":
    cli.run(main, ReconstructFlags)
