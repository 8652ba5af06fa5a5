"""Reconstruct images with a tokenizer and measure how close they come.

    bash scripts/tokenizer/reconstruction_vq.sh --data-path /data/imagenet/val --vq-ckpt vq_ds16_c2i.pt

<sample-dir>/<settings>/000000.png … in data-set order, the npz for ADM's evaluator, a grid of sixteen inputs (chosen by
--global-seed) above reconstructions, and results.json: PSNR, SSIM, codebook usage. Each image counts once on any number
of processes.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.augmentation import center_crop
from dataset.build import DataFlags, ImageDataset, build_dataset
from dataset.loader import BROKEN_IMAGE, worker_count
from tokenizer.build import TokenizerFlags, check_image_size, decode_images, encode_images, load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import cli, dist, images
from utils.checkpoint import replacing
from utils.options import BatchFlags, SeedFlags, SetFlags, WorkerFlags

GRID_IMAGES = 16


@dataclass(kw_only=True)
class ReconstructFlags(DataFlags, TokenizerFlags, BatchFlags, SetFlags, SeedFlags, WorkerFlags):
    """The reconstruction command."""

    sample_dir: str = "reconstructions"
    num_workers: int = 4


class CentreCrops(Dataset):
    """Image i → (i, its centre crop (H, W, 3) uint8, or None if it cannot be read)."""

    def __init__(self, data: ImageDataset, indices: range, size: tuple[int, int]) -> None:
        self.data, self.indices, self.size = data, indices, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, np.ndarray | None]:
        index = self.indices[place]
        try:
            return index, center_crop(self.data.image(index), self.size)
        except BROKEN_IMAGE:
            return index, None


def resized(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (B, H, W, 3) at another size (bicubic)."""
    if pictures.shape[1:3] == size:
        return pictures
    return images.to_uint8(F.interpolate(images.to_float(pictures), size=size, mode="bicubic"))


@torch.inference_mode()
def reconstruct(tokenizer: VQModel, pictures: np.ndarray, *, device: torch.device) -> tuple[np.ndarray, torch.Tensor]:
    """uint8 (B, H, W, 3) → (reconstructions uint8 (B, H, W, 3), codes (B, L))."""
    grid = check_image_size(pictures.shape[1:3], tokenizer.downsample)
    codes = encode_images(tokenizer, images.to_float(pictures).to(device))
    return images.to_uint8(decode_images(tokenizer, codes, grid)), codes


def similarity(picture: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """PSNR in dB, SSIM, and SSIM with a data range of 2 for pixels in [0, 1], as LlamaGen's tables have it."""
    a, b = picture / 255.0, other / 255.0
    ssim = [structural_similarity(a, b, channel_axis=-1, data_range=data_range) for data_range in (1.0, 2.0)]
    return peak_signal_noise_ratio(a, b, data_range=1.0), *ssim


def main(flags: ReconstructFlags) -> None:
    """Reconstruct the whole data set."""
    process = dist.setup()
    data = build_dataset(flags.dataset, flags.data_path, size=flags.image_size)
    name, tokenizer = load_tokenizer(flags, device=process.device)
    check_image_size(flags.image_size, tokenizer.downsample)
    if flags.per_proc_batch_size < 1:
        raise ValueError(f"--per-proc-batch-size is {flags.per_proc_batch_size}, expected at least 1")
    size = flags.image_size_eval or flags.image_size
    folder = Path(flags.sample_dir) / (f"{name}-{flags.dataset}-size-{flags.image_size[0]}x{flags.image_size[1]}"
                                       f"-eval-{size[0]}x{size[1]}-{Path(flags.vq_ckpt).stem}")
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(tokenizer.codebook_size, dtype=torch.float64)
    broken = []
    mine = range(process.rank, len(data), process.world_size)
    with tqdm(total=len(mine), desc=name, unit="image", mininterval=1.0, disable=not process.is_main) as bar:
        for batch in DataLoader(CentreCrops(data, mine, flags.image_size), batch_size=flags.per_proc_batch_size,
                                num_workers=worker_count(flags.num_workers), collate_fn=list):
            broken += [data.name(index) for index, picture in batch if picture is None]
            indices = [index for index, picture in batch if picture is not None]
            pictures = [picture for _, picture in batch if picture is not None]
            bar.update(len(batch))
            if not pictures:
                continue
            made, codes = reconstruct(tokenizer, np.stack(pictures), device=process.device)
            counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
            pictures, made = resized(np.stack(pictures), size), resized(made, size)
            for index, picture, other in zip(indices, pictures, made, strict=True):
                sums += torch.tensor([*similarity(picture, other), 1.0], dtype=torch.float64)
                images.save_png(folder / f"{index:06d}.png", other)
    psnr, ssim, ssim_llamagen, count = dist.total(sums.to(process.device)).tolist()
    counts = dist.total(counts.to(process.device)).cpu()
    broken = dist.gather_lists(broken)
    if not count:
        raise ValueError(f"none of the {len(data)} images could be read")
    if not process.is_main:
        return
    share = counts / counts.sum()
    results = {"images": int(count), "unreadable": sorted(broken), "psnr": psnr / count, "ssim": ssim / count,
               "ssim_llamagen": ssim_llamagen / count, "codebook_usage": float((counts > 0).double().mean()),
               "codebook_perplexity": float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum())),
               "tokenizer": name, "dataset": flags.dataset, "image_size": list(flags.image_size)}
    lost = set(broken)
    made = [i for i in range(len(data)) if data.name(i) not in lost]
    shown = np.random.default_rng(flags.global_seed).permutation(made)[:GRID_IMAGES]
    inputs = resized(np.stack([center_crop(data.image(int(i)), flags.image_size) for i in shown]), size)
    outputs = np.stack([images.load_png(folder / f"{i:06d}.png") for i in shown])
    images.save_png(folder.with_name(f"{folder.name}.png"),
                    images.grid(np.concatenate([inputs, outputs]), columns=len(shown)))
    images.pack_folder(folder, [f"{i:06d}.png" for i in made])
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{int(count)} images: PSNR {results['psnr']:.2f} dB, SSIM {results['ssim']:.3f}, codebook usage "
          f"{results['codebook_usage']:.1%}{f', {len(broken)} unreadable images skipped' if broken else ''}; {folder}")


if __name__ == "__main__":
    cli.run(main, ReconstructFlags)
