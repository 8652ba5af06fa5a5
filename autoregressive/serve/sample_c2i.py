"""Draw a labelled grid of class-conditional samples with vLLM.

    bash scripts/serve_env.sh python autoregressive/serve/sample_c2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt

The flags are those of autoregressive/sample/sample_c2i.py as far as vLLM has what they need. The distribution is that
of this program's own decoder, the pictures of a seed are others: vLLM draws with random streams of its own. They depend
on (seed, index) and not on how many are drawn at once. Scales of guidance are rounded to thousandths.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.options import ClassesFlags, SampleFlags
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.sample_c2i import default_classes
from autoregressive.serve.vllm_engine import (
    EngineFlags,
    check_model,
    draw_codes,
    fit_for_vllm,
    prepare_vllm,
    running_engine,
)
from utils import cli, dist, images
from utils.options import OutputFlags
from utils.seeding import derive_seed


@dataclass(kw_only=True)
class ServedGridFlags(SampleFlags, ClassesFlags, OutputFlags, EngineFlags):
    """The grid command."""

    output: str = "sample_c2i.png"
    top_k: int = 2000


def main(flags: ServedGridFlags) -> None:
    """Sample one image per class."""
    prepare_vllm()
    device = dist.setup().device
    pipeline = load_pipeline(fit_for_vllm(flags, device=device), device=device)
    check_model(pipeline, source=flags.gpt_ckpt)
    labels = pipeline.conditions.parse(flags.classes) if flags.classes is not None else default_classes(pipeline)
    pipeline.tell_null_control()
    with running_engine(pipeline, max_num_seqs=flags.max_num_seqs, compile=flags.compile) as engine:
        start = time.perf_counter()
        codes = draw_codes(engine, pipeline, labels, seeds=[derive_seed(flags.seed, i) for i in range(len(labels))])
    pictures = pipeline.to_pixels(codes.to(device))
    seconds = time.perf_counter() - start
    images.save_png(Path(flags.output), images.grid(pictures, columns=min(8, max(4, len(labels) // 2)),
                                                    labels=[pipeline.conditions.name(label) for label in labels]))
    height, width = pipeline.image_size
    print(f"{len(labels)} images of {height}x{width} in {seconds:.1f} s: {flags.output}")


if __name__ == "__main__":
    cli.run(main, ServedGridFlags)
