"""Check a packed store of codes, and look at what it holds.

    python3 autoregressive/train/verify_codes.py --code-path /data/codes/imagenet256_codes --vq-ckpt vq_ds16_c2i.pt

Checks hashes, counts and ranges (only counts in LlamaGen's and ARPG's layouts, which have no hashes) and decodes
random rows, beside their labels, to verify.png in the store.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.codes import StoreFlags, open_stores
from tokenizer.build import TokenizerFlags, decode_images, fingerprint, load_tokenizer
from utils import cli, dist, images
from utils.options import SeedFlags

ROWS = 24


@dataclass(kw_only=True)
class VerifyFlags(StoreFlags, TokenizerFlags, SeedFlags):
    """The checking command."""


def main(flags: VerifyFlags) -> None:
    """Print what was found; raise ValueError if the store is not sound."""
    process = dist.setup()
    store = open_stores(flags.code_path, weights=flags.store_weights, corrupt=flags.corrupt_shards, remembered=False)
    tokenizer = None if flags.vq_ckpt is None else load_tokenizer(flags, device=process.device)[1]
    expected = store.manifest.get("tokenizer", {}).get("weights_sha256")
    if tokenizer is not None and expected not in (None, fingerprint(tokenizer)):
        raise ValueError(f"{flags.vq_ckpt} is not the tokenizer that made the codes in {flags.code_path}")
    verdict = "sound" if flags.corrupt_shards == "refuse" else "sound where not left out"
    print(f"{len(store.labels)} images, {store.views} views of {store.grid[0]}x{store.grid[1]} codes, "
          f"{store.num_classes} classes: {verdict if store.packed else 'labels and counts fit, no hashes to check'}")
    if tokenizer is None:
        return
    rng = np.random.default_rng(flags.global_seed)
    rows = np.sort(rng.choice(len(store.labels), min(ROWS, len(store.labels)), replace=False))
    codes = torch.from_numpy(store.read(rows, rng.integers(store.views, size=len(rows)))).to(process.device)
    names = [store.classes[label] if store.classes else str(label) for label in store.labels[rows]]
    picture = images.grid(images.to_uint8(decode_images(tokenizer, codes, store.grid)), columns=8, labels=names)
    images.save_png(store.folder / "verify.png", picture)
    print(f"decoded rows: {store.folder / 'verify.png'}")


if __name__ == "__main__":
    cli.run(main, VerifyFlags)
