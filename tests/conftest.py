"""Shared fixtures: a small image folder and what the commands make of it, made once a session by the real parsers.
Also how the suite is run: threads of each worker, the order of files, and who may start processes."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from native.build import COMPILE
from utils import cli
from utils.checkpoints.containers import newest

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {  # name of a command: (module, class of its flags)
    "train_vq": ("tokenizer.tokenizer_image.vq_train", "VQTrainFlags"),
    "extract": ("autoregressive.train.extract_codes", "ExtractFlags"),
    "extract_t5": ("language.extract_t5_feature", "TextFeatureFlags"),
    "extract_t2i": ("autoregressive.train.extract_codes_t2i", "TextExtractFlags"),
    "check_pairs": ("dataset.check_pairs", "CheckFlags"),
    "verify": ("autoregressive.train.verify_codes", "VerifyFlags"),
    "train_gpt": ("autoregressive.train.train", "GPTTrainFlags"),
    "train_t2i": ("autoregressive.train.train_t2i", "T2ITrainFlags"),
    "sample": ("autoregressive.sample.sample_ddp", "SampleSetFlags"),
    "sample_prompts": ("autoregressive.sample.sample_t2i_ddp", "PromptSetFlags"),
    "prompt_grid": ("autoregressive.sample.sample_t2i", "PromptGridFlags"),
    "served_grid": ("autoregressive.serve.sample_c2i", "ServedGridFlags"),
    "served_prompts": ("autoregressive.serve.sample_t2i", "ServedPromptFlags"),
    "reconstruct": ("tokenizer.reconstruct", "ReconstructFlags"),
    "evaluate": ("evaluations.c2i.evaluator", "EvaluatorFlags"),
    "reference": ("evaluations.c2i.reference", "ReferenceFlags"),
}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
TINY = ["--image-size", "16", "--num-workers", "0"]
TINY_VQ = [*TINY, "--vq-model", "VQ-4-S", "--perceptual-weight", "0", "--disc-weight", "0", "--lr", "1e-3",
           "--global-batch-size", "8"]
TINY_GPT = ["--gpt-model", "GPT-S", "--num-workers", "0", "--lr", "1e-3", "--global-batch-size", "8"]


def pytest_configure(config) -> None:
    """Workers of pytest-xdist share the cores: each computes, and lets its processes compute, on its own part."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # as `dist.ask_for_huge_pages` would set it, from some test on


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: what is compressed holds the time, and all workers must call a test alike."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items) -> None:
    """Files that start processes come first, so that no worker is left alone with a long one at the end."""
    long = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fail a test that starts Python or a shell, itself or by its fixtures, without the marker `processes`."""
    start = subprocess.Popen.__init__

    def watched(self, args, *rest, **options):
        program = os.fsdecode(args if isinstance(args, str | bytes | os.PathLike) else args[0])
        building = isinstance(args, list) and COMPILE in args  # the first test that needs kernels builds them
        if not building and (options.get("shell") or Path(program).name.startswith(("python", "bash", "sh"))):
            pytest.fail(f"{item.nodeid} starts {Path(program).name}: mark it with pytest.mark.processes")
        start(self, args, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("processes") is None:
            patch.setattr(subprocess.Popen, "__init__", watched)
        return (yield)


def entry(name: str):
    """(main, class of its flags) of a command."""
    module, flags = ENTRIES[name]
    loaded = importlib.import_module(module)
    return loaded.main, getattr(loaded, flags)


def call(name: str, *argv) -> None:
    """Run a command in this process with its real parser; SystemExit(2) for a user's mistake."""
    cli.run(*entry(name), [str(word) for word in argv])


def two_processes(jobs: list[tuple[str, list]], folder: Path, *, setup: str = "") -> str:
    """Run commands one after the other in one pair of processes, started as scripts/_torchrun.sh does (gloo).

    Returns what they wrote to stderr.
    """
    script = folder / "jobs.py"
    script.write_text(f"""import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.conftest import entry
from utils import dist
from utils.cli import build_parser
{setup}
for name, argv in json.loads(sys.argv[1]):
    main, flags = entry(name)
    main(flags(**vars(build_parser(flags).parse_args(argv))))
dist.barrier()
dist.shutdown()  # as cli.run does: a process that ends with its group alive may abort
""")
    words = json.dumps([(name, [str(word) for word in argv]) for name, argv in jobs])
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, str(ROOT / "utils" / "launch.py"), str(script), words], env=environment,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stderr


