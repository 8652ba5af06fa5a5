"""Sample the prompts of a benchmark, on one process or under torchrun, into the folder that its scorer reads.

    bash scripts/autoregressive/sample_t2i_parti.sh --gpt-ckpt GPT.pt --vq-ckpt VQ.pt
    bash scripts/autoregressive/sample_t2i_parti.sh … --prompt-csv evaluation_metadata.jsonl --sample-dir geneval

Prompts: a table with a column Prompt (COCO's captions, PartiPrompts), GenEval's evaluation_metadata.jsonl, DPG-Bench's
folder of <id>.txt. Pictures go to <sample-dir>/<settings>/, laid out as evaluations/t2i/layouts.py says; config.json
there (DPG-Bench: <settings>.json beside the folder) says how they were made. Image j of prompt p is the same for any
number of processes and any batch size. Run it again to continue after an interruption.
"""
import contextlib
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.batch_size import batch_that_fits, even_batch
from autoregressive.sample.options import SampleCountFlags
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.prompts import TextSampleFlags, draw_jobs, encoder_for, features_of, load_text_pipeline
from autoregressive.sample.set_claim import ENGINE, check_one_engine, checkpoint_name, claim, drawing_name, locked
from autoregressive.sample.set_writer import LayoutWriter, decoding
from evaluations.t2i.layouts import (
    LAYOUTS,
    Layout,
    Prompt,
    PromptJob,
    is_emoji,
    layout_for,
    read_prompts,
    remaining_jobs,
)
from utils import cli, dist
from utils.cli import flag
from utils.files import sweep
from utils.images import is_whole_png
from utils.options import BatchFlags, RecipeFlags, SampleDirFlags, SeedFlags

KNOWN_FILES = {  # where the prompts of benchmarks are published
    "PartiPrompts.tsv": "Google's repository parti has it",
    "coco_captions.csv": "LlamaGen's repository has it, in evaluations/t2i",
    "evaluation_metadata.jsonl": "GenEval's repository has it, in prompts",
}


@dataclass(kw_only=True)
class PromptSetFlags(TextSampleFlags, SampleCountFlags, SampleDirFlags, SeedFlags, BatchFlags, RecipeFlags):
    """The benchmark."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("sample",)
    prompt_csv: str = flag("evaluations/t2i/PartiPrompts.tsv", "prompts: a table (.csv, .tsv) with a column Prompt, "
                           "GenEval's evaluation_metadata.jsonl, DPG-Bench's folder of .txt; or emoji_seen, "
                           "emoji_unseen: names of the embedded emoji")
    sample_dir: str = "samples_parti"
    num_fid_samples: int = 30000


def prompts_of(flags: PromptSetFlags) -> list[Prompt]:
    """All prompts of --prompt-csv. Raises FileNotFoundError or ValueError."""
    path = Path(flags.prompt_csv)
    if not path.exists() and not is_emoji(path):
        where = f" ({KNOWN_FILES[path.name]})" if path.name in KNOWN_FILES else ""
        raise FileNotFoundError(f"no prompts at {path}: download {path.name}{where} and put it there, below the folder "
                                "that the command is started in, or give yours by --prompt-csv")
    return read_prompts(path)


def described_set(pipeline: Pipeline, encoder: dict[str, Any], layout: Layout, flags: PromptSetFlags, *,
                  prompts: list[Prompt]) -> dict[str, Any]:
    """Everything that decides the pictures. `prompts`: all of the file, also those beyond --num-fid-samples, so that a
    set can grow."""
    texts = json.dumps([prompt.text for prompt in prompts]).encode()
    return {**pipeline.described, "text_encoder": encoder,
            "prompts": Path(flags.prompt_csv).name, "prompts_sha256": hashlib.sha256(texts).hexdigest(),
            "layout": layout_for(flags.prompt_csv), "images_per_prompt": layout.count, "seed": flags.global_seed}


def set_name(pipeline: Pipeline, layout: Layout, flags: PromptSetFlags) -> str:
    """The name of the set: its settings, as LlamaGen has them."""
    described, size = pipeline.described, cli.shown_size(pipeline.image_size)
    each = f"-each-{layout.count}" if layout.count != layout.usual_count else ""
    padding = "" if flags.left_padding else "-right-padding"
    return (f"{described['gpt_model']}-{checkpoint_name(flags)}-{Path(flags.prompt_csv).name.split('.')[0].lower()}"
            f"-size-{size}-size-{size}-{described['vq_model']}-{drawing_name(described, flags)}{padding}{each}"
            f"-seed-{flags.global_seed}")


def main(flags: PromptSetFlags) -> Path:
    """Sample the images that are missing. Returns the set's folder."""
    process = dist.setup(timeout=86400.0)  # a day: processes wait for the slowest one
    if flags.num_fid_samples < 1 or flags.per_proc_batch_size < 0:
        raise ValueError("--num-fid-samples must be at least 1, --per-proc-batch-size at least 0 (what memory holds)")
    prompts = prompts_of(flags)
    layout = LAYOUTS[layout_for(flags.prompt_csv)](flags.sample_dir, prompts[:flags.num_fid_samples],
                                                   images_per_prompt=flags.images_per_prompt)
    pipeline = load_text_pipeline(flags, device=process.device)
    check_one_engine(pipeline.described[ENGINE])
    layout.folder = Path(flags.sample_dir) / set_name(pipeline, layout, flags)
    try:
        with locked(layout.folder) if process.is_main else contextlib.nullcontext():
            complete(layout, flags, pipeline, process, prompts=prompts)
    except OSError as error:
        raise OSError(f"{layout.folder}: {error}: what was written is kept, run again to continue") from error
    return layout.folder


