"""The image tokenizer: shapes, the quantizer, checkpoints, each against an independent form."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenizer.build import TokenizerFlags, check_image_size, decode_images, encode_images, load_tokenizer
from tokenizer.tokenizer_image.layers import AttnBlock
from tokenizer.tokenizer_image.quantize import USAGE_WINDOW, VectorQuantizer, entropy_loss
from tokenizer.tokenizer_image.vq_model import VQ_models, VQConfig, VQModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> VQModel:
    torch.manual_seed(0)
    return VQ_models["VQ-4-S"]().eval().requires_grad_(False)


# ---- the model


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (16, 16), (12, 4), (32, 24)])
def test_any_divisible_size_comes_back(model, size):
    h, w = size[0] // 4, size[1] // 4
    images = torch.rand(2, 3, *size) * 2 - 1
    quantised, losses, (_, _, codes) = model.encode(images)
    assert quantised.shape == (2, 8, h, w) and codes.shape == (2 * h * w,) and losses is None
    assert model(images)[0].shape == images.shape == model.decode(quantised).shape
    by_shape = model.decode_code(codes, shape=(2, 8, h, w))
    torch.testing.assert_close(by_shape, model.decode(quantised), atol=1e-5, rtol=0)
    assert torch.equal(by_shape, model.decode_code(model.encode_codes(images), (h, w)))
    assert torch.equal(by_shape, model.decode_code(codes.view(2, h, w), (2, 8, h, w)))


@pytest.mark.parametrize(("multipliers", "ratio"), [((1,), 1), ((1, 1, 2, 2, 4), 16)])
def test_the_ratio_follows_from_the_levels(multipliers, ratio):
    model = VQModel(VQConfig(encoder_ch_mult=multipliers, decoder_ch_mult=multipliers, ch=8, z_channels=8,
                             codebook_size=16, num_res_blocks=1)).eval()
    assert model.downsample == ratio
    assert model(torch.zeros(1, 3, ratio, 2 * ratio))[0].shape == (1, 3, ratio, 2 * ratio)


@pytest.mark.parametrize("size", [(17, 16), (16, 2), (30, 31)])
def test_other_sizes_are_refused(model, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not divisible by 4"):
        model.encode(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="--image-size"):
        check_image_size(size, 4)


@pytest.mark.parametrize(("codes", "shape"), [
    (torch.tensor([[0, 256]]), (1, 2)), (torch.tensor([[-1, 0]]), (1, 2)), (torch.tensor([[0, 1, 2]]), (1, 2)),
    (torch.tensor([0, 1]), (2, 8, 1, 2))])
def test_codes_that_cannot_be_decoded_are_refused(model, codes, shape):
    with pytest.raises(ValueError, match="codes"):
        model.decode_code(codes, shape)


def test_levels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        VQModel(VQConfig(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2, 2)))


@pytest.mark.parametrize(("name", "millions"), [("VQ-16", 72), ("VQ-8", 70)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in VQ_models[name]().parameters()) / 1e6) == millions


def test_names_that_downstream_code_imports():
    module = importlib.import_module("tokenizer.tokenizer_image.vq_model")
    assert {"VQ-16", "VQ-8"} <= set(module.VQ_models)
    with torch.device("meta"):
        built = module.VQ_models["VQ-16"](codebook_size=1024, codebook_embed_dim=4)
    assert built.quantize.embedding.weight.shape == (1024, 4) and built.downsample == 16
    assert built.decoder.last_layer is built.decoder.conv_out.weight


def test_attention_block_is_its_definition():
    torch.manual_seed(0)
    block, x = AttnBlock(16), torch.randn(2, 16, 3, 5)
    z = block.norm(x)
    q, k, v = (layer(z).flatten(2) for layer in (block.q, block.k, block.v))  # (B, C, h*w)
    weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(16)).softmax(-1)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_codes_and_pictures_do_not_depend_on_the_batch(model):
    pixels = torch.rand(19, 3, 32, 32) * 2 - 1
    codes = encode_images(model, pixels)
    pictures = decode_images(model, codes, (8, 8))
    for size in (1, 2, 3, 5, 8, 16):
        parts = [encode_images(model, part) for part in pixels.split(size)]
        assert torch.equal(torch.cat(parts), codes), size
        assert torch.equal(torch.cat([decode_images(model, part, (8, 8)) for part in parts]), pictures), size


# ---- the quantizer


@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_code_is_chosen(l2_norm):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(300, 6, l2_norm=l2_norm).eval()
    nn.init.normal_(quantizer.embedding.weight)
    features = torch.randn(2, 6, 9, 7)
    z = features.permute(0, 2, 3, 1).reshape(-1, 6).double()
    book = quantizer.embedding.weight.detach().double()
    if l2_norm:
        z, book = z / z.norm(dim=-1, keepdim=True), book / book.norm(dim=-1, keepdim=True)
    distances = torch.cdist(z, book)
    best = distances.sort(-1).values
    clear = best[:, 1] - best[:, 0] > 1e-5
    quantised, _, codes = quantizer(features)
    assert clear.float().mean() > 0.99
    assert torch.equal(codes[clear], distances.argmin(-1)[clear])
    torch.testing.assert_close(quantised.permute(0, 2, 3, 1).reshape(-1, 6), book[codes].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(quantizer.lookup(codes), book[codes].float())
    if l2_norm:
        torch.testing.assert_close(quantizer.codebook().norm(dim=-1), torch.ones(300))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_gradient_passes_straight_through(l2_norm):
    quantizer = VectorQuantizer(32, 4, l2_norm=l2_norm)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    wanted = F.normalize(features, dim=1) if l2_norm else features
    expected, = torch.autograd.grad(wanted, features, upstream)
    found, = torch.autograd.grad(quantizer(features)[0], features, upstream)
    torch.testing.assert_close(found, expected)


def test_codebook_losses_are_their_formulas():
    quantizer = VectorQuantizer(32, 4, beta=0.7)
    features = torch.randn(2, 4, 3, 3, requires_grad=True)
    _, losses, codes = quantizer(features)
    z = F.normalize(features.permute(0, 2, 3, 1).reshape(-1, 4), dim=-1)
    e = F.normalize(quantizer.embedding.weight, dim=-1)[codes]
    mean = (z - e).square().mean()
    torch.testing.assert_close(losses.codebook, mean)
    torch.testing.assert_close(losses.commit, 0.7 * mean)
    assert losses.entropy == 0 and not losses.entropy.requires_grad
    losses.codebook.backward(retain_graph=True)
    assert features.grad is None and quantizer.embedding.weight.grad.any()
    quantizer.embedding.weight.grad = None
    losses.commit.backward()
    assert features.grad.any() and quantizer.embedding.weight.grad is None


def test_entropy_term_costs_nothing_unless_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr("tokenizer.tokenizer_image.quantize.entropy_loss",
                        lambda *args: calls.append(args) or torch.ones(()))
    VectorQuantizer(32, 4)(torch.randn(1, 4, 2, 2))
    assert not calls
    assert VectorQuantizer(32, 4, entropy_loss_ratio=0.5)(torch.randn(1, 4, 2, 2))[1].entropy == 0.5
    assert len(calls) == 1


def test_entropy_term_is_its_formula_and_evens_usage():
    torch.manual_seed(0)
    book = F.normalize(torch.randn(16, 4), dim=-1)
    z = F.normalize(book[0] + 0.1 * torch.randn(64, 4), dim=-1)  # all near one code
    p = (-torch.cdist(z.double(), book.double()).square() / 0.5).softmax(-1)
    own = -(p * p.log()).sum(-1).mean()
    together = -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    torch.testing.assert_close(entropy_loss(z, book, temperature=0.5).double(), own - together, atol=1e-5, rtol=0)
    assert entropy_loss(z, book) == entropy_loss(z, book, temperature=0.01) != entropy_loss(z, book, temperature=0.02)

    book.requires_grad_(True)
    optimizer = torch.optim.Adam([book], lr=0.02)

    def codes_in_use() -> int:
        return len((z @ F.normalize(book, dim=-1).t()).argmax(-1).unique())

    before = codes_in_use()
    for _ in range(60):
        optimizer.zero_grad()
        entropy_loss(z, F.normalize(book, dim=-1), temperature=0.1).backward()
        optimizer.step()
    assert codes_in_use() > 2 * before


def test_usage_counts_the_last_assignments_only():
    quantizer = VectorQuantizer(64, 4)
    assert quantizer.usage()[0] == 0
    quantizer._remember(torch.tensor([3, 3, 5, 5]))
    assert quantizer.usage() == (2 / 64, pytest.approx(2.0))
    quantizer._remember(torch.arange(64).repeat(USAGE_WINDOW // 64))  # exactly one window
    assert quantizer.usage() == (1.0, pytest.approx(64.0, rel=1e-4))
    quantizer._remember(torch.full((USAGE_WINDOW + 5,), 9))
    assert quantizer.usage() == (1 / 64, pytest.approx(1.0))
    quantizer._remember(torch.full((USAGE_WINDOW // 2,), 1))
    assert quantizer.usage() == (2 / 64, pytest.approx(2.0))
    assert quantizer.state_dict()["codebook_used"].shape == (65536,)


def test_evaluation_does_not_count():
    quantizer = VectorQuantizer(64, 4).eval()
    quantizer(torch.randn(1, 4, 4, 4))
    assert quantizer.usage()[0] == 0
    quantizer.train()(torch.randn(1, 4, 4, 4))
    assert quantizer.usage()[0] > 0


def test_autocast_does_not_change_the_codes():
    quantizer = VectorQuantizer(4096, 8).eval()
    features = torch.randn(1, 8, 24, 24)
    plain = quantizer(features)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(features)[2], plain)
        quantised, _, codes = quantizer(features.bfloat16())
    assert quantised.dtype == torch.bfloat16
    assert torch.equal(codes, quantizer(features.bfloat16().float())[2])


def test_more_rows_than_a_chunk(monkeypatch):
    quantizer, features = VectorQuantizer(64, 4).eval(), torch.randn(1, 4, 7, 9)
    whole = quantizer(features)[2]
    monkeypatch.setattr("tokenizer.tokenizer_image.quantize.ROWS_PER_CHUNK", 10)
    assert torch.equal(quantizer(features)[2], whole)


# ---- checkpoints


def tiny_flags(path, **options) -> TokenizerFlags:
    return TokenizerFlags(vq_ckpt=str(path), **options)


def test_foreign_checkpoints_load_with_flags_and_wrong_ones_are_refused(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "vq.pt")
    name, loaded = load_tokenizer(tiny_flags(tmp_path / "vq.pt", vq_model="VQ-4-S"), device=CPU)
    assert name == "VQ-4-S" and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    for options in ({"vq_model": "VQ-8"}, {"vq_model": "VQ-4-S", "codebook_size": 512}):
        with pytest.raises(ValueError, match="does not fit"):
            load_tokenizer(tiny_flags(tmp_path / "vq.pt", **options), device=CPU)
    torch.save({"model": model.state_dict(), "config": {"vq_model": "VQ-4-S"}}, tmp_path / "own.pt")
    assert load_tokenizer(tiny_flags(tmp_path / "own.pt"), device=CPU)[0] == "VQ-4-S"
    with pytest.raises(ValueError, match="does not fit"):  # what is typed wins
        load_tokenizer(tiny_flags(tmp_path / "own.pt", vq_model="VQ-8"), device=CPU)
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(2, 2)}}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match="looks like a GPT"):
        load_tokenizer(tiny_flags(tmp_path / "gpt.pt"), device=CPU)
    with pytest.raises(ValueError, match="--vq-ckpt is missing"):
        load_tokenizer(TokenizerFlags(), device=CPU)


def test_a_codebook_without_normalisation_stays_so(tmp_path):
    model = VQ_models["VQ-4-S"](codebook_l2_norm=False)
    nn.init.normal_(model.quantize.embedding.weight)
    torch.save({"model": model.state_dict(), "config": {"vq_model": "VQ-4-S", "codebook_l2_norm": False}},
               tmp_path / "vq.pt")
    _, loaded = load_tokenizer(tiny_flags(tmp_path / "vq.pt"), device=CPU)
    assert torch.equal(loaded.quantize.lookup(torch.arange(5)), model.quantize.embedding.weight[:5])
