"""Check a packed store of codes, and look at what it holds.

    python3 autoregressive/train/verify_codes.py --code-path /data/codes/imagenet256_codes --vq-ckpt vq_ds16_c2i.pt

Hashes, counts and ranges are checked (only counts where files hold no hashes, as in LlamaGen's and ARPG's layouts);
random rows are decoded, beside their labels, to verify.png in the store.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.codes import StoreFlags, open_store, open_stores, verify
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
    store = open_stores(flags.code_path)
    parts = [open_store(Path(path)) for path in flags.code_path.split(",")]
    tokenizer = None if flags.vq_ckpt is None else load_tokenizer(flags, device=process.device)[1]
    expected = store.manifest.get("tokenizer", {}).get("weights_sha256")
    if tokenizer is not None and expected not in (None, fingerprint(tokenizer)):
        raise ValueError(f"{flags.vq_ckpt} is not the tokenizer that made the codes in {flags.code_path}")
    for part in parts:
        problems = verify(part.folder) if part.folder is not None else []
        if problems:
            raise ValueError(f"{part.folder} is damaged: {'; '.join(problems)}")
    folder = parts[0].folder or Path(flags.code_path.split(",")[0])
    verdict = "sound" if all(part.folder is not None for part in parts) else "labels and counts fit, no hashes to check"
    print(f"{len(store)} images, {store.views} views of {store.grid[0]}x{store.grid[1]} codes, "
          f"{store.num_classes} classes: {verdict}")
    if tokenizer is None:
        return
    rng = np.random.default_rng(flags.global_seed)
    rows = np.sort(rng.choice(len(store), min(ROWS, len(store)), replace=False))
    codes = torch.from_numpy(store.read(rows, rng.integers(store.views, size=len(rows)))).to(process.device)
    names = [store.classes[label] if store.classes else str(label) for label in store.labels[rows]]
    picture = images.grid(images.to_uint8(decode_images(tokenizer, codes, store.grid)), columns=8, labels=names)
    images.save_png(folder / "verify.png", picture)
    print(f"decoded rows: {folder / 'verify.png'}")


if __name__ == "__main__":
    cli.run(main, VerifyFlags)
