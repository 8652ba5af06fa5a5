"""Runs all kernels once, built with the compiler's checks for memory and undefined behaviour: see test_units.py."""
import os
import sys

import torch

from autoregressive.models import lean_kernels, quantized
from autoregressive.models.engines import engine_for
from autoregressive.models.generate import generate
from autoregressive.models.native_engine import WEIGHTS, NativeEngine
from native import build
from tests.autoregressive.models.test_gpt import tiny
from tokenizer.build import decode_images, encode_images, runs_on_kernels
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel

build.FLAGS = *(flag for flag in build.FLAGS if flag != "-O3"), "-O1", "-g", *sys.argv[1:]
UNITS = list(build.UNITS)[:build.units()] or ["1"]
BEST = UNITS[-1:]
torch.set_num_threads(2)
torch.manual_seed(0)
build.prepare(("sample",), *(("decode", f"WEIGHTS={i}") for i in WEIGHTS.values()))

tokenizer = VQModel(VQConfig(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=12, z_channels=40, codebook_size=300,
                             num_res_blocks=1)).eval().requires_grad_(False)
for unit in UNITS:
    os.environ["LLAMAGEN_NATIVE"] = unit
    assert runs_on_kernels(tokenizer)
    for dtype in (torch.float32, torch.bfloat16):
        decode_images(tokenizer, encode_images(tokenizer, torch.rand(3, 3, 22, 18)), (11, 9), dtype=dtype)

for kind in WEIGHTS:
    for unit in UNITS if kind == torch.bfloat16 else BEST:
        os.environ["LLAMAGEN_NATIVE"] = unit
        model = tiny(grid=(4, 4), **({"dim": 128, "multiple_of": 64} if kind in (8, 4) else {}))
        model = quantized.quantize_(model, kind) or model if kind in (8, 4) else model.to(kind)
        assert type(engine_for(model)) is NativeEngine
        for images, way in ((1, {}), (9, {"top_p": 0.9}), (40, {"top_k": 7}), (2, {"decode": "jacobi", "window": 5})):
            generate(model, torch.arange(images) % 3, 16, cfg_scale=2.0, **way)
for unit in UNITS:
    os.environ["LLAMAGEN_NATIVE"] = unit
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(grid=(6, 7), dim=128, n_head=4).train()
        assert lean_kernels.training_kernels() is not None
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            codes = torch.randint(model.config.vocab_size, (3, 42))
            model(codes[:, :-1], torch.arange(3), targets=codes)[1].backward()
print("done")
