"""Train an image tokenizer.

    bash scripts/tokenizer/train_vq.sh --data-path /data/imagenet/train --vq-model VQ-16

The same command fine-tunes: --vq-ckpt FILE --finetune starts from a file's weights alone, with fresh counters,
optimizers and (unless the file has one) discriminator.
"""
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.augmentation import center_crop
from dataset.build import DataFlags, ImageDataset, data_fingerprint, flagged_dataset
from dataset.image_folders import JoinedImages, flat_folder
from dataset.loader import StepSampler, TrainImages, loader
from dataset.pictures import UnreadableError
from dataset.unreadable import PassedOver, check_readable
from evaluations.c2i.image_sets import Batch, ImageSet
from evaluations.c2i.monitor import Monitor, MonitorFlags
from evaluations.similarity import psnr, ssim
from tokenizer.build import TokenizerFlags, check_image_size, decode_images, encode_images, new_tokenizer
from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_loss import LossFlags, VQLoss, build_discriminator, discriminator_loss
from utils import cli, dist, images
from utils.checkpoints import containers
from utils.cli import flag
from utils.finite import finite_images
from utils.training import parallel
from utils.training.flags import TrainFlags, check_flags
from utils.training.run_folder import choose_run, identity_of
from utils.training.trainer import Backward, Trainer, frozen

PREVIEW_IMAGES = 8
SMALLEST_JUDGED = {"patchgan": 24, "stylegan": 8}  # pixels; of smaller images the last layer would see nothing
COLLAPSE_USAGE = 0.05  # warn when less than this share of the codebook is in use


@dataclass(kw_only=True)
class VQTrainFlags(TrainFlags, DataFlags, TokenizerFlags, LossFlags, MonitorFlags):
    """The tokenizer's training command."""

    data_face_path: str | None = flag(None, "second folder of images without classes, joined to --data-path")
    finetune: bool = flag(False, "take only the weights of --vq-ckpt and start counting at step 0")
    codebook_l2_norm: bool | None = flag(None, "L2-normalise features and codes; None: as --vq-ckpt does, else yes")
    results_dir: str = "results_tokenizer_image"
    epochs: int = 40
    global_batch_size: int = 128
    num_workers: int = 16


