"""The sampling commands: the same pictures for any batch and number of processes, and refusals in one line."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.generate import generate
from autoregressive.models.registry import MODELS
from autoregressive.sample import sample_c2i, sample_ddp
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import labels_for, load_pipeline
from tests.conftest import ROOT, TINY_GPT, call
from tokenizer.build import decode_images
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils import cli
from utils.checkpoints import containers
from utils.images import load_png, to_uint8
from utils.seeding import sample_generator

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def models(gpt_ckpt, vq_ckpt) -> list[str]:
    return ["--gpt-ckpt", str(gpt_ckpt), "--vq-ckpt", str(vq_ckpt), "--precision", "none"]


@pytest.fixture(scope="module")
def pipeline(gpt_ckpt, vq_ckpt):
    return load_pipeline(SampleFlags(gpt_ckpt=str(gpt_ckpt), vq_ckpt=str(vq_ckpt), precision="none"), device=CPU)


def grid(*argv) -> None:
    cli.run(sample_c2i.main, sample_c2i.GridFlags, [str(word) for word in argv])


def sample_set(sample_dir: Path, *argv) -> Path:
    """Run the sampler in this process; return the one folder it made or filled."""
    cli.run(sample_ddp.main, sample_ddp.SampleSetFlags, ["--sample-dir", str(sample_dir), *map(str, argv)])
    folder, = (path for path in sample_dir.iterdir() if path.is_dir())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    npz = folder.with_name(f"{folder.name}.npz")
    return {path.name: path.read_bytes() for path in [*folder.iterdir(), npz]}


def refused(capsys, command, *argv) -> str:
    """The one line that a command prints when it exits 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- the grid


def test_ids_and_names_give_the_same_grid(models, tmp_path, capsys):
    grid(*models, "--classes", "red, 1,blue", "--output", tmp_path / "names.png")
    assert "3 images of 16x16" in capsys.readouterr().out
    grid(*models, "--classes", "2,green,0", "--output", tmp_path / "ids.png")
    grid(*models, "--classes", "2,1,0", "--seed", 1, "--output", tmp_path / "seed.png")
    names, ids, seed = (load_png(tmp_path / f"{name}.png") for name in ("names", "ids", "seed"))
    assert np.array_equal(names, ids) and not np.array_equal(ids, seed)
    grid(*models, "--output", tmp_path / "all.png", "--image-size", "8x16")
    assert "3 images of 8x16" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "message"), [
    ("red,purple", "class 'purple' is unknown: choose from blue, green, red"), ("0,3", "class 3 is out of range"),
    ("1,-1", "class -1 is out of range"), (" , ", "no class given")])
