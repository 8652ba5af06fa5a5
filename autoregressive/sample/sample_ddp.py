"""Sample many images, on one process or under torchrun: a folder of PNGs and the npz that ADM's evaluator reads.

    bash scripts/autoregressive/sample_c2i.sh --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --num-fid-samples 50000 --cfg-scale 2.0

Writes <sample-dir>/<settings>/000000.png … and <sample-dir>/<settings>.npz; config.json in the folder says how they
were made, <settings>.speed.jsonl how long it took. Image i is the same for any number of processes and any batch size
(--per-proc-batch-size 0: what memory holds). Run it again to continue after an interruption: a kill costs the last
minute, or 1 % of the time so far.
"""
import contextlib
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.batch_size import batch_that_fits, even_batch
from autoregressive.sample.options import SampleCountFlags, SampleFlags
from autoregressive.sample.pipeline import Pipeline, labels_for, load_pipeline
from autoregressive.sample.sample_store import SampleStore, stored_images
from autoregressive.sample.set_claim import (
    ENGINE,
    check_one_engine,
    checkpoint_name,
    claim,
    config_of,
    differing,
    drawing_name,
    locked,
)
from autoregressive.sample.set_writer import SetWriter, decoding
from utils import cli, dist, images
from utils.cli import flag
from utils.options import BatchFlags, RecipeFlags, SeedFlags, SetFlags

CONFIG = "config.json"


