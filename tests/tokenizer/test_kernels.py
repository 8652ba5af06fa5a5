"""The tokenizer's own CPU kernels: against PyTorch's layers, bit for bit in any batch and number of threads."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_tokenizer import PlainTokenizer, deviation
from native import build
from tokenizer.build import ENCODED, decode_images, encode_images, images_at_once, runs_on_kernels
from tokenizer.tokenizer_image import convolution
from tokenizer.tokenizer_image.convolution import convolve, ready
from tokenizer.tokenizer_image.layers import AttnBlock
from tokenizer.tokenizer_image.vq_model import VQ_models, VQConfig, VQModel
from utils import images

needs_kernels = pytest.mark.skipif(convolution.kernels() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def model() -> VQModel:
    """A tokenizer whose channels (12, 24, 40, 300 codes) fill none of the kernels' blocks."""
    torch.manual_seed(0)
    return VQModel(VQConfig(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2), ch=12, z_channels=40, codebook_size=300,
                            num_res_blocks=1)).eval().requires_grad_(False)


@pytest.fixture
def no_kernels(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setattr(build, "load", lambda name: None)


@pytest.fixture
def one_thread():
    """With more, layers of few channels are not taken panel by panel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv(channels: int, out: int, kernel: int, **options) -> nn.Conv2d:
    torch.manual_seed(channels + out)
    return nn.Conv2d(channels, out, kernel, **options).eval().requires_grad_(False)


@needs_kernels
@pytest.mark.parametrize(("channels", "out", "size"), [
    (8, 16, (4, 4)), (3, 5, (1, 1)), (13, 20, (7, 30)), (40, 3, (18, 5)), (24, 33, (26, 49)), (64, 48, (17, 25))])
def test_a_convolution_is_its_definition(channels, out, size):
    layer, x = conv(channels, out, 3, padding=1), torch.randn(2, channels, *size)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    torch.testing.assert_close(convolve(layer, x).double(), exact, atol=1e-5, rtol=0)
    norm = nn.GroupNorm(1, channels, eps=1e-6).eval().requires_grad_(False)
    norm.weight.uniform_(-1, 2)
    norm.bias.uniform_(-1, 1)
    normed = F.silu(F.group_norm(x.double(), 1, norm.weight.double(), norm.bias.double(), 1e-6))
    exact = F.conv2d(normed, layer.weight.double(), layer.bias.double(), padding=1)
    residual = torch.randn(2, out, *size)
    found = convolve(layer, x, norm=norm, residual=residual.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found.double(), exact + residual, atol=1e-5, rtol=0)
    doubled = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    exact = F.conv2d(doubled, layer.weight.double(), layer.bias.double(), padding=1)
    torch.testing.assert_close(convolve(layer, x, upsample=True).double(), exact, atol=1e-5, rtol=0)


@needs_kernels
@pytest.mark.parametrize(("channels", "out", "size"), [(32, 32, (16, 16)), (20, 100, (9, 11)), (128, 64, (12, 7))])
def test_few_tiles_and_many_give_the_same_bits(channels, out, size, one_thread):
    images = 2 + out // 24  # more tiles than are taken panel by panel
    x = torch.randn(images, channels, *size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels, 3, 3)
    together = convolution.run_kernel(x, weight, None, before=1)
    alone = [convolution.run_kernel(one[None], weight, None, before=1) for one in x]
    assert torch.equal(together, torch.cat(alone))
    layer, norm = conv(channels, out, 3, padding=1), nn.GroupNorm(1, channels).eval().requires_grad_(False)
    residual = torch.randn(images, out, *(2 * side for side in size)).contiguous(memory_format=torch.channels_last)
    together = convolve(layer, x, norm=norm, upsample=True, residual=residual)
    alone = [convolve(layer, x[i:i + 1], norm=norm, upsample=True, residual=residual[i:i + 1]) for i in range(images)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.skipif(not convolution.can_keep_16_bits(), reason="no AMX")
@pytest.mark.parametrize(("channels", "out", "size", "side", "options"), [
    (40, 35, (70, 50), 3, {"padding": 1}), (33, 16, (9, 17), 3, {"padding": 1}), (64, 70, (37, 66), 3, {"stride": 2}),
    (300, 48, (6, 5), 3, {"padding": 1}), (20, 33, (35, 40), 1, {}), (24, 8, (12, 40), 5, {"padding": 2})], ids=str)
def test_split_numbers_keep_16_bits(channels, out, size, side, options):
    layer, x = conv(channels, out, side, **options), torch.randn(2, channels, *size)
    padded = F.pad(x, (0, 1, 0, 1)) if "stride" in options else x
    exact = F.conv2d(padded.double(), layer.weight.double(), layer.bias.double(), **options)
    terms = F.conv2d(padded.double().abs(), layer.weight.double().abs(), **options)  # the sum of what is added up
    with convolution.keeping_16_bits(True):
        found = convolve(layer, x)
    assert 2.0**-24 < ((found.double() - exact).abs() / terms).max() < 2.0**-16
    assert not torch.equal(convolve(layer, x), found)


@needs_kernels
def test_other_windows_are_their_definition():
    x = torch.randn(2, 13, 10, 14)
    half, point = conv(13, 21, 3, stride=2), conv(13, 40, 1)
    exact = F.conv2d(F.pad(x.double(), (0, 1, 0, 1)), half.weight.double(), half.bias.double(), stride=2)
    torch.testing.assert_close(convolve(half, x).double(), exact, atol=1e-5, rtol=0)
    exact = F.conv2d(x.double(), point.weight.double(), point.bias.double())
    torch.testing.assert_close(convolve(point, x).double(), exact, atol=1e-5, rtol=0)
    z, book = torch.randn(70, 6), torch.randn(1100, 6)
    torch.testing.assert_close(convolution.linear(z, book, book[:, 0].clone()), F.linear(z, book, book[:, 0]))


@needs_kernels
def test_group_norm_does_not_lose_a_small_spread_on_a_large_mean():
    x = torch.randn(2, 8, 40, 33) + torch.tensor([30.0] * 4 + [0.0] * 4)[:, None, None]
    norm = nn.GroupNorm(2, 8, eps=1e-6).requires_grad_(False)
    exact = F.group_norm(x.double(), 2, eps=1e-6)
    found = convolution.run_kernel(x, torch.eye(8)[:, :, None, None], None, norm=norm)
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=0)


@needs_kernels
def test_a_norm_without_weights_and_what_does_not_fit():
    layer, x = conv(8, 16, 3, padding=1), torch.randn(1, 8, 6, 6)
    plain = nn.GroupNorm(2, 8, affine=False)
    assert not ready(layer, x, plain)
    torch.testing.assert_close(convolve(layer, x, norm=plain), layer(F.silu(plain(x))))
    with pytest.raises(ValueError, match="the residual is"):
        convolve(layer, x, residual=torch.zeros(1, 16, 5, 6))
    with pytest.raises(ValueError, match="the norm is for 4 channels"):
        convolve(layer, x, norm=nn.GroupNorm(2, 4).requires_grad_(False))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled_by_hook(layer: nn.Conv2d) -> nn.Conv2d:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def doubled_by_hand(layer: nn.Conv2d) -> nn.Conv2d:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


@needs_kernels
@pytest.mark.parametrize("layer", [
    doubled_by_hook(conv(8, 16, 3, padding=1)), doubled_by_hand(conv(8, 16, 3, padding=1)),
    Doubled(8, 16, 3, padding=1), conv(8, 16, 3, padding=1, padding_mode="reflect"), conv(8, 16, 3, padding=2),
    conv(8, 16, 3), conv(8, 16, 3, padding=1, stride=3), conv(8, 16, 3, padding=1, stride=2), conv(8, 16, 2, stride=2),
    conv(8, 16, 3, padding=1, groups=4), conv(8, 16, 3, padding=2, dilation=2), conv(8, 16, (3, 1), padding=(1, 0)),
    conv(8, 16, 3, padding="same"), torch.nn.utils.parametrizations.weight_norm(conv(8, 16, 3, padding=1))],
    ids=str)
def test_layers_that_compute_something_else_go_to_pytorch(layer):
    layer, x = layer.eval().requires_grad_(False), torch.randn(1, 8, 12, 12)
    norm = nn.GroupNorm(2, 8).requires_grad_(False)
    torch.testing.assert_close(convolve(layer, x, norm=norm), layer(F.silu(norm(x))))
    assert not ready(layer, x)


@needs_kernels
def test_norms_and_dropout_that_compute_something_else_go_to_pytorch():
    layer, x = conv(8, 16, 3, padding=1), torch.randn(1, 8, 6, 6)
    norm = nn.GroupNorm(2, 8).requires_grad_(False)
    hooked = doubled_by_hook(nn.GroupNorm(2, 8).requires_grad_(False))
    torch.testing.assert_close(convolve(layer, x, norm=hooked), layer(F.silu(2 * norm(x))))
    zeros = convolve(layer, x, norm=norm, dropout=nn.Dropout(1.0).train())
    torch.testing.assert_close(zeros, layer(torch.zeros_like(x)))


@needs_kernels
def test_a_hook_anywhere_in_the_tokenizer_is_heeded(model):
    changed, pixels = copy.deepcopy(model), torch.rand(1, 3, 8, 8)
    attention = next(part for part in changed.encoder.modules() if isinstance(part, AttnBlock))
    expected = changed.encoder(pixels)
    attention.v.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert not torch.equal(changed.encoder(pixels), expected)
    assert runs_on_kernels(model) and not runs_on_kernels(changed)


def outcome(model: VQModel, pixels: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    codes = encode_images(model, pixels)
    return codes, decode_images(model, codes, (pixels.shape[2] // 2, pixels.shape[3] // 2), dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_the_batch_nor_on_threads(model, dtype):
    pixels = torch.rand(9, 3, 22, 14) * 2 - 1
    codes, pictures = outcome(model, pixels, dtype)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for size in (1, 4, 9) if threads > 1 else range(1, 10):
                parts = [outcome(model, part, dtype) for part in pixels.split(size)]
                assert torch.equal(torch.cat([part[0] for part in parts]), codes), (threads, size)
                assert torch.equal(torch.cat([part[1] for part in parts]), pictures), (threads, size)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("unit", list(build.UNITS)[:build.units()])
def test_fp32_pictures_have_the_same_bits_on_all_units(model, unit, monkeypatch):
    pixels = torch.rand(2, 3, 22, 14) * 2 - 1
    expected = outcome(model, pixels)
    monkeypatch.setenv("LLAMAGEN_NATIVE", unit)
    assert all(torch.equal(*both) for both in zip(outcome(model, pixels), expected, strict=True))


@needs_kernels
def test_one_image_costs_one_image(model, monkeypatch):
    seen = []
    decode = model.decode_code
    monkeypatch.setattr(model, "decode_code", lambda codes, shape: (seen.append(len(codes)), decode(codes, shape))[1])
    decode_images(model, torch.zeros(1, 12, dtype=torch.long), (3, 4))
    assert seen == [1]
    monkeypatch.setattr("tokenizer.build.PIXELS", 3 * 48)
    decode_images(model, torch.zeros(7, 12, dtype=torch.long), (3, 4))
    assert seen == [1, 3, 3, 1]


@needs_kernels
def test_without_kernels_the_pictures_are_the_same(model, monkeypatch):
    pixels = torch.rand(3, 3, 18, 26) * 2 - 1
    codes, pictures = outcome(model, pixels)
    monkeypatch.setattr(build, "load", lambda name: None)
    assert not ready(model.decoder.conv_in)
    plain_codes, plain = outcome(model, pixels)
    assert torch.equal(plain_codes, codes)
    torch.testing.assert_close(plain, pictures, atol=2e-5, rtol=0)
    levels = images.to_uint8(plain).astype(int) - images.to_uint8(pictures).astype(int)
    assert abs(levels).max() <= 1


def test_without_kernels_the_batch_is_padded(model, no_kernels, monkeypatch):
    seen = []
    decode = model.decode_code
    monkeypatch.setattr(model, "decode_code", lambda codes, shape: (seen.append(len(codes)), decode(codes, shape))[1])
    assert decode_images(model, torch.zeros(9, 4, dtype=torch.long), (2, 2)).shape == (9, 3, 4, 4)
    assert seen == [8, 8]
    seen.clear()
    side = 46  # pixels: four of such images are as many as are taken at a time, and so is one, padded
    one, five = (decode_images(model, torch.arange(count * 529).view(count, 529) % 24, (23, 23)) for count in (1, 5))
    assert torch.equal(one, five[:1]) and seen == [2**13 // side**2, *[2**13 // side**2] * 2] == [3, 3, 3]


def test_one_image_costs_no_more_than_needed_on_any_device():
    """Where results depend on the batch it has one size for each size of image: what one image costs."""
    at_once = partial(images_at_once, free=False)
    assert [at_once(side**2, "cuda") for side in (16, 48, 64, 128, 256, 384, 1024)] == [16, 16, 16, 4, 1, 1, 1]
    assert [at_once(side**2, "cpu") for side in (16, 48, 64, 128, 256)] == [8, 3, 2, 1, 1]
    assert [at_once(side**2, "cuda", padded=ENCODED) for side in (16, 128, 256, 512)] == [16, 16, 4, 1]
    assert [images_at_once(side**2, "cpu", free=True) for side in (16, 256, 1024)] == [1024, 4, 1]
    assert at_once(0, "cpu") == 8  # an image without pixels is refused elsewhere


def test_one_large_image_is_decoded_and_encoded_alone_without_kernels_too(model, no_kernels, monkeypatch):
    seen = []
    for name in ("decode_code", "encode_codes"):
        whole = getattr(model, name)
        monkeypatch.setattr(model, name, lambda x, *shape, whole=whole: (seen.append(len(x)), whole(x, *shape))[1])
    codes = encode_images(model, torch.rand(1, 3, 128, 128) * 2 - 1)
    decode_images(model, codes, (64, 64))
    assert seen == [1, 1]


@needs_kernels
def test_weights_changed_in_place_count_at_once(model):
    changed = copy.deepcopy(model)
    codes = torch.arange(12)[None]
    before = decode_images(changed, codes, (3, 4))
    for parameter in (changed.decoder.conv_out.weight, changed.quantize.embedding.weight):
        parameter.data.mul_(-1)  # what no version counter sees
        after = decode_images(changed, codes, (3, 4))
        assert (after - before).abs().max() > 1e-3
        before = after


def test_the_codebook_is_normalised_once(model, monkeypatch):
    quantizer = copy.deepcopy(model.quantize)
    with torch.inference_mode():
        first = quantizer.codebook()
    assert quantizer.codebook() is first and not first.is_inference()
    quantizer.embedding.weight.data[3].mul_(-2)
    assert torch.equal(quantizer.codebook()[3], -first[3])
    assert quantizer.train().codebook() is not quantizer.codebook()
    assert "_normalised" not in quantizer.state_dict()


@needs_kernels
def test_training_and_other_types_run_on_the_layers(model):
    trained = copy.deepcopy(model).requires_grad_(True)
    layer, x = trained.decoder.conv_in, torch.zeros(1, 40, 4, 4)
    assert not ready(layer, x)  # a gradient is wanted
    with torch.no_grad():
        assert ready(layer, x) and not ready(layer, x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not ready(layer, x)
        assert not ready(trained.train().decoder.conv_in, x)
        assert not runs_on_kernels(trained) and runs_on_kernels(trained.eval())
    assert not ready(layer.requires_grad_(False), x.requires_grad_())
    trained.requires_grad_(True)(torch.rand(1, 3, 8, 8))[0].sum().backward()
    assert all(p.grad is not None for p in trained.decoder.parameters())


def test_the_benchmarks_plain_side_is_the_same_tokenizer(model):
    plain, pixels = PlainTokenizer(model), torch.rand(2, 3, 12, 16) * 2 - 1
    codes, pictures = outcome(model, pixels)
    assert torch.equal(plain.encode(pixels), codes)
    found = plain.decode(codes, (6, 8))
    torch.testing.assert_close(found, pictures, atol=2e-5, rtol=0)
    assert deviation(codes, codes) == "0 of 96 codes" and plain.flops > plain.reduced > plain.flops / 4


def test_bf16_decoding_is_near(model):
    codes = torch.arange(24)[None]
    exact, low = decode_images(model, codes, (4, 6)), decode_images(model, codes, (4, 6), dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).square().mean() < 1e-3


def test_what_the_layers_refuse_the_kernels_refuse_too():
    model = VQ_models["VQ-4-S"]().eval().requires_grad_(False)
    for channels in (1, 4, 16):
        with pytest.raises((ValueError, RuntimeError), match=r"channels|takes"):
            encode_images(model, torch.zeros(1, channels, 16, 16))
    assert encode_images(model, torch.zeros(0, 3, 16, 16)).numel() == 0
    assert decode_images(model, torch.zeros(0, 16, dtype=torch.long), (4, 4)).shape == (0, 3, 16, 16)


def test_the_default_type_does_not_matter():
    model, codes = VQ_models["VQ-4-S"]().eval().requires_grad_(False), torch.arange(16)[None]
    expected = decode_images(model, codes, (4, 4))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(decode_images(model, codes, (4, 4)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compiled_decoder_does_not_depend_on_its_batch_either():
    model, codes = VQ_models["VQ-4-S"]().eval().requires_grad_(False), torch.randint(256, (9, 16))
    model.decoder.compile(backend="eager")
    whole = decode_images(model, codes, (4, 4))
    assert torch.equal(torch.cat([decode_images(model, one, (4, 4)) for one in codes.split(1)]), whole)


def test_gradients_reach_what_is_trained_in_eval_mode():
    model = VQ_models["VQ-4-S"]().eval().requires_grad_(False)
    model.encoder.norm_out.requires_grad_(True)
    assert model.encoder(torch.randn(1, 3, 16, 16)).requires_grad
