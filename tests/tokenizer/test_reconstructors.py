"""VQGAN, VAE and Consistency Decoder: files as they are published load, and compute what their makers' code does."""
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dataset.augmentation import center_crop
from tests.conftest import ROOT, write_images
from tokenizer import reconstruct
from tokenizer.vae.model import VAE, ConsistencyDecoder
from tokenizer.vqgan import model as vqgan
from utils import cli, files
from utils.checkpoints import containers
from utils.images import load_png, to_float, to_uint8
from utils.seeding import sample_generator

CPU = torch.device("cpu")

NAME = "vqgan_imagenet_f16_16384"
TINY_VQGAN = replace(vqgan.VQGANS[NAME], ch=8, num_res_blocks=1, z_channels=16, codebook_size=64, codebook_embed_dim=12)
WINDOW = 26  # codes in the queue; an image of 32x32 has 4
BROKEN = 4  # number of the image that cannot be read
READABLE = [i for i in range(9) if i != BROKEN]
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make the VQGAN and the queue of codes fit a test."""
    patch.setitem(vqgan.VQGANS, NAME, TINY_VQGAN)
    patch.setattr(reconstruct, "USAGE_WINDOW", WINDOW)


def taming_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of taming-transformers' VQModel with attention at the lowest resolution."""
    shapes = {"quantize.embedding.weight": (config.codebook_size, config.codebook_embed_dim)}
    widths = [config.ch * mult for mult in config.encoder_ch_mult]

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def conv(name, into, out, side):
        shapes.update({f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)})

    def block(name, into, out):
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", into, out, 3)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", into, out, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for layer in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{layer}", width, width, 1)

    lowest = len(widths) - 1
    conv("encoder.conv_in", 3, config.ch, 3), conv("decoder.conv_in", config.z_channels, widths[-1], 3)
    norm("encoder.norm_out", widths[-1]), norm("decoder.norm_out", widths[0])
    conv("encoder.conv_out", widths[-1], config.z_channels, 3), conv("decoder.conv_out", widths[0], 3, 3)
    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", widths[-1], widths[-1]), block(f"{side}.mid.block_2", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
    for level, width in enumerate(widths):
        for name, count, before in (("encoder.down", config.num_res_blocks, widths[max(level - 1, 0)]),
                                    ("decoder.up", config.num_res_blocks + 1, widths[min(level + 1, lowest)])):
            for i in range(count):
                block(f"{name}.{level}.block.{i}", before if i == 0 else width, width)
                if level == lowest:
                    attention(f"{name}.{level}.attn.{i}", width)
        if level < lowest:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    conv("quant_conv", config.z_channels, config.codebook_embed_dim, 1)
    conv("post_quant_conv", config.codebook_embed_dim, config.z_channels, 1)
    return shapes


