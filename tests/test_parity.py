"""The numbers that the reference implementation produces, reproduced (tests/data; made with deterministic weights)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from tests.data.fill import fill, image
from tokenizer.tokenizer_image.vq_model import VQ_models

DATA = Path(__file__).parent / "data"
LAYOUTS = json.loads((DATA / "layouts.json").read_text())


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.fixture(scope="module", params=["vq16_256", "vq8_128"])
def tokenizer(request):
    reference = np.load(DATA / f"{request.param}.npz")
    model = VQ_models["VQ-16" if request.param.startswith("vq16") else "VQ-8"]().eval()
    fill(model.state_dict(), str(reference["salt"]))
    return model, reference


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_tokenizer_layout(name):
    assert shapes(VQ_models[name]()) == LAYOUTS[name]


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_gpt_layout(kind):
    model = GPT_models["GPT-B"](model_type=kind, cls_token_num=1 if kind == "c2i" else 120)
    assert shapes(model) == LAYOUTS[f"GPT-B/{kind}"]


@torch.no_grad()
def test_tokenizer_numbers(tokenizer):
    model, reference = tokenizer
    height, width = reference["size"].tolist()
    picture = image(height, width, len(str(reference["salt"])))
    prequant = model.prequant(picture)
    np.testing.assert_allclose(prequant.numpy(), reference["prequant"], atol=1e-4, rtol=0)
    codes = model.encode(picture)[2][2]
    clear = reference["code_gap"] > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes.numpy()[clear], reference["codes"][clear])

    shape = (1, 8, *prequant.shape[-2:])
    decoded = model.decode_code(torch.from_numpy(reference["codes"]).long(), shape)
    np.testing.assert_allclose(decoded[:, :, :16, :16].numpy(), reference["decoded_crop"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(decoded.mean((2, 3)).numpy(), reference["decoded_mean"], atol=1e-3, rtol=0)
    decoded = model.decode_code(torch.from_numpy(reference["decode_codes"]).long(), shape)
    np.testing.assert_allclose(decoded[:, :, -16:, -16:].numpy(), reference["decode_crop"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(decoded.mean((2, 3)).numpy(), reference["decode_mean"], atol=1e-3, rtol=0)


@pytest.fixture(scope="module", params=["gpt_b_c2i_256", "gpt_b_c2i_576_cfg_interval", "gpt_b_t2i_256"])
def gpt(request):
    reference = np.load(DATA / f"{request.param}.npz")
    kind, block = str(reference["kind"]), int(reference["block"])
    model = GPT_models["GPT-B"](block_size=block, model_type=kind, cls_token_num=1 if kind == "c2i" else 120,
                                class_dropout_prob=0.0).eval()
    state = model.state_dict()
    fill(state, str(reference["salt"]))
    state["output.weight"].mul_(4)
    rng = np.random.RandomState(11)
    tokens = torch.from_numpy(rng.randint(0, 16384, (2, block))).long()
    assert np.array_equal(tokens.numpy(), reference["teacher_tokens"])
    condition, valid_text = torch.from_numpy(reference["classes"]), None
    if kind == "t2i":
        features = torch.from_numpy(rng.standard_normal((3, 120, 2048)).astype(np.float32))
        valid_text = torch.arange(120)[None] >= 120 - condition[:, None]  # captions are padded on the left
        condition = features * valid_text[..., None]
    return model, reference, tokens, condition, valid_text


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_gpt_teacher_forced(gpt, training):
    model, reference, tokens, condition, _ = gpt
    for module in model.modules():  # the training forward, dropout aside, is the evaluation forward
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train(training)
    logits, loss = model(tokens[:, :-1], condition[:2], targets=tokens)
    model.eval()
    np.testing.assert_allclose(logits[:, ::37, ::257].numpy(), reference["teacher_logits"], atol=2e-4, rtol=0)
    assert abs(loss.item() - float(reference["teacher_loss"])) < 1e-5


def test_gpt_greedy(gpt):
    model, reference, _, condition, valid_text = gpt
    expected = reference["greedy_codes"]
    codes = generate(model, condition, expected.shape[1], emb_masks=valid_text, cfg_scale=float(reference["cfg_scale"]),
                     cfg_interval=int(reference["cfg_interval"]), sample_logits=False).numpy()
    for row in range(len(codes)):  # rounding may decide a step whose two best logits are within 1e-3; none before it
        close = np.flatnonzero(reference["greedy_gap"][row] < 1e-3)
        steps = close[0] if len(close) else codes.shape[1]
        np.testing.assert_array_equal(codes[row, :steps], expected[row, :steps])