@dataclass(kw_only=True)
class SampleSetFlags(SampleFlags, SampleCountFlags, SeedFlags, BatchFlags, SetFlags, RecipeFlags):
    """The sample set command."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("sample",)
    sample_dir: str = "samples"
    label_mode: Literal["random", "balanced"] = flag("random", "classes: drawn uniformly, or index mod classes",
                                                     choices=("random", "balanced"))
    png: bool = flag(True, "also write each image as a PNG; --no-png: the npz alone")
    cfg_scale: float = 1.5


def folder_name(described: dict, flags: SampleSetFlags, *, earlier: bool = False) -> str:
    """The name of the sample set: its settings, as LlamaGen has them; `earlier`: as earlier versions of ours had them.
    """
    mode = f"-{flags.label_mode}" if flags.label_mode != "random" or earlier else ""
    return (f"{described['gpt_model']}-{checkpoint_name(flags, by_folder=not earlier)}-size-"
            f"{cli.shown_size(described['image_size'])}-size-{cli.shown_size(described['image_size_eval'])}-"
            f"{described['vq_model']}-{drawing_name(described, flags)}{mode}-seed-{flags.global_seed}")


def choose_folder(described: dict, flags: SampleSetFlags) -> tuple[Path, dict, str]:
    """(the set's folder, its description, what to say of it or "").

    A set that an earlier version has begun, under the name that it had then, is gone on with where it is: nothing is
    renamed, so whatever else points there keeps working. Earlier versions did not record the engine either. One whose
    images were not resized then is pointed out. To a set that is complete it does not matter which engine runs here.
    """
    root = Path(flags.sample_dir)
    folder, old = root / folder_name(described, flags), root / folder_name(described, flags, earlier=True)
    renamed = f"going on with {old}, the name that an earlier version gave to this set; today's is {folder.name}"
    for place, said in ((folder, ""), (old, renamed)):
        if is_begun(place, described):
            return place, described, said
        recorded = (config_of(place / CONFIG) or {}).get(ENGINE)
        theirs = {**described, ENGINE: recorded} if recorded else {
            key: value for key, value in described.items() if key != ENGINE}
        if is_begun(place, theirs):
            if SampleStore(place, theirs, size=tuple(theirs["image_size_eval"])).is_finished(flags.num_fid_samples):
                return place, theirs, said
            if not recorded:
                unsure = (f"{place} does not record which engine drew its images, as an earlier version began it: "
                          f"{described[ENGINE]} draws the others; to be sure that one drew all, give another "
                          "--sample-dir")
                return place, theirs, f"{said}\n{unsure}".strip()
    whole = {**described, "image_size_eval": described["image_size"]}
    unresized = root / folder_name(whole, flags, earlier=True)
    if flags.image_size_eval is None and config_of(unresized / CONFIG) is not None and whole != described:
        side = cli.shown_size(described["image_size"])
        return folder, described, (
            f"{unresized} is left as it is: it holds images of {side} pixels; without --image-size-eval they are now "
            f"resized to {described['image_size_eval'][0]}, as by LlamaGen. To go on with that folder, give "
            f"--image-size-eval {side}")
    return folder, described, ""


def is_begun(folder: Path, described: dict) -> bool:
    """Whether a folder is that of the described set, or only its npz is left."""
    found, store = config_of(folder / CONFIG), SampleStore(folder, described, size=tuple(described["image_size_eval"]))
    return store.is_ours(store.npz) if found is None else not differing(described, found)


def main(flags: SampleSetFlags, pipeline: Pipeline | None = None) -> Path:
    """Sample the images that are missing, then pack the npz. Returns its path. `pipeline`: if it is loaded already."""
    process = dist.setup(timeout=86400.0)  # a day: processes wait for the slowest one, and for the packing
    if flags.num_fid_samples < 1 or flags.per_proc_batch_size < 0:
        raise ValueError("--num-fid-samples must be at least 1, --per-proc-batch-size at least 0 (what memory holds)")
    pipeline = pipeline or load_pipeline(flags, device=process.device)
    pipeline.tell_null_control()
    size = flags.scored_size(pipeline.image_size)
    described = {**pipeline.described, "image_size_eval": list(size), "label_mode": flags.label_mode,
                 "seed": flags.global_seed}
    check_one_engine(described[ENGINE])
    folder, described, said = dist.broadcast_object(choose_folder(described, flags) if process.is_main else None)
    if said and process.is_main:
        print(said, flush=True)
    store = SampleStore(folder, described, size=size)
    try:
        with locked(store.folder) if process.is_main else contextlib.nullcontext():
            complete_set(store, flags, pipeline, process, described=described)
    except OSError as error:
        raise OSError(f"{store.folder}: {error}: what was written is kept, run again to continue") from error
    return store.npz


def complete_set(store: SampleStore, flags: SampleSetFlags, pipeline: Pipeline, process: dist.Process, *,
                 described: dict) -> None:
    """Complete the set to --num-fid-samples images and print what was done."""
    count = flags.num_fid_samples
    if process.is_main:
        claim(store.folder / CONFIG, described, warnings=pipeline.warnings, folder=store.folder,
              foreign=store.foreign())
        store.sweep()
    finished = dist.broadcast_object(process.is_main and store.is_finished(count))
    if not finished:
        labels = labels_for(range(count), mode=flags.label_mode, num_classes=pipeline.conditions.count,
                            seed=flags.global_seed)
        start = time.perf_counter()
        made = sample_missing(store, flags, pipeline, process, labels=labels)
        seconds = time.perf_counter() - start
        if process.is_main:
            note_speed(store, images=made, seconds=seconds)
            store.pack(np.array(labels))
        dist.barrier()
    elif process.is_main:
        store.remove_shards(count)  # left over if a run was killed just before it removed them
    if flags.png:
        add_pngs(store, count, process)
    if process.is_main:
        where = f"{count} images in {store.folder} and {store.npz}" if flags.png else f"{count} images in {store.npz}"
        print(f"{where}: " + ("finished already, nothing to sample" if finished else
                              f"{made} sampled in {seconds:.1f} s, {made / seconds:.2f} images/s"))


def note_speed(store: SampleStore, *, images: int, seconds: float) -> None:
    """Append to <settings>.speed.jsonl how long `images` took to draw and decode, if there were any."""
    if not images:
        return
    with open(store.npz.with_name(f"{store.folder.name}.speed.jsonl"), "a") as file:
        file.write(json.dumps({"images": images, "seconds": round(seconds, 3)}) + "\n")


def sample_missing(store: SampleStore, flags: SampleSetFlags, pipeline: Pipeline, process: dist.Process, *,
                   labels: list[int]) -> int:
    """Sample this process's share of the images that are in no shard and no PNG. Returns how many all processes made.

    The bar counts all processes' images, estimated from the pace of this one.
    """
    if process.is_main:
        lacking = store.lacking(len(labels))
        bare = store.without_png(lacking)
    lacking, bare = dist.broadcast_object((lacking, bare) if process.is_main else None)
    drawn = sorted(set(lacking) - set(bare))[process.rank::process.world_size]
    stream = torch.cuda.Stream() if process.device.type == "cuda" else None
    with SetWriter(store, png=flags.png) as writer:
        read = set()
        for index, picture in store.read_pngs(drawn):
            writer.add([index], partial(np.expand_dims, picture, 0))
            read.add(index)
        todo = bare[process.rank::process.world_size] + [index for index in drawn if index not in read]
        batch_size = even_batch(len(todo), flags.per_proc_batch_size or batch_that_fits(pipeline, process.device))
        if process.is_main and todo:
            print(f"{batch_size} images at a time on each process")
        with tqdm(total=len(bare), desc="sampling", unit="image", mininterval=1.0, disable=not process.is_main) as bar:
            for first in range(0, len(todo), batch_size):
                batch = todo[first:first + batch_size]
                codes = pipeline.sample_codes([labels[i] for i in batch], seed=flags.global_seed, indices=batch)
                writer.add(batch, decoding(pipeline, codes, size=store.size, stream=stream))
                bar.update(min(len(batch) * process.world_size, bar.total - bar.n))
    return int(dist.total(torch.tensor(len(todo))))


def add_pngs(store: SampleStore, count: int, process: dist.Process) -> None:
    """Write this process's share of the missing PNGs, from the npz."""
    bare = dist.broadcast_object(store.without_png(range(count)) if process.is_main else None)
    mine = set(bare[process.rank::process.world_size])
    if mine:
        pictures = tqdm(stored_images(store.npz), total=count, desc="PNGs", unit="image", disable=not process.is_main)
        for index, picture in enumerate(pictures):
            if index in mine:
                images.save_png(store.png(index), picture)
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, SampleSetFlags)
