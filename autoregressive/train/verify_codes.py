"""Check a packed store of codes, and look at what it holds.

    python3 autoregressive/train/verify_codes.py --code-path /data/codes/imagenet256_codes --vq-ckpt vq_ds16_c2i.pt

Hashes, counts and ranges are checked (only counts where files hold no hashes, as in LlamaGen's and ARPG's layouts), and
what random rows have in the columns is read and shown; with a tokenizer such rows are decoded, beside their labels, to
verify.png in the store.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.code_manifest import Column, same_tokenizer, tokenizer_name
from dataset.codes import StoreFlags, open_stores
from tokenizer.build import TokenizerFlags, decode_images, describe_tokenizer, load_tokenizer
from utils import cli, dist, images
from utils.files import plain
from utils.options import SeedFlags

ROWS = 24
SHOWN = 100  # characters of a text


@dataclass(kw_only=True)
class VerifyFlags(StoreFlags, TokenizerFlags, SeedFlags):
    """The checking command."""


def main(flags: VerifyFlags) -> None:
    """Print what was found; raise ValueError if the store is not sound."""
    process = dist.setup()
    store = open_stores(flags.code_path, weights=flags.store_weights, corrupt=flags.corrupt_shards, remembered=False)
    name, tokenizer = (None, None) if flags.vq_ckpt is None else load_tokenizer(flags, device=process.device)
    made = store.manifest.get("tokenizer")
    if tokenizer is not None and same_tokenizer(made, own := describe_tokenizer(name, tokenizer)) is False:
        raise ValueError(f"{flags.vq_ckpt} is not the tokenizer that made the codes in {flags.code_path}: it is "
                         f"{tokenizer_name(own)}, they are of {tokenizer_name(made)}")
    verdict = "sound" if flags.corrupt_shards == "refuse" else "sound where not left out"
    print(f"{len(store.labels)} images, {store.views} views of {store.grid[0]}x{store.grid[1]} codes, "
          f"{store.num_classes} classes: {verdict if store.packed else 'labels and counts fit, no hashes to check'}")
    rng = np.random.default_rng(flags.global_seed)
    rows = np.sort(rng.choice(len(store.labels), min(ROWS, len(store.labels)), replace=False))
    for name, column in store.columns.items():
        print(f"column {plain(name)}, {describe(column, store.column(name, rows))}")
    if tokenizer is None:
        return
    codes = torch.from_numpy(store.read(rows, rng.integers(store.views, size=len(rows)))).to(process.device)
    names = [store.classes[label] if store.classes else str(label) for label in store.labels[rows]]
    picture = images.grid(images.to_uint8(decode_images(tokenizer, codes, store.grid)), columns=8, labels=names)
    images.save_png(store.folder / "verify.png", picture)
    print(f"decoded rows: {store.folder / 'verify.png'}")


def describe(column: Column, values: list[str] | list[np.ndarray]) -> str:
    """What a column is, and what some rows have in it."""
    if column.kind == "text":
        return f"text, such as {next((value for value in values if value), '')[:SHOWN]!r}"
    lengths, shape = [len(value) for value in values], "x".join(["n", *map(str, column.shape)])
    return f"{column.dtype} arrays {shape}, n from {min(lengths)} to {max(lengths)} in {len(values)} rows"


if __name__ == "__main__":
    cli.run(main, VerifyFlags)