def write_images(root: Path, *, count: int = 12, seed: int = 0) -> Path:
    """root/{red,green,blue}/: `count` noisy images each, of several sizes and shapes, PNG and JPEG in turn."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            size = (18 + 2 * (i % 5), 18 + 3 * (i % 4), 3)
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, size), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Folder with red/, green/ and blue/, 12 images each."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def vq_ckpt(image_folder, tmp_path_factory) -> Path:
    """Checkpoint of a VQ-4-S (16x16 images, 4x4 codes of 256) after a few steps, with EMA weights."""
    results = tmp_path_factory.mktemp("tokenizer")
    call("train_vq", "--data-path", image_folder, *TINY_VQ, "--epochs", 2, "--results-dir", results, "--ema")
    return newest(results / "000-VQ-4-S" / "checkpoints")


@pytest.fixture(scope="session")
def code_store(image_folder, vq_ckpt, tmp_path_factory) -> Path:
    """Folder with the packed store imagenet16_codes: 36 images in two views."""
    codes = tmp_path_factory.mktemp("codes")
    call("extract", "--data-path", image_folder, "--code-path", codes, "--vq-ckpt", vq_ckpt, *TINY)
    return codes


@pytest.fixture(scope="session")
def gpt_ckpt(code_store, tmp_path_factory) -> Path:
    """Checkpoint of a GPT-S trained for a few steps on `code_store`; it knows the class names."""
    results = tmp_path_factory.mktemp("gpt")
    call("train_gpt", "--code-path", code_store, *TINY_GPT, "--epochs", 2, "--results-dir", results, "--ema")
    return newest(results / "000-GPT-S" / "checkpoints")


@pytest.fixture(scope="session")
def arpg_ckpt(code_store, tmp_path_factory) -> Path:
    """The same of an ARPG-S."""
    results = tmp_path_factory.mktemp("arpg")
    call("train_gpt", "--code-path", code_store, *TINY_GPT, "--gpt-model", "ARPG-S", "--epochs", 2, "--results-dir",
         results)
    return newest(results / "000-ARPG-S" / "checkpoints")


@pytest.fixture
def one_thread():
    """Where the number of threads shows in the last bits: PyTorch's convolutions and matrix products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The user's cache is neither read nor written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stand_in(monkeypatch):
    """Inception's place taken by something fast."""
    from evaluations.c2i import comparison_rules, features
    from tests.evaluations.stand_ins import WIDTHS, StandIn

    described = {"file": "stand-in", "format": "none", "sha256": "0" * 64, "known": "no", "weights_sha256": "1"}
    monkeypatch.setattr(features, "load_inception", lambda path, device: (StandIn(), described))
    monkeypatch.setattr(comparison_rules, "WIDTHS", WIDTHS)


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    """ref.npz with 40 and sample.npz with 31 images."""
    from tests.evaluations.stand_ins import pictures

    np.savez(tmp_path / "ref.npz", arr_0=pictures(40, seed=0))
    np.savez(tmp_path / "sample.npz", arr_0=pictures(31, seed=1))
    return tmp_path / "ref.npz", tmp_path / "sample.npz"


@pytest.fixture(params=["native", "torch"])
def engine(request, monkeypatch) -> type:
    """The class of the engine that models then decode on: C++ kernels or PyTorch's."""
    from autoregressive.models.engines import TorchEngine
    from autoregressive.models.native_engine import NativeEngine
    from native.build import load

    monkeypatch.setenv("LLAMAGEN_NATIVE", "1" if request.param == "native" else "0")
    if request.param == "native" and load("sample") is None:
        pytest.skip("no C++ compiler")
    return NativeEngine if request.param == "native" else TorchEngine


@pytest.fixture
def native(monkeypatch) -> None:
    """C++ kernels are there and on."""
    from native.build import load

    monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
    if load("sample") is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub that huggingface_hub asks is a server of ours over tmp_path/hub; an empty cache, no token."""
    from huggingface_hub import constants

    from tests.hub_server import serving
    from utils.checkpoints.hub import _fetched

    (tmp_path / "hub").mkdir()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    _fetched.cache_clear()
    with serving(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
            constants.ENDPOINT, server.url))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache of the hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield server
    _fetched.cache_clear()