def complete(layout: Layout, flags: PromptSetFlags, pipeline: Pipeline, process: dist.Process, *,
             prompts: list[Prompt]) -> None:
    """Make the images that the set lacks and print what was done."""
    encoder = encoder_for(flags, pipeline, device=process.device)
    if process.is_main:
        described = described_set(pipeline, encoder.described, layout, flags, prompts=prompts)
        claim(layout.settings_path, described, warnings=pipeline.warnings, folder=layout.folder,
              foreign=layout.folder if next(layout.folder.rglob("*.png"), None) else None)
        remove_unfinished(layout)
    jobs = remaining_jobs(layout, process)
    features = features_of(encoder, [job.prompt.text for job in jobs], precision=flags.precision)
    del encoder
    total, start = int(dist.total(torch.tensor(len(jobs)))), time.perf_counter()
    draw_missing(layout, flags, pipeline, process, jobs=jobs, features=features, total=total)
    dist.barrier()
    if process.is_main:
        seconds, count = time.perf_counter() - start, len(layout.prompts) * layout.count
        print(f"{count} images of {len(layout.prompts)} prompts in {layout.folder}: " + (
            f"{total} sampled in {seconds:.1f} s, {total / seconds:.2f} images/s" if total else
            "finished already, nothing to sample"))


def draw_missing(layout: Layout, flags: PromptSetFlags, pipeline: Pipeline, process: dist.Process, *,
                 jobs: list[PromptJob], features: dict[str, torch.Tensor], total: int) -> None:
    """Sample this process's `jobs`; the bar counts the `total` of all processes, estimated from the pace of this one.
    """
    stream = torch.cuda.Stream() if process.device.type == "cuda" else None
    batch_size = even_batch(len(jobs), flags.per_proc_batch_size or batch_that_fits(pipeline, process.device))
    if process.is_main and jobs:
        print(f"{batch_size} images at a time on each process", flush=True)
    with LayoutWriter(layout) as writer, tqdm(total=total, desc="sampling", unit="image", mininterval=1.0,
                                              disable=not process.is_main) as bar:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first:first + batch_size]
            codes = draw_jobs(pipeline, batch, features, seed=flags.global_seed)
            writer.add(batch, decoding(pipeline, codes, size=pipeline.image_size, stream=stream))
            bar.update(min(len(batch) * process.world_size, bar.total - bar.n))


def remove_unfinished(layout: Layout) -> None:
    """Remove what killed writers left, and pictures that are cut short, which are named."""
    paths = {layout.path(PromptJob(prompt, index, j)) for index, prompt in enumerate(layout.prompts)
             for j in range(layout.count)}
    for folder in {path.parent for path in paths}:
        sweep(folder)
    for path in sorted(paths):
        if path.exists() and not is_whole_png(path):
            cli.warn(f"{path} is cut short or no PNG: it is made again")
            path.unlink()


if __name__ == "__main__":
    cli.run(main, PromptSetFlags)
