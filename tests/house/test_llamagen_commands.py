"""What LlamaGen's users type: its file names, its flags (tests/data/llamagen_flags.txt), its scripts to their end."""
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, write_images
from tests.tokenizer.test_reconstructors import (  # noqa: F401 (two fixtures)
    consistency_folder,
    save_lightning,
    taming_shapes,
    vae_folder,
)
from tokenizer.vqgan.model import VQGANS
from utils import cli
from utils.checkpoints import containers

BLOCKS = re.split(r"\n(?=\w)", (ROOT / "tests" / "data" / "llamagen_flags.txt").read_text())[1:]
FLAGS = {block.splitlines()[0]: dict(row.split(maxsplit=1) for row in block.splitlines()[1:]) for block in BLOCKS}


def parsed_by(path: str, words: list[str]):
    """What the command makes of a command line, and with which of our entries."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *words])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(cli, "run", lambda main, flags: found.update(
            config=cli.build_parser(flags).parse_args(), entry=main.__module__ and main.__code__.co_filename))
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return found["config"], Path(found["entry"]).relative_to(ROOT)


@pytest.mark.parametrize("path", FLAGS)
def test_every_flag_of_llamagen_is_understood(path):
    assert len(FLAGS[path]) >= 7
    required = [word for name, said in FLAGS[path].items() if said == "!" for word in (f"--{name}", "x")]
    for name, said in FLAGS[path].items():
        choices = re.findall(r"\[(.*)\]", said)
        default = said.split()[0]
        values = choices[0].split("|") if choices else [default]
        for value in values:
            words = [f"--{name}"] if default == "sw" else [f"--{name}", "x" if value in ("!", "None") else value]
            for spelling in (words, [words[0].replace("-", "_").replace("__", "--", 1), *words[1:]]):
                config, _ = parsed_by(path, [*required, *spelling])
                if default == "sw":  # --no-local-save is local_save=False
                    key = name.replace("-", "_")
                    assert getattr(config, key, None) is True or getattr(config, key.removeprefix("no_"), None) is False
                elif isinstance(taken := getattr(config, name.replace("-", "_")), str | int | float):
                    assert str(taken) == words[1] or float(taken) == float(words[1])


@pytest.mark.parametrize(("path", "ours", "chosen"), [
    ("autoregressive/train/train_c2i.py", "autoregressive/train/train.py", ("data_parallel", "ddp")),
    ("autoregressive/train/train_c2i_fsdp.py", "autoregressive/train/train.py", ("data_parallel", "fsdp")),
    ("autoregressive/train/extract_codes_c2i.py", "autoregressive/train/extract_codes.py", ("vq_ckpt", None)),
    ("autoregressive/sample/sample_c2i_ddp.py", "autoregressive/sample/sample_ddp.py", ("vq_ckpt", None)),
    ("tokenizer/tokenizer_image/reconstruction_vq_ddp.py", "tokenizer/reconstruct.py", ("reconstructor", "vq")),
    ("tokenizer/vqgan/reconstruction_vqgan_ddp.py", "tokenizer/reconstruct.py", ("reconstructor", "vqgan")),
    ("tokenizer/vae/reconstruction_vae_ddp.py", "tokenizer/reconstruct.py", ("reconstructor", "vae")),
    ("tokenizer/consistencydecoder/reconstruction_cd_ddp.py", "tokenizer/reconstruct.py",
     ("reconstructor", "consistency")),
    ("tokenizer/validation/val_ddp.py", "tokenizer/reconstruct.py", ("reconstructor", "identity"))])
def test_llamagens_file_names_run_our_commands(path, ours, chosen):
    words = ["--code-path", "x"] if "/train/" in path else []
    config, entry = parsed_by(path, words)
    assert str(entry) == ours and getattr(config, chosen[0]) == chosen[1]
    assert sum(bool(line) for line in (ROOT / path).read_text().splitlines()[1:]) <= 6


def test_defaults_of_a_script_give_way_to_a_recipe_and_to_what_is_typed(tmp_path):
    (tmp_path / "mine.json").write_text('{"sample": {"vq-ckpt": "of_the_recipe", "top-k": 3}}')
    recipe = ["--recipe", str(tmp_path / "mine.json")]

    def chosen(*words) -> tuple[str, int]:
        config, _ = parsed_by("autoregressive/sample/sample_ddp.py", list(words))
        return config.vq_ckpt, config.top_k

    script = ["--vq-ckpt", "of_the_script", "--"]
    assert chosen(*script) == ("of_the_script", 0)
    assert chosen(*script, *recipe) == ("of_the_recipe", 3)
    assert chosen(*script, *recipe, "--vq_ckpt=typed") == chosen(*script, "--vq-ckpt", "typed", *recipe) == ("typed", 3)
    assert chosen(*recipe) == ("of_the_recipe", 3)


# ---- the scripts, as LlamaGen's documents call them, with smaller models and pictures


def run(folder: Path, *command, processes: int = 1, code: int = 0) -> str:
    """Run a command in a folder with this Python; what it printed."""
    environment = {**os.environ, "nproc_per_node": str(processes), "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
                   "CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.processes
def test_a_missing_released_tokenizer_is_one_line_that_says_where_it_goes(image_folder, gpt_ckpt, tmp_path):
    for script, flags in (("extract_codes_c2i", ["--data-path", image_folder, "--code-path", "codes"]),
                          ("sample_c2i", ["--gpt-ckpt", gpt_ckpt])):
        said = run(tmp_path, "bash", ROOT / f"scripts/autoregressive/{script}.sh", *flags, code=2).strip()
        assert said.startswith("error: no checkpoint at ./pretrained_models/vq_ds16_c2i.pt") and "\n" not in said
        assert "put the tokenizer vq_ds16_c2i.pt there" in said and "--vq-ckpt" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.processes
@pytest.mark.slow
def test_llamagens_scripts_run_to_their_end(image_folder, vae_folder, consistency_folder, tmp_path):  # noqa: F811
    tokenizer, autoregressive = ROOT / "scripts" / "tokenizer", ROOT / "scripts" / "autoregressive"
    data, small = ["--data-path", image_folder], ["--image-size", 24, "--num-workers", 0]
    training = [*small, "--global-batch-size", 12, "--epochs", 1, "--ckpt-every", 2]
    vq = ["--vq-model", "VQ-4-S", "--perceptual-weight", 0]  # 0: without the file of VGG's weights

    def bash(script: Path, *flags, processes: int = 1) -> str:
        return run(tmp_path, "bash", script, *flags, processes=processes)

    bash(tokenizer / "train_vq.sh", "--cloud-save-path", "cloud", *data, *training, *vq, "--disc-start", 1)
    trained = containers.newest(tmp_path / "cloud" / "000-VQ-4-S" / "checkpoints")
    bash(tokenizer / "train_vq_finetune.sh", *data, "--cloud-save-path", "cloud", *training, *vq, "--vq-ckpt", trained)
    finetuned = containers.newest(tmp_path / "cloud" / "001-VQ-4-S" / "checkpoints")
    said = bash(tokenizer / "train_vq_finetune_continue.sh", *data, "--cloud-save-path", "cloud", *training, *vq,
                "--epochs", 2, "--vq-ckpt", finetuned)
    assert "at step 3" in said
    (tmp_path / "pretrained_models").mkdir()
    released = {"model": containers.read(finetuned)["model"]}  # as LlamaGen releases it
    torch.save(released, tmp_path / "pretrained_models" / "vq_ds16_c2i.pt")

    released = ["--vq-model", "VQ-4-S", "--codebook-size", 256]
    for script, flags in (("val", []), ("reconstruction_vae", ["--local-weights", vae_folder]),
                          ("reconstruction_vq", [*released, "--vq-ckpt", "./pretrained_models/vq_ds16_c2i.pt"]),
                          ("reconstruction_consistency_decoder", ["--local-weights", consistency_folder])):
        bash(tokenizer / f"{script}.sh", *data, "--dataset", "imagenet", *small, *flags)
    shapes = taming_shapes(VQGANS["vqgan_imagenet_f16_16384"])  # of the published size; its values take no room
    weights = save_lightning(tmp_path / "last.ckpt", {k: torch.full((1,), 0.01).expand(v) for k, v in shapes.items()})
    bash(tokenizer / "reconstruction_vqgan.sh", "--data-path", write_images(tmp_path / "few", count=1), "--image-size",
         32, "--num-workers", 0, "--local-weights", weights)
    made = {path.name for path in (tmp_path / "reconstructions").iterdir()}
    vq_name = "VQ-4-S-imagenet-size-24-size-24-codebook-size-256-dim-8-seed-0"
    assert {"val_imagenet.npz", f"{vq_name}.npz", f"{vq_name}_results.txt",
            "sd-vae-ft-mse-imagenet-size-24-seed-0.npz", "vqgan_imagenet_f16_16384-imagenet-size-32-seed-0.npz"} <= made

    bash(autoregressive / "extract_codes_c2i.sh", *data, "--code-path", "codes", "--ten-crop", "--crop-range", 1.1,
         *small, *released, processes=2)
    gpt = ["--code-path", "codes", "--gpt-model", "GPT-S", *training]
    bash(autoregressive / "train_c2i.sh", "--cloud-save-path", "cloud", *gpt)
    bash(autoregressive / "train_c2i_fsdp.sh", "--cloud-save-path", "cloud", *gpt, processes=2)
    checkpoints = containers.newest(tmp_path / "cloud" / "004-GPT-S" / "checkpoints")  # three tokenizers were before
    said = bash(autoregressive / "train_c2i_fsdp.sh", "--cloud-save-path", "cloud", *gpt, "--epochs", 2, "--gpt-resume",
                checkpoints)
    assert "at step 3" in said
    sampling = ["--gpt-ckpt", checkpoints, "--gpt-model", "GPT-S", "--image-size", 24, "--cfg-scale", 2.0]
    bash(autoregressive / "sample_c2i.sh", *sampling, *released, "--image-size-eval", 24, "--num-fid-samples", 3,
         "--cfg-interval", "-1.0", processes=2)
    name = "GPT-S-0000003-size-24-size-24-VQ-4-S-topk-0-topp-1.0-temperature-1.0-cfg-2.0-seed-0"
    assert np.load(tmp_path / "samples" / f"{name}.npz")["arr_0"].shape == (3, 24, 24, 3)
    run(tmp_path, "python3", ROOT / "autoregressive/sample/sample_c2i.py", *sampling, *released,
        "--vq-ckpt", "./pretrained_models/vq_ds16_c2i.pt")
    assert (tmp_path / "sample_c2i.png").is_file()

    # the same by LlamaGen's own file names, as its scripts start them
    run(tmp_path, "torchrun", "--nnodes=1", "--nproc_per_node=2", "--standalone",
        ROOT / "autoregressive/train/extract_codes_c2i.py", *data, "--code-path", "codes2", *small, *released,
        "--vq-ckpt", "./pretrained_models/vq_ds16_c2i.pt")
    run(tmp_path, "python3", ROOT / "autoregressive/train/train_c2i_fsdp.py", *gpt, "--code-path", "codes2",
        "--no-local-save", "--cloud-save-path", "cloud2")
    assert list((tmp_path / "cloud2").glob("*-GPT-S/checkpoints/0000003/state.json"))
