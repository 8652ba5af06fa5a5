"""How many images to sample at a time: `--per-proc-batch-size 0` asks for as many as memory holds."""
import math
import os
from pathlib import Path

import torch

from autoregressive.sample.pipeline import Pipeline
from tokenizer.build import images_at_once, runs_on_kernels

ENOUGH = {"cpu": 32, "cuda": 512}  # images; a larger batch is no faster, as arithmetic is the limit
SHARE = 0.8  # of the free memory; the rest is for fragmentation and what is not counted here
LOGIT_COPIES = 8  # copies of the logits in fp32: guided, filtered, sorted with int64 indices, noise
PIXEL_COPIES = 4  # copies of an image, in fp32 and 8 bits, until it is written
DECODER_COPIES = 4  # copies of the tokenizer's widest activations
MEMINFO = "/proc/meminfo"
CONTAINER = (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),  # limit and use, cgroups v2 and v1
             ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"))


def even_batch(total: int, limit: int) -> int:
    """The batch size that makes as few batches of `total` images as `limit` allows, all about equally large."""
    return math.ceil(total / math.ceil(total / limit)) if total else limit


def bytes_per_image(pipeline: Pipeline, device: torch.device, *, canvas: tuple[int, int] | None = None) -> int:
    """Bytes that each image of a batch adds: keys and values (twice with guidance), logits, pixels on a CPU. Those of
    control pictures are not counted: who asks here draws without.

    canvas: height and width of an edit's result, drawn window by window, whose pixels are all on the device at once.
    """
    config, weight = pipeline.gpt.config, next(pipeline.gpt.parameters())
    rows = 2 if pipeline.settings["cfg_scale"] > 1 else 1
    parts = pipeline.gpt.parts()
    caches = len(parts.layers) + (parts.shared is not None)
    drawn = 1 if pipeline.schedule is None else max(pipeline.schedule.sizes(config.block_size))  # codes in a step
    tokens = config.cls_token_num + config.block_size
    cache = 2 * caches * config.n_kv_head * (config.dim // config.n_head) * tokens * weight.element_size()
    kept = canvas or (pipeline.image_size if device.type == "cpu" else (0, 0))
    pixels = PIXEL_COPIES * 3 * 4 * math.prod(kept)
    return rows * (cache + drawn * LOGIT_COPIES * 4 * config.vocab_size) + pixels


def decoder_bytes(pipeline: Pipeline, device: torch.device, *, canvas: tuple[int, int] | None = None) -> int:
    """Bytes that the tokenizer's decoder needs for any batch size: it takes few images at a time."""
    config, pixels = pipeline.tokenizer.config, math.prod(canvas or pipeline.image_size)
    at_once = images_at_once(pixels, device.type, free=runs_on_kernels(pipeline.tokenizer))
    return at_once * config.ch * max(config.decoder_ch_mult[:2]) * 4 * pixels * DECODER_COPIES


def batch_that_fits(pipeline: Pipeline, device: torch.device, *, canvas: tuple[int, int] | None = None,
                    most: int | None = None) -> int:
    """The largest batch that fits into the free memory of `device`; at least 1, at most `most`, or ENOUGH. canvas: see
    `bytes_per_image`."""
    room = SHARE * free_memory(device) - decoder_bytes(pipeline, device, canvas=canvas)
    return max(1, min(most or ENOUGH[device.type], int(room / bytes_per_image(pipeline, device, canvas=canvas))))


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still use: its GPU's, or its share of the memory of the machine or container."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = [line.split()[1] for line in text_of(MEMINFO).splitlines() if line.startswith("MemAvailable:")]
    room = [1024 * int(kibibytes) for kibibytes in free] or [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, used in CONTAINER:
        if text_of(limit).isdecimal() and text_of(used).isdecimal():  # not "max", not missing
            room.append(int(text_of(limit)) - int(text_of(used)))
    return min(room) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def text_of(path: str) -> str:
    """The text of a small file, stripped; empty when it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