def taming_forward(weights: dict, x: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor]:
    """taming-transformers' VQModel, written out from its layer names → (reconstructions, codes (B, L))."""
    def norm(name, x):  # taming's 32 groups where the network has its real width
        return F.group_norm(x, min(32, x.shape[1] // 4), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def conv(name, x, **options):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def block(name, x):
        h = norm(f"{name}.norm1", x)
        h = norm(f"{name}.norm2", conv(f"{name}.conv1", h * h.sigmoid(), padding=1))
        h = conv(f"{name}.conv2", h * h.sigmoid(), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{layer}", h).flatten(2) for layer in "qkv")  # (B, C, h*w)
        share = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, -1)  # (B, queries, keys)
        return x + conv(f"{name}.proj_out", (v @ share.transpose(1, 2)).reshape(x.shape))

    def stage(name, x):
        i = 0
        while f"{name}.block.{i}.conv1.weight" in weights:
            x = block(f"{name}.block.{i}", x)
            if f"{name}.attn.{i}.q.weight" in weights:
                x = attention(f"{name}.attn.{i}", x)
            i += 1
        return x

    def middle(name, x):
        return block(f"{name}.block_2", attention(f"{name}.attn_1", block(f"{name}.block_1", x)))

    levels = len(config.encoder_ch_mult)
    x = conv("encoder.conv_in", x, padding=1)
    for level in range(levels):
        x = stage(f"encoder.down.{level}", x)
        if level < levels - 1:
            x = conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = norm("encoder.norm_out", middle("encoder.mid", x))
    z = conv("quant_conv", conv("encoder.conv_out", x * x.sigmoid(), padding=1))
    codebook = weights["quantize.embedding.weight"]
    codes = torch.cdist(z.flatten(2).transpose(1, 2), codebook[None]).argmin(-1)  # (B, h*w)
    z = codebook[codes].transpose(1, 2).reshape(z.shape)
    x = middle("decoder.mid", conv("decoder.conv_in", conv("post_quant_conv", z), padding=1))
    for level in reversed(range(levels)):
        x = stage(f"decoder.up.{level}", x)
        if level > 0:
            x = conv(f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    x = norm("decoder.norm_out", x)
    return conv("decoder.conv_out", x * x.sigmoid(), padding=1), codes


def save_lightning(path: Path, state: dict, *, callback: str = f"{LIGHTNING}.ModelCheckpoint") -> Path:
    """A checkpoint as pytorch-lightning 1.0 wrote them: the class of a callback is a key."""
    module, name = callback.rsplit(".", 1)
    with pytest.MonkeyPatch.context() as patch:
        for i in range(1, module.count(".") + 2):
            patch.setitem(sys.modules, part := ".".join(module.split(".")[:i]), types.ModuleType(part))
        known = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, known)
        torch.save({"epoch": 3, "global_step": 9, "pytorch-lightning_version": "1.0.8", "state_dict": state,
                    "callbacks": {known: {"best_model_score": torch.tensor(0.5), "best_model_path": "logs/best.ckpt"}},
                    "optimizer_states": [], "lr_schedulers": []}, path)
    return path


@pytest.fixture(scope="module")
def taming_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * (1 if "embedding" in name else 0.2)
            for name, shape in taming_shapes(TINY_VQGAN).items()}


@pytest.fixture(scope="module")
def taming_ckpt(taming_weights, tmp_path_factory) -> Path:
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2),
            "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1)}
    return save_lightning(tmp_path_factory.mktemp("taming") / "last.ckpt", {**taming_weights, **loss})


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory) -> Path:
    """A tiny KL autoencoder with the attention names of stabilityai/sd-vae-ft-mse, which diffusers renames."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)
    model.save_pretrained(folder)
    state = containers.read(folder / "diffusion_pytorch_model.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in state
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def consistency_folder(tmp_path_factory) -> Path:
    """A tiny Consistency Decoder."""
    from diffusers import ConsistencyDecoderVAE

    folder = tmp_path_factory.mktemp("consistency")
    torch.manual_seed(0)
    ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8), encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_norm_num_groups=4, encoder_layers_per_block=1, decoder_block_out_channels=(8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2, decoder_norm_num_groups=4,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_layers_per_block=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_path(tmp_path_factory) -> Path:
    """Nine images, one of which is none."""
    folder = write_images(tmp_path_factory.mktemp("images"), count=3)
    sorted((folder / "green").iterdir())[BROKEN - 3].write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def commands(data_path, taming_ckpt, vae_folder, consistency_folder) -> dict[str, list]:
    """The flags of each reconstructor."""
    common = ["--data-path", data_path, "--image-size", 32, "--num-workers", 0, "--reconstructor"]
    return {"vqgan": [*common, "vqgan", "--local-weights", taming_ckpt],
            "vae": [*common, "vae", "--local-weights", vae_folder],
            "consistency": [*common, "consistency", "--local-weights", consistency_folder]}


def run(sample_dir: Path, *argv) -> Path:
    """Run the command in this process; return the folder it made."""
    cli.run(reconstruct.main, reconstruct.ReconstructFlags, [*map(str, argv), "--sample-dir", str(sample_dir)])
    folder, = (path for path in sample_dir.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def sets(commands, tmp_path_factory) -> dict[str, Path]:
    """What each reconstructor makes of the images."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return {kind: run(tmp_path_factory.mktemp(kind), *argv) for kind, argv in commands.items()}


@pytest.fixture(scope="module")
def pixels(data_path) -> torch.Tensor:
    """The readable images (8, 3, 32, 32) in [-1, 1], in data-set order."""
    files = [file for name in ("blue", "green", "red") for file in sorted((data_path / name).iterdir())]
    return to_float(np.stack([center_crop(Image.open(files[i]).convert("RGB"), (32, 32)) for i in READABLE]))


