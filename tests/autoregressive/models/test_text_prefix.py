"""Text prefixes of different length: training without their padding, and without a mask; ARPG with a caption."""
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models import blocks
from autoregressive.models.arpg import ARPG
from autoregressive.models.base import CodeModel
from autoregressive.models.generate import generate
from autoregressive.models.schedule import DrawSchedule
from tests.autoregressive.models import small_arpg
from tests.autoregressive.models.decoding import attention_mask, engine_of, streams
from tests.autoregressive.models.small_arpg import block_masks
from tests.autoregressive.models.test_gpt import V
from tests.autoregressive.models.test_gpt import tiny as tiny_gpt

CAPTION, TEXT, LENGTHS = 8, 6, [3, 1, 5, 2]
MODELS = {"GPT": tiny_gpt, "ARPG": small_arpg.tiny, "ARPG at the origin": lambda **options: small_arpg.tiny(
    class_at_origin=True, **options)}


def model_of(name: str, **options) -> CodeModel:
    return MODELS[name](model_type="t2i", cls_token_num=TEXT, caption_dim=CAPTION, grid=(3, 4), class_dropout_prob=0.0,
                        **options)


def padded(tokens: int = TEXT) -> tuple[Tensor, Tensor]:
    """Features (4, tokens, CAPTION) whose padding is noise, and which are real."""
    features = torch.randn(4, TEXT, CAPTION)[:, -tokens:]
    return features, torch.arange(tokens) >= tokens - torch.tensor(LENGTHS)[:, None]


def masked(model: CodeModel, codes: Tensor, features: Tensor, real: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The forward with the padding in its place, hidden by a mask."""
    mask = attention_mask(real, real.shape[1], real.shape[1] + codes.shape[1] - 1)
    which = {"masks": (mask, mask)} if isinstance(model, ARPG) else {"mask": mask}
    return model(codes[:, :-1], features, codes, **which, **options)


@pytest.mark.parametrize("tokens", [TEXT, 5])
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_without_padding_are_those_with_masked_padding(name, options, tokens):
    """Logits, loss and every gradient, with some captions left out."""
    model, codes, (features, real) = model_of(name, **options), torch.randint(V, (4, 12)), padded(tokens)
    more = {"dropped": torch.tensor([False, True, False, False])}
    if isinstance(model, ARPG):
        more["orders"] = torch.stack([torch.randperm(12) for _ in range(4)])
    found = {}
    for kind in ("masked", "moved"):
        model.zero_grad()
        if kind == "masked":
            logits, loss = masked(model, codes, features, real, **more)
        else:
            logits, loss = model(codes[:, :-1], features, codes, lengths=real.sum(1), **more)
        loss.backward()
        found[kind] = logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    assert found["masked"][0].std() > 0.1
    for mine, theirs in zip(found["moved"][:2], found["masked"][:2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    for key, gradient in found["moved"][2].items():
        torch.testing.assert_close(gradient, found["masked"][2][key], atol=1e-4, rtol=1e-3, msg=key)
    plain = model(codes[:, :-1], features, codes, **more)[1]
    assert (plain - found["moved"][1]).abs() > 1e-3  # padding that is neither masked nor left out does count


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_batch_may_be_as_short_as_its_longest_caption(name):
    """Features padded to fewer tokens than the model has give the same, captions left out included."""
    model, codes, (features, _) = model_of(name), torch.randint(V, (4, 12)), padded()
    lengths = torch.tensor([4, 1, 2, 3])
    more = {"dropped": torch.tensor([False, True, False, True]), "lengths": lengths}
    whole, short = (model(codes[:, :-1], x, codes, **more)[0] for x in (features, features[:, -4:]))
    torch.testing.assert_close(short, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_training_on_text_makes_no_mask(name, monkeypatch):
    """Attention stays plain and causal: no (B, T, T) tensor exists for the padding."""
    seen = []

    def attention(q, k, v, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask, is_causal))
        return scaled(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    scaled = F.scaled_dot_product_attention
    monkeypatch.setattr(blocks.F, "scaled_dot_product_attention", attention)
    model, codes, (features, real) = model_of(name).train(), torch.randint(V, (4, 12)), padded()
    model(codes[:, :-1], features, codes, lengths=real.sum(1), summed_loss=True)[0].backward()
    assert seen and all(mask is None and causal for mask, causal in seen)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if name != "GPT"])
@pytest.mark.parametrize("hidden", ["left", "right", "none"])
@pytest.mark.parametrize("steps", [12, 4, 1])
@torch.no_grad()
def test_arpg_draws_a_caption_as_whole_forwards_do(name, hidden, steps, engine):
    """Greedy codes are the best logits of forwards over the visible tokens alone."""
    model, (features, real) = model_of(name), padded()
    real = {"left": real, "right": real.flip(1), "none": torch.ones_like(real)}[hidden]
    schedule, orders = DrawSchedule(steps), torch.stack([torch.randperm(12) for _ in range(4)])
    codes = generate(model, features, 12, emb_masks=real, sample_logits=False, schedule=schedule, orders=orders)
    assert type(engine_of(model)) is engine
    clear = 0
    for image in range(4):
        own, drawn = features[image, real[image]][None], codes[image, orders[image]][None]
        masks = block_masks(schedule.sizes(12), prefix=own.shape[1])
        logits, _ = model(drawn[:, :-1], own, orders=orders[image], masks=masks)
        best = logits[0].topk(2, -1)
        sure = best.values[:, 0] - best.values[:, 1] > 1e-3
        clear += int(sure.sum())
        assert torch.equal(best.indices[sure, 0], drawn[0, sure])
    assert clear > 40


@pytest.mark.parametrize("name", MODELS)
def test_a_caption_s_image_is_the_same_in_any_batch(name, engine):
    """With guidance, in batches of captions of any length."""
    model, (features, real) = model_of(name), padded()
    whole = generate(model, features, 12, emb_masks=real, cfg_scale=3.0, generators=streams(4))
    assert len(whole.unique()) > 5
    for image in range(4):
        one = slice(image, image + 1)
        alone = generate(model, features[one], 12, emb_masks=real[one], cfg_scale=3.0, generators=streams(4)[one])
        assert torch.equal(alone[0], whole[image])
    other = generate(model, features.flip(0), 12, emb_masks=real.flip(0), cfg_scale=3.0, generators=streams(4))
    assert not torch.equal(other, whole)


def test_a_caption_that_is_hidden_whole_is_refused_by_arpg():
    model, (features, real) = model_of("ARPG"), padded()
    with pytest.raises(ValueError, match="the mask hides the whole prefix"):
        generate(model, features, 12, emb_masks=torch.zeros_like(real))
