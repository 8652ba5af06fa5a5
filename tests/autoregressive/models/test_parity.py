"""The numbers that the reference implementation produces, reproduced (tests/data; made with deterministic weights)."""
import json

import numpy as np
import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models
from autoregressive.models.sampling import guide
from tests.autoregressive.models.decoding import attention_mask, engine_of
from tests.conftest import ROOT
from tests.data.fill import fill, image
from tokenizer.tokenizer_image.vq_model import VQ_models

DATA = ROOT / "tests" / "data"
LAYOUTS = json.loads((DATA / "layouts.json").read_text())
CLEAR = 1e-3  # rounding may decide a step whose two best logits are closer than this
CACHED_STEPS = 24  # drawn by `generate` itself; the other codes are checked by one teacher-forced pass


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_tokenizer_layout(name):
    with torch.device("meta"):
        assert shapes(VQ_models[name]()) == LAYOUTS[name]


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_gpt_layout(kind):
    with torch.device("meta"):
        model = GPT_models["GPT-B"](model_type=kind, cls_token_num=1 if kind == "c2i" else 120)
    assert shapes(model) == LAYOUTS[f"GPT-B/{kind}"]


def filled(build, salt: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        model = build(**options)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    fill(model.state_dict(), salt)
    return model


@pytest.mark.parametrize("file", ["vq16_256", "vq8_128"])
@torch.no_grad()
def test_tokenizer_numbers(file):
    reference = np.load(DATA / f"{file}.npz")
    salt = str(reference["salt"])
    model = filled(VQ_models["VQ-16" if file.startswith("vq16") else "VQ-8"], salt)
    height, width = reference["size"].tolist()
    prequant = model.prequant(image(height, width, len(salt)))
    np.testing.assert_allclose(prequant.numpy(), reference["prequant"], atol=1e-4, rtol=0)
    codes = model.quantize(prequant)[2]
    clear = reference["code_gap"] > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(codes.numpy()[clear], reference["codes"][clear])

    grid = prequant.shape[-2:]
    both = torch.from_numpy(np.stack([reference["codes"], reference["decode_codes"]])).long()
    decoded, random = model.decode_code(both, (2, 8, *grid)).split(1)
    np.testing.assert_allclose(decoded[:, :, :16, :16].numpy(), reference["decoded_crop"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(decoded.mean((2, 3)).numpy(), reference["decoded_mean"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(random[:, :, -16:, -16:].numpy(), reference["decode_crop"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(random.mean((2, 3)).numpy(), reference["decode_mean"], atol=1e-3, rtol=0)


@pytest.fixture(scope="module", params=["gpt_b_c2i_256", "gpt_b_c2i_576_cfg_interval", "gpt_b_t2i_256"])
def gpt(request):
    reference = np.load(DATA / f"{request.param}.npz")
    kind, block = str(reference["kind"]), int(reference["block"])
    model = filled(GPT_models["GPT-B"], str(reference["salt"]), block_size=block, model_type=kind,
                   cls_token_num=1 if kind == "c2i" else 120, class_dropout_prob=0.0, token_dropout_p=0.0,
                   resid_dropout_p=0.0, ffn_dropout_p=0.0)
    model.output.weight.mul_(4)
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
def test_gpt_teacher_forced(gpt):
    model, reference, tokens, condition, _ = gpt
    model.eval()
    logits, loss = model(tokens[:, :-1], condition[:2], targets=tokens)
    np.testing.assert_allclose(logits[:, ::37, ::257].numpy(), reference["teacher_logits"], atol=2e-4, rtol=0)
    assert abs(loss.item() - float(reference["teacher_loss"])) < 1e-5
    model.train()  # dropout is 0: the training forward is the same one
    again, _ = model(tokens[:1, :16], condition[:1])
    model.eval()
    np.testing.assert_allclose(again.numpy(), logits[:1, :17].numpy(), atol=2e-4, rtol=0)


@torch.no_grad()
def test_gpt_greedy(gpt):
    """Every code of the reference is the best guided logit after the codes before it."""
    model, reference, _, condition, valid_text = gpt
    expected = torch.from_numpy(reference["greedy_codes"]).long()
    gap, scale, interval = reference["greedy_gap"], float(reference["cfg_scale"]), int(reference["cfg_interval"])
    steps = expected.shape[1]
    mask, width = None, model.config.cls_token_num + steps - 1
    if valid_text is not None:
        mask = attention_mask(valid_text, model.config.cls_token_num, width)

    best = model(expected[:, :-1], condition, mask=mask)[0]
    guided_steps = steps if interval < 0 else interval + 2  # the prefill, then decoding steps 0 … interval
    if scale > 1:
        head = expected[:, :guided_steps - 1]
        part = mask if mask is None else mask[:, :, :width - steps + guided_steps, :width - steps + guided_steps]
        free = model(head, model.cls_embedding.unconditional(condition), mask=part)[0]
        best[:, :guided_steps] = guide(best[:, :guided_steps], free, scale)
    clear = torch.from_numpy(gap >= CLEAR)
    assert clear.float().mean() > 0.9
    assert torch.equal(best.argmax(-1)[clear], expected[clear])


def test_generate_begins_as_the_reference(gpt, engine):
    model, reference, _, condition, valid_text = gpt
    expected, gap = torch.from_numpy(reference["greedy_codes"]).long(), reference["greedy_gap"]
    codes = generate(model, condition, min(CACHED_STEPS, expected.shape[1]), emb_masks=valid_text, sample_logits=False,
                     cfg_scale=float(reference["cfg_scale"]), cfg_interval=int(reference["cfg_interval"]))
    assert type(engine_of(model)) is engine
    for row in range(len(expected)):
        close = np.flatnonzero(gap[row] < CLEAR)
        until = min([codes.shape[1], *close[:1]])
        assert torch.equal(codes[row, :until], expected[row, :until])