def assert_made(folder: Path, expected: torch.Tensor) -> None:
    """The pictures of a set are `expected` (B, 3, H, W), up to rounding edges, and its npz holds them in order."""
    with np.load(folder.with_name(f"{folder.name}.npz")) as packed:
        pictures = packed["arr_0"]
    assert np.array_equal(pictures, np.stack([load_png(folder / f"{i:06d}.png") for i in READABLE]))
    difference = np.abs(pictures.astype(int) - to_uint8(expected).astype(int))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert pictures.std() > 5  # not a flat picture that everything agrees on


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


# ---- taming-transformers


@torch.no_grad()
def test_vqgan_is_that_of_taming(sets, pixels, taming_weights, taming_ckpt):
    expected, codes = taming_forward(taming_weights, pixels, TINY_VQGAN)
    assert_made(sets["vqgan"], expected)
    results = results_of(sets["vqgan"])
    assert results["images"] == 8 and [Path(name).name for name in results["unreadable"]] == ["01.png"]
    share = np.bincount(codes.flatten(), minlength=64) / codes.numel()
    assert results["codebook_usage"] == pytest.approx((share > 0).mean())
    assert results["codebook_perplexity"] == pytest.approx(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()))
    assert results["tokenizer"] == NAME and results["checkpoint_sha256"] == files.file_hash(taming_ckpt)


@torch.no_grad()
def test_usage_of_the_queue_is_that_of_a_shuffled_pass(sets, pixels, taming_weights):
    """Images in a seeded order until the queue is full; the unreadable one is passed over, the last counts in part."""
    _, codes = taming_forward(taming_weights, pixels, TINY_VQGAN)
    places = np.random.default_rng(0).permutation(9)
    order = sorted(range(8), key=lambda i: places[READABLE[i]])
    window = codes[order].flatten()[:WINDOW]
    assert len(window) == WINDOW < codes.numel()
    assert results_of(sets["vqgan"])["usage_queue65536"] == len(window.unique()) / 64
    usage = reconstruct.CodebookUsage(64, count=9, seed=0)
    usage.add(READABLE, codes)  # far from 65,536 codes
    assert usage.results(device=CPU)["usage_queue65536"] is None


@pytest.mark.parametrize("name", vqgan.VQGANS)
def test_a_file_of_the_published_shapes_loads(name, tmp_path):
    """Every name and shape of taming's network, none beyond; its values take no room in the file."""
    config = vqgan.VQGANS[name]
    assert (config.ch, config.encoder_ch_mult, config.z_channels) == (128, (1, 1, 2, 2, 4), 256)
    shapes = taming_shapes(config)
    state = {key: torch.full((1,), float(i)).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    path = save_lightning(tmp_path / "last.ckpt", {**state, "loss.logvar": torch.zeros(())})
    model = vqgan.load_vqgan(name, str(path), device=CPU)
    assert model.downsample == 16 and model.codebook_size == int(name.rsplit("_", 1)[1])
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms and all(norm.num_groups == 32 and norm.eps == 1e-6 for norm in norms)
    values = sorted(float(parameter.flatten()[0]) for parameter in model.parameters())
    assert values == list(map(float, range(len(shapes))))  # each weight went to one place


def test_another_vqgan_does_not_load(taming_weights, tmp_path, monkeypatch):
    shrink(monkeypatch)
    for change, message in [({"encoder.down.4.attn.9.q.bias": torch.zeros(8)}, "unexpected encoder.conv_blocks.4."),
                            ({"quantize.embedding.weight": torch.zeros(32, 12)}, "is (32, 12), expected (64, 12)")]:
        path = save_lightning(tmp_path / "last.ckpt", {**taming_weights, **change})
        with pytest.raises(ValueError, match=r"last\.ckpt does not fit VQModel") as refusal:
            vqgan.load_vqgan(NAME, str(path), device=CPU)
        assert message in str(refusal.value)


def test_another_class_in_a_checkpoint_is_still_refused(taming_weights, tmp_path):
    path = save_lightning(tmp_path / "last.ckpt", taming_weights, callback=f"{LIGHTNING}.Other")
    with pytest.raises(ValueError, match=r"is refused: .*run code"):
        containers.read(path)


# ---- diffusers


@torch.no_grad()
def test_vae_draws_each_latent_with_the_noise_of_its_image(sets, pixels, vae_folder):
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae_folder).eval()
    expected = []
    for i, image in zip(READABLE, pixels.split(1), strict=True):
        latent = model.encode(image).latent_dist.sample(sample_generator(0, i)) * 0.18215  # scaled as SD does, and back
        expected.append(model.decode(latent / 0.18215).sample)
    assert_made(sets["vae"], torch.cat(expected))
    results = results_of(sets["vae"])
    assert results["checkpoint_sha256"] == files.file_hash(vae_folder / "diffusion_pytorch_model.safetensors")
    assert results["tokenizer"] == "sd-vae-ft-mse" and results["versions"].keys() == {"torch", "diffusers"}
    assert "codebook_usage" not in results


