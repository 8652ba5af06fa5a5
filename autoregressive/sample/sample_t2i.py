"""Draw pictures of prompts: a grid with the prompts under the pictures.

    python3 autoregressive/sample/sample_t2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --prompt "a red cat" --prompt "a boat"
    python3 autoregressive/sample/sample_t2i.py … --prompt-file prompts.txt --images-per-prompt 4
    echo "a red cat" | python3 autoregressive/sample/sample_t2i.py … --prompt -

The picture goes to --output, the settings, prompts and warnings to the .json beside it. Sets of pictures for benchmarks
are drawn by sample_t2i_ddp.py; of one seed, picture j of prompt p is the same there.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.batch_size import batch_that_fits, even_batch
from autoregressive.sample.options import DrawSeedFlags
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.prompts import (
    STDIN,
    TextSampleFlags,
    draw_jobs,
    encoder_for,
    features_of,
    load_text_pipeline,
    prompts_from,
    typed,
)
from evaluations.t2i.layouts import Prompt, PromptJob
from utils import cli, dist, images
from utils.cli import flag
from utils.options import OutputFlags, RecipeFlags

EXAMPLES = ("a lighthouse on a cliff at sunset, oil painting", "a corgi in a red scarf, sitting in the snow",
            "a bowl of ramen with an egg on a wooden table", "an astronaut reading a newspaper on a park bench")
MOST_SHOWN = 1024  # pictures in a grid, which is made as a whole
LABEL_LINES = 3


@dataclass(kw_only=True)
class PromptGridFlags(TextSampleFlags, DrawSeedFlags, OutputFlags, RecipeFlags):
    """The prompts."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("sample",)
    recipe_in_part: ClassVar[bool] = True  # what is about sets is left out
    prompt: list[str] | None = flag(None, "what to draw; may be given many times; - is standard input, one on each "
                                          "line; without --prompt and --prompt-file: four examples", repeated=True)
    prompt_file: str | None = flag(None, "file of prompts: a text with one on each line, or a benchmark's .csv, .tsv, "
                                         ".jsonl or folder of .txt; - is standard input")
    output: str = "sample_t2i.png"


def asked_prompts(flags: PromptGridFlags) -> list[str]:
    """The prompts that --prompt and --prompt-file give, in this order."""
    found = [text for given in flags.prompt or () for text in
             (prompts_from(STDIN) if given == STDIN else [typed(given)])]
    found += prompts_from(flags.prompt_file) if flags.prompt_file is not None else []
    return found or list(EXAMPLES)


def asked_jobs(flags: PromptGridFlags) -> list[PromptJob]:
    """The pictures that the flags ask for. Raises ValueError for what a grid cannot hold."""
    each = 1 if flags.images_per_prompt is None else flags.images_per_prompt
    if each < 1:
        raise ValueError(f"--images-per-prompt is {each}, expected 1 or more")
    output = Path(flags.output)
    if output.is_dir() or output.suffix.lower() == ".json":
        raise ValueError(f"--output is {output}: expected the name of a picture, such as {PromptGridFlags.output}")
    jobs = [PromptJob(Prompt(text), p, j) for p, text in enumerate(asked_prompts(flags)) for j in range(each)]
    if len(jobs) > MOST_SHOWN:
        raise ValueError(f"{len(jobs)} pictures are too many for a grid, which holds {MOST_SHOWN}: draw them as a set "
                         "by sample_t2i_ddp.py --prompt-csv")
    return jobs


def save_grid(flags: PromptGridFlags, jobs: list[PromptJob], pictures: np.ndarray, pipeline: Pipeline, *,
              text_encoder: dict, seconds: float) -> None:
    """Write the pictures uint8 (B, H, W, 3) as a grid, what they were made with beside it, and say so."""
    output, each = Path(flags.output), flags.images_per_prompt or 1
    columns = min(8, each) if each > 1 else min(len(jobs), 8, max(4, len(jobs) // 2))
    images.save_png(output, images.grid(pictures, columns=columns, lines=LABEL_LINES,
                                        labels=[job.prompt.text for job in jobs]))
    prompts = [job.prompt.text for job in jobs if not job.image_index]
    cli.save_config(output.with_suffix(".json"), flags, prompts=prompts, models=pipeline.described,
                    text_encoder=text_encoder, warnings=pipeline.warnings)
    height, width = pipeline.image_size
    print(f"{len(jobs)} images of {height}x{width} in {seconds:.1f} s: {flags.output}")


def main(flags: PromptGridFlags) -> None:
    """Draw the pictures of the prompts."""
    process = dist.setup()
    if process.world_size > 1:
        raise ValueError(f"a grid takes one process, {process.world_size} were started: set nproc_per_node=1, or use "
                         "sample_t2i_ddp.py")
    jobs = asked_jobs(flags)
    pipeline = load_text_pipeline(flags, device=process.device)
    encoder = encoder_for(flags, pipeline, device=process.device)
    features, described = features_of(encoder, [job.prompt.text for job in jobs],
                                      precision=flags.precision), encoder.described
    del encoder

    start, parts = time.perf_counter(), []
    step = even_batch(len(jobs), batch_that_fits(pipeline, process.device))
    for first in range(0, len(jobs), step):
        parts.append(pipeline.to_pixels(draw_jobs(pipeline, jobs[first:first + step], features, seed=flags.seed)))
    save_grid(flags, jobs, np.concatenate(parts), pipeline, text_encoder=described,
              seconds=time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main, PromptGridFlags)
