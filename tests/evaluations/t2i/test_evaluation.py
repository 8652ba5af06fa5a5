"""Text-to-image scores against clean-fid, open_clip and formulas written out again; refusals."""
import json
import warnings

import numpy as np
import open_clip
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluations.t2i import evaluation
from evaluations.t2i.clip_score import CLIP_MODELS, load_clip, through_floats
from evaluations.t2i.evaluation import T2IEvaluationFlags
from evaluations.t2i.sample_folder import read_samples
from tests.conftest import two_processes
from utils import cli, images
from utils.dist import Process

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
TINY_CLIP = "tiny-clip"
CONFIG = {"embed_dim": 8, "quick_gelu": True,
          "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}
CAPTIONS = ["a red cat", 'a sign, "open", at night', "ein Bär", "two dogs " * 60, "a boat", "<b>bold</b> & blue"]
STUB_DIM = 6


class StubInception(torch.nn.Module):
    """Six numbers per picture that depend on where its colours are."""

    def forward(self, pixels):
        assert pixels.shape[1:] == (3, 299, 299) and pixels.dtype == torch.float32
        assert pixels.min() >= 0 and 1 < pixels.max() <= 255
        return torch.cat([pixels[..., :150].mean((2, 3)), pixels[:, :, ::7, ::5].std((2, 3))], dim=1), None


def install_stand_ins(folder) -> None:
    """Make the tiny CLIP known to open_clip; the stub in place of Inception. Called in other processes too."""
    open_clip.add_model_config(folder / f"{TINY_CLIP}.json")
    evaluation.load_inception = lambda path, *, device: (StubInception(), {"sha256": "stub", "format": "stub"})
    evaluation.POOL_DIM = STUB_DIM


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with tiny-clip.json and tiny-clip.safetensors, installed for the length of this file."""
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{TINY_CLIP}.json").write_text(json.dumps(CONFIG))
    before = evaluation.load_inception, evaluation.POOL_DIM
    install_stand_ins(folder)
    torch.manual_seed(0)
    save_file(open_clip.create_model(TINY_CLIP).state_dict(), folder / f"{TINY_CLIP}.safetensors")
    yield folder
    evaluation.load_inception, evaluation.POOL_DIM = before


@pytest.fixture
def samples(tmp_path):
    """(sample folder with six pictures and captions, folder with nine real ones of several shapes and kinds)."""
    rng = np.random.default_rng(0)
    for i in range(len(CAPTIONS)):
        images.save_png(tmp_path / "fake" / "images" / f"{i:06d}.png", rng.integers(0, 256, (48, 40, 3), np.uint8))
    (tmp_path / "fake" / "captions.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
    (tmp_path / "real" / "more").mkdir(parents=True)
    for i in range(9):
        pixels = rng.integers(0, 200, (30 + 3 * i, 41, 3), np.uint8)
        picture = Image.fromarray(pixels).convert("L" if i == 3 else "RGB")
        picture.save(tmp_path / "real" / ("more" if i == 5 else ".") / f"{i}.jpg")
    return tmp_path / "fake", tmp_path / "real"


def clip_flags(models) -> list:
    return ["--clip-model4eval", TINY_CLIP, "--clip-weights", models / f"{TINY_CLIP}.safetensors"]


def score(*argv) -> dict:
    words = [str(word) for word in (*argv, "--num-workers", 0, "--eval-res", 64)]
    cli.run(evaluation.main, T2IEvaluationFlags, words)
    return json.loads((evaluation.Path(words[words.index("--fake-dir") + 1]) / "score.json").read_text())


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        score(*argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2 and len(lines) == 1
    return lines[0]


def crop_and_resize(file, size: int) -> Image.Image:
    picture = Image.open(file).convert("RGB")
    side = min(picture.size)
    left, top = (round((length - side) / 2) for length in picture.size)
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)


# ---- CLIP score


def expected_cosines(models, folder) -> np.ndarray:
    """The protocol once more, with nothing of ours."""
    model = open_clip.create_model(TINY_CLIP, pretrained=str(models / f"{TINY_CLIP}.safetensors")).eval()
    cosines = []
    for i, caption in enumerate(CAPTIONS):
        square = np.asarray(crop_and_resize(folder / "images" / f"{i:06d}.png", 64), np.float32)
        lossy = ((square / 255 - 0.5) / 0.5 + 1) * np.float32(127.5)
        small = Image.fromarray(lossy.astype(np.uint8)).resize((32, 32), Image.BICUBIC)
        pixels = (np.asarray(small, np.float32) / 255 - (0.48145466, 0.4578275, 0.40821073)) / \
            (0.26862954, 0.26130258, 0.27577711)
        with torch.no_grad():
            picture = model.encode_image(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
            text = model.encode_text(surgery(caption))
        a, b = picture[0].double().numpy(), text[0].double().numpy()
        cosines.append(a @ b / np.sqrt(a @ a * (b @ b)))
    return np.array(cosines)


def surgery(caption: str) -> torch.Tensor:
    """Tokens as the original makes them: those of the prefix put before those of the caption, (1, 77)."""
    prefix, tokens = (open_clip.tokenize(text) for text in ("A photo depicts ", caption))
    tokens = torch.cat([tokens[:, :1], prefix[:, 1:4], tokens[:, 1:]], dim=1)[:, :77]
    if tokens[0, 76] > 0:
        tokens[0, 76] = 49407
    return tokens


def test_clip_score_is_the_mean_cosine(models, samples):
    cosines = expected_cosines(models, samples[0])
    assert np.std(cosines) > 1e-3, "pictures and captions should matter"
    result = score("--fake-dir", samples[0], *clip_flags(models), "--batch-size", 4)
    assert result["clip_score"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert result["clip_images"] == 6 and "fid" not in result
    assert result["clip"]["precision"] == "fp32" and len(result["clip"]["sha256"]) == 64
    assert (samples[0] / "score.txt").read_text() == f"CLIP score: {result['clip_score']:.6f}\n"
    result = score("--fake-dir", samples[0], *clip_flags(models), "--how-many", 2)
    assert result["clip_score"] == pytest.approx(cosines[:2].mean(), abs=1e-6)
    assert result["clip_images"] == 2 and result["notes"] == []


def test_tokens_of_the_joined_string_are_the_originals(models):
    clip = load_clip(TINY_CLIP, str(models / f"{TINY_CLIP}.safetensors"), device=CPU)
    for caption in CAPTIONS:
        assert torch.equal(clip.tokenize(["A photo depicts " + caption]), surgery(caption))


def test_floats_and_back_lose_63_levels():
    levels = np.arange(256, dtype=np.uint8)
    back = np.asarray(through_floats(Image.fromarray(np.repeat(levels[None, :, None], 3, axis=2))))[0]
    lost = levels.astype(int) - back.astype(int).T
    assert set(np.unique(lost)) == {0, 1} and (lost.sum(axis=1) == 63).all()


def test_openai_weights_are_read_from_torchscript(models, tmp_path):
    """OpenAI's file is a program with the weights' names, and three numbers among them."""
    state = load_file(models / f"{TINY_CLIP}.safetensors")
    program = torch.nn.Module()
    for name, value in {**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(77),
                        "vocab_size": torch.tensor(49408)}.items():
        *path, leaf = name.split(".")
        owner = program
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.script(program).save(tmp_path / "openai.pt")
    clips = [load_clip(TINY_CLIP, str(path), device=CPU)
             for path in (tmp_path / "openai.pt", models / f"{TINY_CLIP}.safetensors")]
    for name, value in clips[1].model.state_dict().items():
        assert torch.equal(clips[0].model.state_dict()[name], value), name
    views = torch.rand(1, 3, 32, 32)
    assert torch.equal(clips[0].cosines(views, ["a cat"]), clips[1].cosines(views, ["a cat"]))


def test_published_names_exist_with_their_activation():
    for architecture, tag in CLIP_MODELS.values():
        fast = open_clip.get_model_config(architecture).get("quick_gelu", False)
        assert open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False) == fast


# ---- COCO FID


def clean_fid(fake: list, real: list) -> float:
    """clean-fid's own loop with the original's hook, and its formula."""
    from cleanfid.fid import get_files_features

    def hook(pixels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(pixels)
        side = min(picture.size)
        left, top = (round((length - side) / 2) for length in picture.size)
        return np.asarray(picture.crop((left, top, left + side, top + side)).resize((64, 64), Image.LANCZOS))

    stub = StubInception()
    a, b = (get_files_features(files, lambda batch: stub(batch)[0], num_workers=0, batch_size=3, device=CPU,
                               custom_image_tranform=hook, verbose=False).astype(np.float64) for files in (fake, real))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def test_fid_is_clean_fids(models, samples):
    fake, real = samples
    expected = clean_fid(sorted(fake.glob("images/*.png")), sorted(real.rglob("*.jpg")))
    assert expected > 1
    result = score("--fake-dir", fake, "--ref-dir", real, "--clip-model4eval", "none", "--how-many", 2)
    assert result["fid"] == pytest.approx(expected, rel=1e-5)
    assert "clip_score" not in result
    assert (result["fid_images"], result["reference_images"]) == (6, 9)
    assert (result["reference_data"], result["reference_type"]) == ("coco2014", "train/valid/test")
    assert result["inception"]["sha256"] == "stub" and result["versions"]["clean-fid"]
    assert "mostly bias" in result["notes"][0] or "val2014 has 40504" in result["notes"][0]
    assert (fake / "score.txt").read_text() == f"FID_64px: {result['fid']:.6f}\n"


def test_padding_does_not_count(models, samples, capsys):
    fake, real = samples
    argv = ["--fake-dir", fake, "--ref-dir", real, *clip_flags(models)]
    clean = score(*argv)
    for i in (6, 7):
        images.save_png(fake / "images" / f"{i:06d}.png", np.zeros((48, 48, 3), np.uint8))
    capsys.readouterr()
    padded = score(*argv)
    assert (padded["fid"], padded["clip_score"], padded["fid_images"]) == (clean["fid"], clean["clip_score"], 6)
    assert padded["notes"][0].startswith("2 images without a line in captions.txt are padding")
    assert "warning: 2 images without a line" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_find_the_same(models, samples, tmp_path):
    fake, real = samples
    argv = ["--fake-dir", fake, "--ref-dir", real, *clip_flags(models), "--num-workers", 0, "--eval-res", 64]
    alone = score(*argv)
    (fake / "score.json").unlink()
    two_processes([("t2i", [*argv, "--batch-size", 2])], tmp_path, setup=f"""
from pathlib import Path
from tests.conftest import ENTRIES
from tests.evaluations.t2i.test_evaluation import install_stand_ins
ENTRIES["t2i"] = ("evaluations.t2i.evaluation", "T2IEvaluationFlags")
install_stand_ins(Path({str(models)!r}))""")
    together = json.loads((fake / "score.json").read_text())
    for name in ("fid", "clip_score"):
        assert together.pop(name) == pytest.approx(alone.pop(name), rel=1e-5)
    assert together == alone


# ---- pairing


def test_other_names_go_by_natural_order(samples):
    fake, _ = samples
    for i, file in enumerate(sorted((fake / "images").iterdir())):
        file.rename(file.with_name(f"sample {i + 7}.png"))  # 7 … 12
    files, captions, padding = read_samples(fake)
    assert [file.name for file in files] == [f"sample {i}.png" for i in range(7, 13)]
    assert captions[3] == CAPTIONS[3].strip() and padding == 0


def test_what_could_be_paired_wrongly_is_refused(samples, capsys, models):
    fake, _ = samples
    argv = ["--fake-dir", fake, *clip_flags(models)]
    captions, first = fake / "captions.txt", fake / "images" / "000000.png"
    text = captions.read_text(encoding="utf-8")

    captions.write_text(text + "one more\n", encoding="utf-8")
    assert "lacks 1 of the 7 images that captions.txt lists, the first is 000006.png" in refused(capsys, *argv)
    captions.write_text(text.replace("a boat", " "), encoding="utf-8")
    assert "captions.txt, line 5: the caption is empty" in refused(capsys, *argv)
    captions.write_text(text + "\n", encoding="utf-8")
    assert "captions.txt, line 7: the caption is empty" in refused(capsys, *argv)
    captions.write_text(text, encoding="utf-8")
    first.rename(fake / "images" / "000006.png")  # as many as lines, but each beside the caption of the next
    assert "the first is 000000.png" in refused(capsys, *argv)
    (fake / "images" / "000006.png").rename(fake / "images" / "cat.png")
    images.save_png(fake / "images" / "dog.png", np.zeros((8, 8, 3), np.uint8))
    assert "7 images for 6 lines of captions.txt" in refused(capsys, *argv)
    assert not (fake / "score.json").exists()


def test_refusals(samples, capsys, models, tmp_path, monkeypatch):
    fake, real = samples
    assert "no captions at" in refused(capsys, "--fake-dir", tmp_path / "absent")
    assert "at least 1" in refused(capsys, "--fake-dir", fake, "--how-many", 0)
    assert "nothing to score" in refused(capsys, "--fake-dir", fake, "--clip-model4eval", "none")
    assert "absent is not a folder" in refused(capsys, "--fake-dir", fake, "--ref-dir", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no images below" in refused(capsys, "--fake-dir", fake, "--ref-dir", tmp_path / "empty")
    assert "ViT-Z is unknown: choose from ViT-B/32" in refused(capsys, "--fake-dir", fake, "--clip-model4eval", "ViT-Z")
    assert "give a file" in refused(capsys, "--fake-dir", fake, "--clip-model4eval", TINY_CLIP)
    assert "--clip-weights: no file" in refused(capsys, "--fake-dir", fake, "--clip-weights", tmp_path / "absent")
    tiny = models / f"{TINY_CLIP}.safetensors"
    assert "does not fit CLIP" in refused(capsys, "--fake-dir", fake, "--clip-weights", tiny,
                                          "--clip-model4eval", "ViT-S-32-alt")

    def offline(*_):
        raise FileNotFoundError("no route to the hub\nmore")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    line = refused(capsys, "--fake-dir", fake)
    assert "could not be downloaded: give a file by --clip-weights (no route to the hub)" in line
    (fake / "images" / "000002.png").write_bytes(b"no picture")
    assert "000002.png cannot be read as an image" in refused(capsys, "--fake-dir", fake, *clip_flags(models))
    (real / "9.jpg").write_bytes((real / "8.jpg").read_bytes()[:400])
    assert "cannot be read as an image" in refused(capsys, "--fake-dir", fake, "--ref-dir", real,
                                                   "--clip-model4eval", "none")
    assert not (fake / "score.json").exists()


def test_old_command_lines_parse():
    parser = cli.build_parser(T2IEvaluationFlags)
    flags = parser.parse_args(["--fake_dir", "a", "--ref_dir", "b_c", "--ref_data", "coco2014", "--how_many", "5",
                               "--clip_model4eval", "ViT-B/32", "--eval_res", "256", "--batch_size", "8"])
    assert (flags.ref_dir, flags.ref_type, flags.how_many) == ("b_c", "train/valid/test", 5)
    flags = parser.parse_args(["--fake-dir", "a"])
    assert (flags.ref_data, flags.how_many, flags.clip_model4eval) == ("coco2014", 30000, "ViT-B/32")
    assert (flags.eval_res, flags.batch_size) == (256, 8)