@torch.no_grad()
def test_consistency_decoder_draws_all_noise_from_the_image(sets, pixels, consistency_folder):
    from diffusers import ConsistencyDecoderVAE

    model = ConsistencyDecoderVAE.from_pretrained(consistency_folder).eval()
    expected = []
    for i, image in zip(READABLE, pixels.split(1), strict=True):
        generator = sample_generator(0, i)
        latent = model.encode(image).latent_dist.sample(generator)
        expected.append(model.decode(latent, generator=generator).sample)
    assert_made(sets["consistency"], torch.cat(expected))


@pytest.mark.parametrize("kind", [VAE, ConsistencyDecoder])
@torch.no_grad()
def test_a_reconstruction_does_not_depend_on_the_others_of_its_batch(kind, pixels, vae_folder, consistency_folder):
    folder = vae_folder if kind is VAE else consistency_folder
    reconstructor = kind("sd-vae-ft-mse", str(folder), seed=5, device=CPU)
    all_of_them, _ = reconstructor(pixels, READABLE)
    some, _ = reconstructor(pixels[[6, 2]], [READABLE[6], READABLE[2]])
    assert torch.equal(some, all_of_them[[6, 2]])
    other, _ = reconstructor(pixels[[6]], [READABLE[2]])  # another number, other noise
    assert not torch.equal(other, some[:1])


def test_weights_that_are_missing(commands, vae_folder, consistency_folder, data_path, tmp_path, monkeypatch, capsys):
    common = ["--data-path", data_path, "--reconstructor"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    state = containers.read(vae_folder / "diffusion_pytorch_model.safetensors")
    del state["quant_conv.bias"]
    save_file(state, cut / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for argv, message in [
            ([*common, "vqgan"], "--vqgan vqgan_imagenet_f16_16384 needs --local-weights: the file last.ckpt"),
            ([*common, "vqgan", "--local-weights", tmp_path / "none.ckpt"], "no checkpoint at"),
            ([*common, "vq", "--local-weights", vae_folder], "--local-weights has no use with --reconstructor vq: its "
                                                             "checkpoint is --vq-ckpt"),
            ([*common, "vae", "--local-weights", tmp_path], f"--local-weights {tmp_path} holds no config.json"),
            ([*common, "vae", "--local-weights", cut], "missing_keys quant_conv.bias"),
            ([*common, "vae", "--local-weights", consistency_folder], "does not hold sd-vae-ft-mse"),
            ([*common, "vae", "--vae", "sdxl-vae"], "stabilityai/sdxl-vae could not be loaded from the Hugging Face"),
            ([*common, "consistency"], "openai/consistency-decoder could not be loaded from the Hugging Face hub"),
            ([*commands["vae"], "--image-size", 33], "--image-size 33x33 is not divisible by 2")]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "out", *argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *commands["vae"])
    assert "sd-vae-ft-mse needs the package diffusers: pip install diffusers" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "kind"), [
    ("reconstruction_vae", "vae"), ("reconstruction_vqgan", "vqgan"), ("val", "identity"),
    ("reconstruction_consistency_decoder", "consistency"), ("reconstruction_vq", None)])
def test_scripts_choose_the_reconstructor(script, kind):
    launch = (ROOT / f"scripts/tokenizer/{script}.sh").read_text().splitlines()[-1]
    chosen = f"--reconstructor {kind} " if kind else ""
    assert launch.endswith(f'/../_torchrun.sh" tokenizer/reconstruct.py {chosen}"$@"')
