"""The numbers that the reference implementation produces, reproduced (tests/data; made with deterministic weights)."""
import json

import pytest
import torch

from autoregressive.models.gpt import GPT_models
from tests.autoregressive.models.decoding import engine_of
from tests.data.references import (
    DATA,
    GPTS,
    TOKENIZERS,
    generated_codes,
    load_gpt,
    teacher_forced_differences,
    tokenizer_differences,
    wrong_greedy_codes,
)
from tokenizer.tokenizer_image.vq_model import VQ_models

LAYOUTS = json.loads((DATA / "layouts.json").read_text())


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


@pytest.mark.parametrize("file", TOKENIZERS)
def test_tokenizer_numbers(file):
    found = tokenizer_differences(file)
    assert found["before quantisation"] <= 1e-4 and found["pixels"] <= 1e-3, found
    assert found["clear codes"] > 0.9 and found["wrong codes"] == 0, found


@pytest.fixture(scope="module", params=GPTS)
def gpt(request):
    return load_gpt(request.param)


def test_gpt_teacher_forced(gpt):
    found = teacher_forced_differences(gpt)
    assert found["logits"] <= 2e-4 and found["logits in training"] <= 2e-4 and found["loss"] < 1e-5, found


def test_gpt_greedy(gpt):
    """Every code of the reference is the best guided logit after the codes before it."""
    wrong, clear = wrong_greedy_codes(gpt)
    assert clear > 0.9 and wrong == 0


def test_generate_begins_as_the_reference(gpt, engine):
    wrong, compared = generated_codes(gpt)
    assert type(engine_of(gpt.model)) is engine
    assert compared > 20 and wrong == 0
