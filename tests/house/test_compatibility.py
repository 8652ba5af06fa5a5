"""Code that imports from LlamaGen's modules: the names are there, with LlamaGen's signatures and numbers."""
import importlib
import json
import logging
import math
import os
import random
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT

NAMES = {
    "autoregressive.models.gpt": ["GPT_B", "GPT_L", "GPT_XL", "GPT_XXL", "GPT_XXXL", "GPT_1B", "GPT_3B", "GPT_7B",
                                  "GPT_models", "ModelArgs", "Transformer", "TransformerBlock", "RMSNorm",
                                  "precompute_freqs_cis_2d", "apply_rotary_emb", "find_multiple"],
    "autoregressive.models.generate": ["generate", "sample", "logits_to_probs", "top_k_top_p_filtering"],
    "tokenizer.tokenizer_image.vq_model": ["VQ_8", "VQ_16", "VQ_models", "VQModel", "ModelArgs"],
    "dataset.augmentation": ["center_crop_arr", "random_crop_arr"],
    "utils.ema": ["update_ema", "requires_grad"],
    "utils.logger": ["create_logger"],
    "utils.distributed": ["init_distributed_mode"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_in_their_original_modules(module):
    loaded = importlib.import_module(module)
    for name in NAMES[module]:
        assert callable(getattr(loaded, name)) or name.endswith("_models")
    with pytest.raises(ImportError, match=r"cannot import name 'no_such_name'"):
        exec(f"from {module} import no_such_name")
    room = importlib.import_module(f"compatibility.{module.rpartition('.')[2]}")
    assert set(room.__all__) <= set(NAMES[module])
    assert not set(room.__all__) & set(vars(loaded))  # nothing has two homes


@pytest.mark.processes
def test_the_modules_load_nothing_of_the_room_until_asked():
    code = ("import sys, autoregressive.models.generate, tokenizer.tokenizer_image.vq_model, dataset.augmentation\n"
            "import utils.ema\nassert not [name for name in sys.modules if name.startswith('compatibility')]\n"
            "assert not hasattr(utils.ema, '__path__') and not hasattr(utils.ema, 'EMA')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


# ---- models


def test_factories_and_arguments_of_the_gpt():
    from autoregressive.models.gpt import GPT_1B, GPT_B, ModelArgs, Transformer, find_multiple

    with torch.device("meta"):
        model = GPT_B(vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1, model_type="c2i",
                      resid_dropout_p=0.1, ffn_dropout_p=0.1, token_dropout_p=0.1, drop_path_rate=0.0)
        wide = GPT_1B(block_size=576)
    layout = json.loads((ROOT / "tests" / "data" / "layouts.json").read_text())["GPT-B/c2i"]
    assert {name: list(p.shape) for name, p in model.state_dict().items()} == layout
    assert (wide.config.dim, wide.config.n_layer, wide.config.n_head, wide.config.grid) == (2048, 22, 32, (24, 24))
    small = Transformer(ModelArgs(n_layer=2, n_head=4, dim=64, multiple_of=32, ffn_dim_multiplier=1.5, block_size=16,
                                  vocab_size=32, num_classes=3))
    assert small.layers[0].feed_forward.w1.weight.shape == (find_multiple(int(1.5 * 170), 32), 64) == (256, 64)
    assert [find_multiple(n, 8) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]
    logits, loss = small(torch.zeros(2, 15, dtype=torch.long), torch.tensor([0, 1]), targets=torch.zeros(2, 16).long())
    assert logits.shape == (2, 16, 32) and loss.item() == pytest.approx(math.log(32))


def test_the_rotary_table_and_the_rotation():
    from autoregressive.models.gpt import apply_rotary_emb, precompute_freqs_cis_2d

    table = precompute_freqs_cis_2d(3, 16, 10000, 2)
    assert table.shape == (2 + 9, 8, 2) and precompute_freqs_cis_2d(3, 16).shape == (129, 8, 2)
    assert not table[:2].any()
    for place in range(9):
        row, column = divmod(place, 3)
        angles = [position * 10000 ** (-2 * j / 8) for position in (row, column) for j in range(4)]
        expected = torch.tensor([[math.cos(a), math.sin(a)] for a in angles])
        torch.testing.assert_close(table[2 + place], expected)
    x = torch.randn(2, 11, 3, 16)
    turned = torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.view_as_complex(table)[None, :, None]
    torch.testing.assert_close(apply_rotary_emb(x, freqs_cis=table), torch.view_as_real(turned).flatten(-2))


def test_a_block_is_built_and_called_as_in_llamagen():
    from autoregressive.models.gpt import ModelArgs, RMSNorm, Transformer, TransformerBlock, precompute_freqs_cis_2d

    config = ModelArgs(dim=32, n_layer=1, n_head=2, multiple_of=16, block_size=16, num_classes=3, vocab_size=16)
    model = Transformer(config).eval()
    assert isinstance(model.layers[0], TransformerBlock)
    block = TransformerBlock(config, 0.1).eval()
    block.load_state_dict(model.layers[0].state_dict())
    table, x = precompute_freqs_cis_2d(4, 16, cls_token_num=1), torch.randn(2, 17, 32)
    causal = torch.ones(17, 17, dtype=torch.bool).tril()
    expected = model.hidden_states(x, mask=None, rope=table)
    norm = RMSNorm(32, 1e-5)
    for mask in (None, causal[None, None]):
        torch.testing.assert_close(norm(block(x, table, None, mask)), expected)


def test_factories_and_arguments_of_the_tokenizer():
    from tokenizer.tokenizer_image.vq_model import VQ_8, VQ_16, ModelArgs, VQModel

    with torch.device("meta"):
        sixteen, eight = VQ_16(codebook_size=16384, codebook_embed_dim=8), VQ_8()
    assert (sixteen.downsample, eight.downsample) == (16, 8)
    model = VQModel(ModelArgs(encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], ch=8, z_channels=8, codebook_size=32))
    pixels, (losses) = model(torch.zeros(1, 3, 16, 16))
    assert pixels.shape == (1, 3, 16, 16) and losses is not None


# ---- sampling


def test_filters_and_draws():
    from autoregressive.models.generate import logits_to_probs, sample, top_k_top_p_filtering

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator) * 3
    for k, p in ((0, 1.0), (7, 1.0), (0, 0.8), (12, 0.6), (100, 0.0)):
        ordered, order = logits.sort(descending=True)
        if k:
            ordered[:, min(k, 40):] = -math.inf
        beyond = (ordered.softmax(-1).cumsum(-1) > p) & (p < 1)
        beyond[:, 1:] = beyond[:, :-1].clone()
        beyond[:, 0] = False
        ordered[beyond] = -math.inf
        expected = torch.full_like(logits, -math.inf).scatter(1, order, ordered)
        assert torch.equal(top_k_top_p_filtering(logits.clone(), top_k=k, top_p=p), expected)
        torch.testing.assert_close(logits_to_probs(logits, top_k=k, top_p=p), expected.softmax(-1))
    assert (top_k_top_p_filtering(logits, 1, 1.0, -5.0, 3) > -5.0).sum() >= 15  # three of each row stay
    assert top_k_top_p_filtering(logits.bfloat16(), top_k=2).dtype == torch.bfloat16

    stack = logits[:, None].repeat(1, 3, 1)
    codes, probabilities = sample(stack, temperature=0.5, top_k=3, top_p=1.0)
    assert codes.shape == (5, 1) and probabilities.gather(1, codes).min() > 0
    torch.testing.assert_close(probabilities, logits_to_probs(logits / 0.5, top_k=3))
    assert torch.equal(sample(stack, sample_logits=False)[0][:, 0], logits.argmax(-1))


# ---- images and training


def test_crops_of_pil_images():
    from dataset.augmentation import center_crop, center_crop_arr, random_crop_arr

    pixels = np.random.default_rng(0).integers(0, 256, (75, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(center_crop_arr(image, 32)), center_crop(image, (32, 32)))
    square = Image.fromarray(pixels[:50])
    assert np.array_equal(np.asarray(center_crop_arr(square, 50)), pixels[:50])
    random.seed(1)
    crops = [np.asarray(random_crop_arr(image, 32)) for _ in range(6)]
    assert all(crop.shape == (32, 32, 3) for crop in crops) and len({crop.tobytes() for crop in crops}) > 3
    random.seed(1)
    side = random.randrange(32, 40 + 1)  # of the smaller side: 32 / 0.8
    resized = image.resize((side, round(75 * side / 50)), Image.Resampling.BICUBIC)
    top, left = random.randrange(resized.height - 31), random.randrange(resized.width - 31)
    assert np.array_equal(crops[0], np.asarray(resized)[top:top + 32, left:left + 32])
    whole = random_crop_arr(square, 50, min_crop_frac=1.0)
    assert isinstance(whole, Image.Image) and np.array_equal(np.asarray(whole), pixels[:50])


def test_averages_and_gradients():
    from utils.ema import requires_grad, update_ema

    model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    requires_grad(average, False)
    before = average.weight.clone()
    update_ema(average, model, decay=0.9)
    torch.testing.assert_close(average.weight, 0.9 * before + 0.1 * model.weight.detach())
    update_ema(average, model, decay=0)  # LlamaGen's start: the average is the model
    assert torch.equal(average.weight, model.weight)
    assert not any(p.requires_grad for p in average.parameters())
    requires_grad(average)
    assert all(p.requires_grad for p in average.parameters())


def test_a_logger_writes_log_txt_on_rank_0(tmp_path, monkeypatch):
    from utils.logger import create_logger

    for _ in range(2):  # a second one does not write twice
        create_logger(tmp_path / "run").info("step %d", 3)
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert len(lines) == 2 and all(line.endswith("] step 3") for line in lines)
    monkeypatch.setenv("RANK", "1")
    create_logger(None).info("silent")
    logger = create_logger(str(tmp_path / "other"))
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert not (tmp_path / "other").exists()


def test_a_process_alone_is_not_distributed(monkeypatch):
    from utils.distributed import init_distributed_mode

    monkeypatch.delenv("RANK", raising=False)
    args = Namespace()
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu) == (False, 0, 1, 0)
    assert not torch.distributed.is_initialized()
