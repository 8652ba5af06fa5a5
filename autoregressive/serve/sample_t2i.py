"""Draw pictures of prompts with vLLM: a grid with the prompts under the pictures.

    bash scripts/serve_env.sh python autoregressive/serve/sample_t2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt --prompt cat

The flags are those of autoregressive/sample/sample_t2i.py as far as vLLM has what they need; what is said of random
streams and scales in sample_c2i.py beside this file holds here too.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.prompts import encoder_for, features_of, load_text_pipeline
from autoregressive.sample.sample_t2i import PromptGridFlags, asked_jobs, save_grid
from autoregressive.serve.vllm_engine import (
    EngineFlags,
    check_model,
    draw_codes,
    fit_for_vllm,
    prepare_vllm,
    running_engine,
)
from utils import cli, dist


@dataclass(kw_only=True)
class ServedPromptFlags(PromptGridFlags, EngineFlags):
    """The prompts."""


def main(flags: ServedPromptFlags) -> None:
    """Draw the pictures of the prompts."""
    prepare_vllm()
    device = dist.setup().device
    jobs = asked_jobs(flags)
    fitting = fit_for_vllm(flags, device=device)
    pipeline = load_text_pipeline(fitting, device=device)
    check_model(pipeline, source=flags.gpt_ckpt)
    encoder = encoder_for(fitting, pipeline, device=device)
    features, described = features_of(encoder, [job.prompt.text for job in jobs],
                                      precision=fitting.precision), encoder.described
    del encoder
    with running_engine(pipeline, max_num_seqs=flags.max_num_seqs, compile=flags.compile) as engine:
        start = time.perf_counter()
        codes = draw_codes(engine, pipeline, [features[job.prompt.text] for job in jobs],
                           seeds=[job.seed(flags.seed) for job in jobs])
    save_grid(flags, jobs, pipeline.to_pixels(codes.to(device)), pipeline, text_encoder=described,
              seconds=time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main, ServedPromptFlags)
