"""Do samples show what their prompts say? How often is the real picture that a sample resembles most the prompt's own?

    python3 evaluations/t2i/retrieval.py --fake-dir samples/SETTINGS --dataset emoji_all --image-size 48

For small data sets, for which CLIP is too general: a convolutional network is trained to tell the real pictures apart,
each a class of its own, on shifted, turned, tinted and blurred copies of them. It has seen neither tokenizer nor GPT. A
sample is retrieved (top-1) when the network takes it for the picture whose caption is its prompt, top-5 when that is
among the five likeliest; guessing gives 1 / N. The network is kept in the cache folder.
"""
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.augmentation import center_crop
from dataset.build import PairFlags, PictureFlags, flagged_pairs
from dataset.pictures import PictureReader, UnreadableError
from dataset.unreadable import PassedOver
from evaluations.c2i.class_accuracy import keep_classifier, pictures_hash, read_classifier, train_classifier
from evaluations.t2i.sample_folder import SampleFolderFlags, read_samples
from utils import cli, dist
from utils.files import cache_folder, file_hash, replacing
from utils.images import to_float
from utils.options import OutputFlags, SeedFlags, SizeFlags

MOST_PICTURES = 20_000  # each is a class, whose weights the network holds
STEPS_PER_PICTURE, LEAST_STEPS = 1.2, 600  # batches of 64
TOP = 5


@dataclass(kw_only=True)
class RetrievalFlags(SampleFolderFlags, PairFlags, PictureFlags, SizeFlags, SeedFlags, OutputFlags):
    """The retrieval score. --data-path or --dataset: the real pictures with their captions."""

    image_size: tuple[int, int] = (256, 256)
    output: str = "retrieval.json"


def real_pictures(flags: RetrievalFlags) -> tuple[np.ndarray, list[str]]:
    """(centre crops uint8 (N, H, W, 3), their captions)."""
    pairs = flagged_pairs(flags, reader=PictureReader(exif_orientation=flags.exif_orientation),
                          emoji_size=max(flags.image_size))
    if len(pairs) > MOST_PICTURES:
        raise ValueError(f"there are {len(pairs)} real pictures; this score is for at most {MOST_PICTURES}: take "
                         "evaluations/t2i/evaluation.py")
    pictures, captions, passed_over = [], [], PassedOver()
    for index in range(len(pairs)):
        try:
            pictures.append(center_crop(pairs.image(index), flags.image_size))
        except UnreadableError as error:
            passed_over.tell([str(error)])
            continue
        captions.append(pairs.captions(index).long)
    if not pictures:
        raise ValueError(f"none of the {len(pairs)} real pictures can be read")
    return np.stack(pictures), captions


@torch.inference_mode()
def ranked(model: nn.Module, pictures: np.ndarray, *, device: torch.device, batch: int = 256) -> np.ndarray:
    """For pictures uint8 (B, H, W, 3) the TOP likeliest classes, (B, TOP), likeliest first."""
    parts = [model(to_float(pictures[start:start + batch]).to(device)).topk(TOP, -1).indices.cpu().numpy()
             for start in range(0, len(pictures), batch)]
    return np.concatenate(parts)


def retrieval(found: np.ndarray, prompts: list[str], captions: list[str]) -> dict[str, float]:
    """{"top1", "top5", "chance"}: how often the pictures found (B, TOP), likeliest first, are those of the prompts."""
    hits = np.array([[captions[i] == prompt for i in row] for row, prompt in zip(found.tolist(), prompts, strict=True)])
    chance = float(np.mean([captions.count(prompt) / len(captions) for prompt in prompts]))
    return {"top1": float(hits[:, 0].mean()), f"top{TOP}": float(hits.any(1).mean()), "chance": chance}


def network_for(pictures: np.ndarray, *, seed: int, device: torch.device) -> nn.Module:
    """The network that tells the real pictures apart; from the cache if it is there."""
    made_of: dict[str, Any] = {"pictures": pictures_hash([], (pictures, np.arange(len(pictures)))), "seed": seed,
                               "code": file_hash(__file__), "torch": torch.__version__, "device": device.type}
    name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    path, count = cache_folder() / "classifiers" / f"{name}.safetensors", len(pictures)
    model = read_classifier(path, num_classes=count, device=device)
    if model is None:
        steps = max(LEAST_STEPS, round(STEPS_PER_PICTURE * count))
        model = train_classifier(pictures, np.arange(count), num_classes=count, steps=steps, seed=seed, device=device,
                                 mirrored=False)
        keep_classifier(model, path)
    return model


def main(flags: RetrievalFlags) -> None:
    """Score the samples, print and write."""
    process = dist.setup()
    files, prompts, _ = read_samples(Path(flags.fake_dir))
    pictures, captions = real_pictures(flags)
    unknown = sorted(set(prompts) - set(captions))
    if unknown:
        raise ValueError(f"{len(unknown)} prompts are captions of no real picture, such as {unknown[0]!r}: give the "
                         "data that they come from")
    model = network_for(pictures, seed=flags.global_seed, device=process.device)
    read = PictureReader()
    samples = np.stack([center_crop(read(file), flags.image_size) for file in files])
    found = ranked(model, samples, device=process.device)
    result = {"samples": len(samples), "real_pictures": len(pictures), **retrieval(found, prompts, captions),
              "real": retrieval(ranked(model, pictures, device=process.device), captions, captions)["top1"],
              "nearest": [captions[row[0]] for row in found.tolist()]}
    with replacing(Path(flags.output)) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(samples)} samples: the prompt's picture is found first for {result['top1']:.1%}, among the first "
          f"{TOP} for {result[f'top{TOP}']:.1%}; chance is {result['chance']:.2%}; real pictures {result['real']:.1%}")


if __name__ == "__main__":
    cli.run(main, RetrievalFlags)
