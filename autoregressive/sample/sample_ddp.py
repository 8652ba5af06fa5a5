"""Sample many images, on one process or under torchrun: a folder of PNGs and the npz that ADM's evaluator reads.

    bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --num-fid-samples 50000 --cfg-scale 2.0

<sample-dir>/<settings>/000000.png … and <sample-dir>/<settings>.npz; config.json in the folder says how they were made.
Image i is the same for any number of processes and any batch size. Run again to continue after an interruption.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import Pipeline, labels_for, load_pipeline
from utils import cli, dist, images
from utils.checkpoint import replacing, resolve
from utils.cli import flag
from utils.options import BatchFlags, RecipeFlags, SeedFlags, SetFlags


@dataclass(kw_only=True)
class SampleSetFlags(SampleFlags, SeedFlags, BatchFlags, SetFlags, RecipeFlags):
    """The sample set command."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("sample",)
    sample_dir: str = "samples"
    num_fid_samples: int = flag(50000, "number of images")
    label_mode: Literal["random", "balanced"] = flag("random", "classes: drawn uniformly, or index mod classes",
                                                     choices=("random", "balanced"))
    cfg_scale: float = 1.5


def folder_name(described: dict, flags: SampleSetFlags) -> str:
    """The sample set's name: what distinguishes it from its neighbours."""
    def size(value) -> str:
        return str(value[0]) if value[0] == value[1] else "x".join(map(str, value))

    interval = f"-interval-{flags.cfg_interval}" if flags.cfg_interval > -1 else ""
    return (f"{described['gpt_model']}-{resolve(flags.gpt_ckpt).stem}-size-{size(described['image_size'])}"
            f"-size-{size(described['image_size_eval'])}-{described['vq_model']}-topk-{flags.top_k}-topp-{flags.top_p}"
            f"-temperature-{flags.temperature}-cfg-{flags.cfg_scale}{interval}-{flags.label_mode}"
            f"-seed-{flags.global_seed}")


def claim(folder: Path, described: dict) -> None:
    """Note in config.json how the images are made. Raises ValueError if those already there were made otherwise."""
    path = folder / "config.json"
    if path.is_file():
        other = json.loads(path.read_text())
        differs = [key for key, value in described.items() if other.get(key) != value]
        if differs:
            raise ValueError(f"{folder} holds images made with another {', '.join(differs)}: give another --sample-dir "
                             "or remove it")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(described, indent=2) + "\n")


def main(flags: SampleSetFlags, pipeline: Pipeline | None = None) -> Path:
    """Sample what is missing, then pack the npz. Returns its path. `pipeline`: that of the flags, if loaded already."""
    process = dist.setup()
    if flags.num_fid_samples < 1 or flags.per_proc_batch_size < 1:
        raise ValueError("--num-fid-samples and --per-proc-batch-size must be at least 1")
    pipeline = pipeline or load_pipeline(flags, device=process.device)
    size = flags.image_size_eval or pipeline.image_size
    described = {**pipeline.described, "image_size_eval": list(size), "label_mode": flags.label_mode,
                 "seed": flags.global_seed}
    folder = Path(flags.sample_dir) / folder_name(described, flags)
    if process.is_main:
        claim(folder, described)
    dist.barrier()
    names = [f"{i:06d}.png" for i in range(flags.num_fid_samples)]
    labels = labels_for(range(flags.num_fid_samples), mode=flags.label_mode, num_classes=pipeline.num_classes,
                        seed=flags.global_seed)
    present = set(dist.broadcast_object([path.name for path in folder.glob("*.png")]))
    todo = [i for i, name in enumerate(names) if name not in present][process.rank::process.world_size]
    with tqdm(total=len(todo), desc="sampling", unit="image", mininterval=1.0, disable=not process.is_main) as bar:
        for first in range(0, len(todo), flags.per_proc_batch_size):
            batch = todo[first:first + flags.per_proc_batch_size]
            pictures = pipeline([labels[i] for i in batch], seed=flags.global_seed, indices=batch, size=size)
            for i, picture in zip(batch, pictures, strict=True):
                images.save_png(folder / names[i], picture)
            bar.update(len(batch))
    dist.barrier()
    packed = folder.with_name(f"{folder.name}.npz")
    if process.is_main:
        images.pack_folder(folder, names, labels=np.array(labels))
        print(f"{len(names)} images in {folder} and {packed}")
    dist.barrier()
    return packed


if __name__ == "__main__":
    cli.run(main, SampleSetFlags)