def test_unknown_classes_are_refused(models, capsys, tmp_path, classes, message):
    assert message in refused(capsys, grid, *models, "--classes", classes, "--output", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_settings_are_refused_before_sampling(models, capsys):
    for flags, message in [(("--temperature", -1), "--temperature"), (("--top-p", 2), "--top-p"),
                           (("--top-k", -1), "--top-k"), (("--image-size", 18), "not divisible by 4"),
                           (("--num-classes", 10), "--num-classes is 10"), (("--vocab-size", 9), "--vocab-size is 9"),
                           (("--downsample-size", 16), "--downsample-size is 16"), (("--from-fsdp",), "--from-fsdp"),
                           (("--gpt-model", "GPT-B"), "give --gpt-model GPT-S"),
                           (("--vq-model", "VQ-8"), "does not fit"),
                           (("--gpt-type", "t2i"), "--gpt-type")]:
        assert message in refused(capsys, grid, *models, *flags)
    assert "--num-fid-samples" in refused(capsys, sample_set, Path("x"), *models, "--num-fid-samples", 0)


# ---- what an image depends on


def test_an_image_depends_on_seed_and_index_only(pipeline):
    labels = [i % 3 for i in range(9)]
    whole = pipeline(labels, seed=4, indices=list(range(9)))
    assert whole.shape == (9, 16, 16, 3) and whole.dtype == np.uint8
    for size in (1, 4, 5, 8):
        for first in range(0, 9, size):
            rows = slice(first, first + size)
            part = pipeline(labels[rows], seed=4, indices=list(range(9))[rows])
            assert np.array_equal(part, whole[rows]), (size, first)
    shuffled = [5, 0, 8]
    assert np.array_equal(pipeline([labels[i] for i in shuffled], seed=4, indices=shuffled), whole[shuffled])
    assert not np.array_equal(pipeline(labels, seed=5, indices=list(range(9))), whole)


def test_images_are_resized_bicubically(pipeline):
    codes = pipeline.sample_codes([0, 1], seed=0, indices=[0, 1])
    pixels = F.interpolate(decode_images(pipeline.tokenizer, codes, (4, 4)), size=(24, 20), mode="bicubic")
    assert np.array_equal(pipeline.to_pixels(codes, size=(24, 20)), to_uint8(pixels))


def test_labels_are_fixed_by_seed_and_index():
    assert labels_for(range(7), mode="balanced", num_classes=3, seed=0) == [0, 1, 2, 0, 1, 2, 0]
    random = labels_for(range(3000), mode="random", num_classes=3, seed=1)
    assert labels_for([7, 2999], mode="random", num_classes=3, seed=1) == [random[7], random[2999]]
    assert random != labels_for(range(3000), mode="random", num_classes=3, seed=2)
    of_codes = [sample_generator(1, i) for i in range(3000)]  # another stream
    assert random != [int(torch.randint(3, (), generator=stream)) for stream in of_codes]
    counts = np.bincount(random, minlength=3)
    assert ((counts - 1000) ** 2 / 1000).sum() < 18


# ---- the set


@pytest.mark.processes
def test_sets_are_the_same_for_any_batch_and_number_of_processes(models, tmp_path):
    flags = [*models, "--num-fid-samples", "10", "--label-mode", "balanced", "--cfg-scale", "2.0"]
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    two = subprocess.Popen(["bash", ROOT / "scripts/autoregressive/sample_c2i.sh", *flags, "--per-proc-batch-size", "3",
                            "--sample-dir", tmp_path / "two"], env=environment, cwd=tmp_path, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    one = sample_set(tmp_path / "one", *flags)
    files = contents(one)
    names = [f"{i:06d}.png" for i in range(10)]
    assert set(files) == {*names, f"{one.name}.npz", "config.json"}
    packed = np.load(one.with_name(f"{one.name}.npz"))
    assert packed["arr_0"].dtype == np.uint8 and packed["arr_0"].shape == (10, 16, 16, 3)
    assert np.array_equal(packed["arr_0"], np.stack([load_png(one / name) for name in names]))
    assert packed["arr_1"].tolist() == [i % 3 for i in range(10)]

    small = sample_set(tmp_path / "small", *flags, "--per-proc-batch-size", 1)
    assert contents(small) == files
    _, errors = two.communicate(timeout=120)
    assert two.returncode == 0, errors
    assert contents(tmp_path / "two" / one.name) == files

    for name in names[2:7]:
        (one / name).unlink()
    keep = (one / names[0]).stat().st_mtime_ns
    assert contents(sample_set(tmp_path / "one", *flags)) == files  # resumed
    assert (one / names[0]).stat().st_mtime_ns == keep


def test_fewer_and_more_images_of_the_same_set(models, tmp_path):
    def count() -> int:
        return len(np.load(next(tmp_path.glob("*.npz")))["arr_0"])

    folder = sample_set(tmp_path, *models, "--num-fid-samples", 3)
    assert count() == 3 == len(list(folder.glob("*.png")))
    sample_set(tmp_path, *models, "--num-fid-samples", 5)
    assert count() == 5 == len(list(folder.glob("*.png")))
    sample_set(tmp_path, *models, "--num-fid-samples", 2)
    assert count() == 2


def test_images_are_resized_for_scoring(models, tmp_path, pipeline):
    folder = sample_set(tmp_path, *models, "--num-fid-samples", 2, "--image-size-eval", "8", "--cfg-scale", 4.0)
    packed = np.load(folder.with_name(f"{folder.name}.npz"))
    assert packed["arr_0"].shape == (2, 8, 8, 3)
    expected = pipeline(packed["arr_1"].tolist(), seed=0, indices=[0, 1], size=(8, 8))
    assert np.array_equal(packed["arr_0"], expected)


def test_a_set_of_another_checkpoint_is_refused(models, gpt_ckpt, vq_ckpt, tmp_path, capsys):
    sample_set(tmp_path / "set", *models, "--num-fid-samples", 1)
    content = containers.read(gpt_ckpt)
    content["ema"]["norm.weight"] += 1
    other = tmp_path / gpt_ckpt.name  # the same file name, hence the same folder
    torch.save(content, other)
    flags = ["--gpt-ckpt", other, "--vq-ckpt", vq_ckpt, "--precision", "none", "--num-fid-samples", 2]
    message = refused(capsys, sample_set, tmp_path / "set", *flags)
    assert "made with another gpt_ckpt_sha256" in message and "--sample-dir" in message


# ---- checkpoints


def test_foreign_checkpoints_give_the_same_images(gpt_ckpt, vq_ckpt, pipeline, tmp_path):
    for path, name in [(gpt_ckpt, "gpt.pt"), (vq_ckpt, "vq.pt")]:
        torch.save({"model": containers.read(path)["ema"]}, tmp_path / name)
    torch.save(torch.load(tmp_path / "gpt.pt")["model"], tmp_path / "consolidated.pth")
    names = {"gpt_model": "GPT-S", "vq_model": "VQ-4-S", "precision": "none", "vq_ckpt": str(tmp_path / "vq.pt")}
    for file, options in [("gpt.pt", {}), ("consolidated.pth", {"from_fsdp": True})]:
        flags = SampleFlags(gpt_ckpt=str(tmp_path / file), image_size=(16, 16), **names, **options)
        foreign = load_pipeline(flags, device=CPU)
        assert np.array_equal(foreign([2, 0], seed=0, indices=[0, 1]), pipeline([2, 0], seed=0, indices=[0, 1]))
        assert foreign.conditions.parse("2") == [2] and foreign.conditions.name(2) == "2"
        with pytest.raises(ValueError, match="holds no class names"):
            foreign.conditions.parse("red")
    unsized = load_pipeline(SampleFlags(gpt_ckpt=str(tmp_path / "gpt.pt"), **names), device=CPU)
    assert unsized.image_size == (384, 384)
    arpg = MODELS["ARPG-S"](vocab_size=256, num_classes=3).state_dict()
    torch.save({"state_dict": arpg}, tmp_path / "arpg.pt")
    files = {"gpt_ckpt": str(tmp_path / "arpg.pt"), "vq_ckpt": str(vq_ckpt), "precision": "none"}
    assert load_pipeline(SampleFlags(**files), device=CPU).image_size == (256, 256)  # that of ARPG's released files
    assert pipeline.image_size == (16, 16) and pipeline.conditions.names == CLASSES


def test_wrong_checkpoints_are_refused(gpt_ckpt, vq_ckpt, tmp_path, capsys):
    def attempt(gpt, vq) -> str:
        return refused(capsys, grid, *(["--gpt-ckpt", gpt] if gpt else []), *(["--vq-ckpt", vq] if vq else []))

    assert "is no GPT or ARPG checkpoint" in (message := attempt(vq_ckpt, gpt_ckpt)) and "--vq-ckpt?" in message
    assert "looks like a GPT" in attempt(gpt_ckpt, gpt_ckpt)
    assert "--gpt-ckpt is missing" in attempt(None, vq_ckpt) and "--vq-ckpt is missing" in attempt(gpt_ckpt, None)
    assert "no checkpoint at" in attempt(tmp_path / "none.pt", vq_ckpt)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert "text.pt" in attempt(tmp_path / "text.pt", vq_ckpt)

    other = VQ_models["VQ-4-S"](codebook_size=128)
    torch.save({"model": other.state_dict(), "config": {"vq_model": "VQ-4-S", "codebook_size": 128}},
               tmp_path / "small.pt")
    assert "the GPT has 256 codes, the tokenizer 128" in attempt(gpt_ckpt, tmp_path / "small.pt")

    content = containers.read(gpt_ckpt)
    content["config"]["gpt_model"] = "GPT-Q"
    torch.save(content, tmp_path / "future.pt")
    assert "GPT-Q, which is unknown" in attempt(tmp_path / "future.pt", vq_ckpt)
    del content["ema"]["tok_embeddings.weight"]
    torch.save(content, tmp_path / "cut.pt")
    assert "no token embeddings" in attempt(tmp_path / "cut.pt", vq_ckpt)


# ---- as LlamaGen has it: names and defaults


def test_a_set_has_llamagens_name(models, gpt_ckpt, vq_ckpt, tmp_path):
    settings = "size-16-size-16-VQ-4-S-topk-0-topp-1.0-temperature-1.0-cfg-1.5"
    few = ["--num-fid-samples", 1, "--no-png"]
    assert sample_set(tmp_path / "a", *models, *few).name == f"GPT-S-{gpt_ckpt.stem}-{settings}-seed-0"
    balanced = sample_set(tmp_path / "b", *models, *few, "--label-mode", "balanced", "--cfg-interval", "3.0")
    assert balanced.name == f"GPT-S-{gpt_ckpt.stem}-{settings}-interval-3-balanced-seed-0"
    step = tmp_path / "my.run"
    step.mkdir()
    torch.save(containers.read(gpt_ckpt)["ema"], step / "consolidated.pth")
    foreign = ["--gpt-model", "GPT-S", "--image-size", 16, "--vq-ckpt", vq_ckpt, "--from-fsdp", *few, "--gpt-ckpt"]
    for i, path in enumerate((step / "consolidated.pth", step)):
        assert sample_set(tmp_path / str(i), *foreign, path).name == f"GPT-S-my.run-{settings}-seed-0"


def test_what_our_fsdp_training_wrote_is_sampled_with_llamagens_flag(models, gpt_ckpt, tmp_path, capsys):
    step = tmp_path / "run" / "checkpoints" / "0000009"
    shutil.copytree(gpt_ckpt, step)
    facts = json.loads((step / "state.json").read_text())
    facts["flags"]["data_parallel"] = "fsdp"
    (step / "state.json").write_text(json.dumps(facts))
    given = ["--num-fid-samples", 1, "--from-fsdp", "--gpt-ckpt", step]
    assert sample_set(tmp_path / "samples", *models, *given).name.startswith("GPT-S-0000009-")
    torch.save({"model": containers.read(gpt_ckpt)["model"]}, tmp_path / "ddp.pt")
    said = refused(capsys, sample_set, tmp_path, *models, "--from-fsdp", "--gpt-ckpt", tmp_path / "ddp.pt")
    assert "ddp.pt is no bare state dict: leave the flag out" in said


def test_a_set_that_an_earlier_version_began_is_gone_on_with(models, tmp_path, capsys):
    folder = sample_set(tmp_path, *models, "--num-fid-samples", 3)
    old = folder.with_name(folder.name.replace("-seed-", "-random-seed-"))
    folder.rename(old)
    folder.with_name(f"{folder.name}.npz").rename(old.with_name(f"{old.name}.npz"))
    capsys.readouterr()
    assert sample_set(tmp_path, *models, "--num-fid-samples", 3) == old
    said = capsys.readouterr().out
    assert f"going on with {old}" in said and "finished already, nothing to sample" in said
    assert sample_set(tmp_path, *models, "--num-fid-samples", 4) == old
    assert "1 sampled" in capsys.readouterr().out
    # images of LlamaGen, which have today's name, and a removed folder of PNGs change nothing
    folder.mkdir()
    (folder / "000000.png").write_bytes((old / "000000.png").read_bytes())
    cli.run(sample_ddp.main, sample_ddp.SampleSetFlags,
            ["--sample-dir", str(tmp_path), *models, "--num-fid-samples", "4"])
    assert f"going on with {old}" in capsys.readouterr().out
    shutil.rmtree(folder)
    kept = (old / "config.json").read_text()
    shutil.rmtree(old)
    capsys.readouterr()
    assert sample_set(tmp_path, *models, "--num-fid-samples", 4) == old
    assert "nothing to sample" in capsys.readouterr().out and (old / "config.json").read_text() == kept
    # one that was made in another way is another set
    (old / "config.json").write_text((old / "config.json").read_text().replace('"dtype": "torch', '"dtype": "other'))
    cli.run(sample_ddp.main, sample_ddp.SampleSetFlags,
            ["--sample-dir", str(tmp_path), *models, "--num-fid-samples", "1"])
    assert folder.is_dir() and "going on" not in capsys.readouterr().out


def test_images_of_llamagen_are_neither_completed_nor_replaced(models, tmp_path, capsys):
    folder = sample_set(tmp_path / "ours", *models, "--num-fid-samples", 1)
    theirs = tmp_path / "theirs" / folder.name
    theirs.mkdir(parents=True)
    np.savez(theirs.with_name(f"{theirs.name}.npz"), arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    before = theirs.with_name(f"{theirs.name}.npz").read_bytes()
    message = refused(capsys, sample_set, tmp_path / "theirs", *models, "--num-fid-samples", 1)
    assert f"{theirs.name}.npz holds images" in message and "give another --sample-dir" in message
    assert theirs.with_name(f"{theirs.name}.npz").read_bytes() == before
    theirs.with_name(f"{theirs.name}.npz").unlink()
    (folder / "000000.png").rename(theirs / "000000.png")
    assert "holds images" in refused(capsys, sample_set, tmp_path / "theirs", *models, "--num-fid-samples", 1)


@pytest.mark.parametrize(("asked", "made", "kept"), [
    (None, (384, 384), (256, 256)), (None, (512, 512), (256, 256)), (None, (256, 256), (256, 256)),
    (None, (48, 48), (48, 48)), (None, (384, 512), (384, 512)), ((384, 384), (384, 384), (384, 384)),
    ((256, 256), (48, 48), (256, 256))])
def test_the_size_for_scoring(asked, made, kept):
    assert sample_ddp.SampleSetFlags(image_size_eval=asked).scored_size(made) == kept


def test_large_images_are_kept_at_256_pixels_unless_asked_otherwise(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.options.SCORED_AT", 8)  # of 16 pixels, in place of 256 of 384
    few = ["--num-fid-samples", 1]
    old = sample_set(tmp_path, *models, *few, "--image-size-eval", 16)
    old = old.rename(old.with_name(old.name.replace("-seed-", "-random-seed-")))
    capsys.readouterr()
    cli.run(sample_ddp.main, sample_ddp.SampleSetFlags,
            ["--sample-dir", str(tmp_path), *models, "--num-fid-samples", "1"])
    folder, = (path for path in tmp_path.iterdir() if path.is_dir() and path != old)
    assert "-size-16-size-8-" in folder.name
    assert np.load(folder.with_name(f"{folder.name}.npz"))["arr_0"].shape == (1, 8, 8, 3)
    said = capsys.readouterr().out
    assert f"{old} is left as it is: it holds images of 16 pixels" in said and "--image-size-eval 16" in said


def test_intervals_of_guidance(models, pipeline, tmp_path, capsys):
    def codes(interval) -> list:
        settings = {**pipeline.settings, "cfg_interval": interval}
        generators = [sample_generator(0, i) for i in range(2)]
        return generate(pipeline.gpt, torch.tensor([0, 1]), 16, generators=generators,
                        **{**settings, "cfg_scale": 500.0}).tolist()

    assert codes(-1.0) == codes(-1) == codes(99.5) == codes(14) != codes(2)
    assert codes(2.5) == codes(2) == codes(2.0) != codes(3)
    assert codes(-0.5) != codes(0)  # the prefill alone is guided
    for word in ("-1.0", "2.5", "-1", "1e0"):
        grid(*models, "--cfg-interval", word, "--output", tmp_path / "x.png")
    assert "--cfg-interval" in refused(capsys, grid, *models, "--cfg-interval", "nan")


@pytest.mark.parametrize("names", [["red"], ["red", "green", "blue", "violet"]])
def test_as_many_class_names_as_classes(gpt_ckpt, vq_ckpt, code_store, names, tmp_path, capsys):
    """A config of another number, edited or mixed up, gives no name to some pictures, or moves all embeddings."""
    content = containers.read(gpt_ckpt)
    content["config"]["classes"] = names
    containers.save({key: content[key] for key in ("model", "config")}, tmp_path / "gpt.pt")
    said = f"names {len(names)} classes, but its class table has 3"
    models = ("--gpt-ckpt", tmp_path / "gpt.pt", "--vq-ckpt", vq_ckpt)
    assert said in refused(capsys, grid, *models, "--output", tmp_path / "x.png")
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", code_store, *TINY_GPT, "--init-from", tmp_path / "gpt.pt", "--epochs", 1,
             "--results-dir", tmp_path / "results")
    assert said in capsys.readouterr().err