class TokenizerTask:
    """The tokenizer's part of the training loop: losses of a micro-batch, report, preview."""

    def __init__(self, model: nn.Module, discriminator: nn.Module | None, loss: VQLoss, *, dtype: torch.dtype,
                 samples: Tensor) -> None:
        self.modules = {"model": model} | ({"discriminator": discriminator} if discriminator is not None else {})
        self.sample_weight = 1.0
        self.loss, self.dtype, self.samples = loss, dtype, samples
        self.passed_over = PassedOver()

    def micro_step(self, batch: dict[str, Any], *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Tokenizer first, then the discriminator on the same reconstructions."""
        self.passed_over.tell(batch["broken"])
        unreadable = len(batch["broken"]) / (len(batch["broken"]) + len(batch["images"]))
        model, discriminator = self.modules["model"], self.modules.get("discriminator")
        critic = None if discriminator is None else parallel.unwrap(discriminator)
        pixels = batch["images"].contiguous(memory_format=torch.channels_last)
        with dist.autocast(pixels.device, self.dtype):
            reconstructions, codebook = model(pixels)
            with frozen(critic) if critic is not None else torch.enable_grad():
                loss, parts = self.loss(pixels, reconstructions, codebook, step=step, discriminator=critic,
                                        last_layer=parallel.unwrap(model).decoder.last_layer)
        count = len(pixels)
        backward("model", loss * count, count)
        if self.loss.adversarial(step):
            with dist.autocast(pixels.device, self.dtype):
                judged = discriminator_loss(self.loss.flags.disc_loss, discriminator(pixels),
                                            discriminator(reconstructions.detach()))
            backward("discriminator", self.loss.flags.disc_weight * judged * count, count)
            parts["discriminator"] = judged
        return {**parts, "unreadable": torch.full((), unreadable, device=pixels.device)}

    def check(self, facts: dict[str, Any], path: Path) -> None:
        """Whatever fits in its tensors can be gone on from."""

    def report(self) -> dict[str, float]:
        """Codebook usage and perplexity over the last 65,536 assignments; a warning when few codes are used."""
        usage, perplexity = parallel.unwrap(self.modules["model"]).quantize.usage()
        if usage < COLLAPSE_USAGE:
            print(f"warning: only {usage:.1%} of the codebook is in use (perplexity {perplexity:.0f}): a lower --lr, a "
                  "smaller --codebook-size or --entropy-loss-ratio 0.1 may help", file=sys.stderr, flush=True)
        return {"codebook_usage": usage, "codebook_perplexity": perplexity}

    @torch.no_grad()
    def preview(self, model: nn.Module) -> np.ndarray:
        """Inputs above their reconstructions."""
        pixels = self.samples.to(next(model.parameters()).device)
        with dist.autocast(pixels.device, self.dtype):
            reconstructions = finite_images(model(pixels)[0], "the tokenizer")
        both = np.concatenate([images.to_uint8(pixels), images.to_uint8(reconstructions)])
        return images.grid(both, columns=len(self.samples))


class Reconstructions(ImageSet):
    """An image set, reconstructed by the tokenizer when it is read; adds up PSNR and SSIM on the way."""

    def __init__(self, originals: ImageSet, model: nn.Module) -> None:
        super().__init__("reconstructions", originals.count, originals.size)
        self.originals, self.model = originals, model
        self.sums = torch.zeros(4, dtype=torch.float64)  # PSNR, count of images that changed; SSIM, count of all

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The batches of the original set, reconstructed."""
        for indices, pictures in self.originals.batches(size, rank=rank, world_size=world_size):
            made = self.reconstruct(pictures)
            pair = [torch.from_numpy(x).permute(0, 3, 1, 2) for x in (pictures, made)]
            decibels = psnr(*pair)
            changed = decibels.isfinite()
            self.sums += torch.stack([decibels[changed].sum(), changed.sum(), ssim(*pair).sum(),
                                      torch.tensor(len(made), dtype=torch.float64)])
            yield indices, made

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) → uint8 (B, H, W, 3)."""
        grid = check_image_size(pictures.shape[1:3], self.model.downsample)
        pixels = images.to_float(pictures).to(next(self.model.parameters()).device)
        return images.to_uint8(decode_images(self.model, encode_images(self.model, pixels), grid))

    def similarity(self, device: torch.device) -> dict[str, float]:
        """Means over all processes; the PSNR is of the images that were not reconstructed exactly."""
        decibels, changed, similarity, count = dist.total(self.sums.to(device)).tolist()
        return {"eval_ssim": similarity / count, **({"eval_psnr": decibels / changed} if changed else {})}


def open_images(flags: VQTrainFlags) -> ImageDataset:
    """The training images, --data-face-path included."""
    data = flagged_dataset(flags)
    if flags.data_face_path is not None:
        if data.classes is not None:
            raise ValueError(f"--data-face-path joins images without classes, but --dataset {flags.dataset} has "
                             "classes")
        data = JoinedImages([data, flat_folder(flags.data_face_path, reader=data.reader)])
    check_readable(data)
    return data


def preview_samples(data: ImageDataset, size: tuple[int, int]) -> Tensor:
    """A few readable images, evenly spread over the data set, (N, 3, H, W)."""
    views = []
    for index in np.linspace(0, len(data) - 1, min(4 * PREVIEW_IMAGES, len(data))).astype(int):
        try:
            views.append(center_crop(data.image(int(index)), size))
        except UnreadableError:
            continue
    if not views:
        raise ValueError(f"none of the images tried can be read, among them {data.name(0)}")
    return images.to_float(np.stack(views[::max(1, len(views) // PREVIEW_IMAGES)][:PREVIEW_IMAGES]))


def warm_start(flags: VQTrainFlags, content: dict[str, Any], trainer: Trainer) -> None:
    """Begin from --vq-ckpt (`content`): its weights alone with --finetune, else everything it holds."""
    if not flags.finetune:
        trainer.restore(containers.resolve(flags.vq_ckpt))
        return
    containers.load_strict(trainer.plain["model"], containers.weights(content, flags.vq_ckpt), flags.vq_ckpt)
    if "discriminator" in content and "discriminator" in trainer.plain:
        state = containers.weights(content, flags.vq_ckpt, prefer=("discriminator",))
        containers.load_strict(trainer.plain["discriminator"], state, flags.vq_ckpt)
    if trainer.ema is not None:
        trainer.ema.restart()
    cli.say(f"fine-tuning from the weights of {flags.vq_ckpt}")


def main(flags: VQTrainFlags) -> None:
    """Train to the end of --epochs."""
    process = dist.setup(timeout=flags.dist_timeout)
    check_flags(flags, world_size=process.world_size)
    if flags.finetune and flags.vq_ckpt is None:
        raise ValueError("--finetune needs --vq-ckpt")
    monitor = Monitor.wanted(flags, process, reconstructs=flags.image_size, exif_orientation=flags.exif_orientation)
    data = open_images(flags)
    torch.manual_seed(flags.global_seed)
    content = {} if flags.vq_ckpt is None else containers.read(flags.vq_ckpt)
    known = containers.saved_config(content)
    normed = known.get("codebook_l2_norm", True) if flags.codebook_l2_norm is None else flags.codebook_l2_norm
    name, model = new_tokenizer(flags, known, codebook_l2_norm=normed,
                                dropout_p=flags.dropout_p, commit_loss_beta=flags.commit_loss_beta,
                                entropy_loss_ratio=flags.entropy_loss_ratio)
    check_image_size(flags.image_size, model.downsample)
    if flags.disc_weight > 0 and min(flags.image_size) < SMALLEST_JUDGED[flags.disc_type]:
        raise ValueError(f"--disc-type {flags.disc_type} judges images from {SMALLEST_JUDGED[flags.disc_type]} pixels: "
                         "give a larger --image-size, or --disc-weight 0")
    samples = preview_samples(data, flags.image_size)
    loss = VQLoss(flags, device=process.device)

    def place(module: nn.Module) -> nn.Module:
        module = to_channels_last(module.to(process.device))
        return parallel.apply_ddp(parallel.apply_compile(module) if flags.compile else module, process.device)

    critic = build_discriminator(flags, image_size=flags.image_size) if flags.disc_weight > 0 else None
    weights = sum(p.numel() for module in (model, critic) if module is not None for p in module.parameters())
    task = TokenizerTask(place(model), None if critic is None else place(critic), loss, samples=samples,
                         dtype=dist.compute_dtype(flags.mixed_precision, process.device, weights=weights))
    saved = {"kind": "tokenizer", "vq_model": name, "codebook_size": model.config.codebook_size,
             "codebook_embed_dim": model.config.codebook_embed_dim,
             "codebook_l2_norm": model.config.codebook_l2_norm, "image_size": list(flags.image_size)}
    roots = (flags.data_path, flags.data_face_path)
    identity = identity_of(flags, data=data_fingerprint(data, roots) if process.is_main else "", model=saved,
                           start=flags.vq_ckpt, covered=("data_face_path", "codebook_l2_norm"))
    trainer = Trainer(task, flags, process, choose_run(flags, name, identity), samples=len(data), saved_config=saved)
    if flags.vq_ckpt is not None:
        warm_start(flags, content, trainer)
    del content  # as large as model and optimizer together
    trainer.resume()
    trainer.begin()
    cli.say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(data)} images, "
            f"{trainer.steps} steps on {process.world_size} x {process.device}, {task.dtype}; "
            f"run folder {trainer.folder}")

    def batches(start: int):
        sampler = StepSampler(len(data), global_batch=flags.global_batch_size, rank=process.rank,
                              accumulation=flags.gradient_accumulation_steps, world_size=process.world_size,
                              seed=flags.global_seed, start_step=start, end_step=trainer.steps)
        return loader(TrainImages(data, flags.image_size, seed=flags.global_seed), sampler,
                      num_workers=flags.num_workers, pin_memory=process.device.type == "cuda")

    def evaluate(model: nn.Module) -> dict[str, float]:
        made = Reconstructions(monitor.reference, model)
        return {**monitor(made), **made.similarity(process.device)}

    trainer.train(batches, eval_every=flags.eval_every, evaluate=monitor and evaluate)


if __name__ == "__main__":
    cli.run(main, VQTrainFlags)
