"""The long run: kills, damage, full disks and company cost little, and the npz is the same whatever happened."""
import errno
import fcntl
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.sample import batch_size, sample_ddp, set_writer
from autoregressive.sample.batch_size import batch_that_fits, bytes_per_image, even_batch
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.sample_store import SampleStore
from autoregressive.sample.set_writer import SetWriter
from utils import cli, images

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DESCRIBED = {"gpt_model": "GPT-S", "seed": 0}
COUNT = 10


@pytest.fixture(scope="module")
def models(gpt_ckpt, vq_ckpt) -> list[str]:
    return ["--gpt-ckpt", str(gpt_ckpt), "--vq-ckpt", str(vq_ckpt), "--precision", "none", "--num-fid-samples",
            str(COUNT)]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> bytes:
    """The npz of an undisturbed run."""
    return sample(tmp_path_factory.mktemp("whole"), *models).read_bytes()


@pytest.fixture
def shard_per_batch(monkeypatch):
    monkeypatch.setattr(set_writer, "SHARD_SECONDS", 0.0)


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The indices of the images that are sampled from now on."""
    indices = []
    original = Pipeline.sample_codes
    monkeypatch.setattr(Pipeline, "sample_codes", lambda self, labels, **given: (
        indices.extend(given["indices"]), original(self, labels, **given))[1])
    return indices


def sample(sample_dir: Path, *argv) -> Path:
    """Run the sampler in this process; return the npz."""
    cli.run(sample_ddp.main, sample_ddp.SampleSetFlags, ["--sample-dir", str(sample_dir), *map(str, argv)])
    npz, = sample_dir.glob("*.npz")
    return npz


def stopped(capsys, *argv) -> str:
    """The one line of a run that exits 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample(*argv)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def kill(monkeypatch, *argv, after: int) -> None:
    """Run the sampler until `after` batches are written, then end it without any time to write more."""
    def sample_codes(self, labels, **given):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, labels, **given)

    def leave(self, *raised):
        self.thread.shutdown()
        self.png_threads.shutdown()

    calls, original = [], Pipeline.sample_codes
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "sample_codes", sample_codes)
        patch.setattr(SetWriter, "__exit__", leave)
        with pytest.raises(SystemExit) as stop:
            sample(*argv)
    assert stop.value.code == 130


def pictures(count: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 6, 3), np.uint8)


def new_store(folder: Path, **described) -> SampleStore:
    return SampleStore(folder / "set", {**DESCRIBED, **described}, size=(4, 6))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/shards/*.npz"))


# ---- kills


@pytest.mark.usefixtures("shard_per_batch")
@pytest.mark.parametrize("flags", [["--no-png"], []], ids=str)
def test_a_killed_run_continues_with_any_batch(models, whole, drawn, tmp_path, monkeypatch, capsys, flags):
    kill(monkeypatch, tmp_path, *models, *flags, "--per-proc-batch-size", 3, after=2)
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.glob("*.npz"))
    drawn.clear()
    npz = sample(tmp_path, *models, *flags, "--per-proc-batch-size", 1)
    assert sorted(drawn) == list(range(6, COUNT)) and npz.read_bytes() == whole
    assert "4 sampled in" in capsys.readouterr().out
    sample(tmp_path, *models, *flags)  # there is nothing left to do, and so nothing to note
    rows = npz.with_name(f"{npz.stem}.speed.jsonl").read_text().splitlines()
    assert [json.loads(row)["images"] for row in rows] == [4] and json.loads(rows[0])["seconds"] >= 0
    names = {path.name for path in npz.with_suffix("").iterdir()}
    assert names == {"config.json", *([] if flags else [f"{i:06d}.png" for i in range(COUNT)])}


def test_pngs_without_a_shard_are_taken_over(models, whole, drawn, tmp_path, monkeypatch, capsys):
    kill(monkeypatch, tmp_path, *models, "--per-proc-batch-size", 3, after=2)
    assert not shards(tmp_path)
    folder, = tmp_path.iterdir()
    (folder / "000001.png").write_bytes((folder / "000001.png").read_bytes()[:60])
    images.save_png(folder / "000002.png", pictures(1)[0])
    times = {i: (folder / f"{i:06d}.png").stat().st_mtime_ns for i in range(6)}
    drawn.clear()
    npz = sample(tmp_path, *models)
    assert sorted(drawn) == [1, 2, 6, 7, 8, 9] and npz.read_bytes() == whole
    errors = capsys.readouterr().err
    assert "000001.png cannot be read" in errors and "000002.png is 4x6: it is made again" in errors
    assert {i for i in range(6) if (folder / f"{i:06d}.png").stat().st_mtime_ns == times[i]} == {0, 3, 4, 5}


@pytest.mark.processes
@pytest.mark.usefixtures("shard_per_batch")
def test_two_processes_finish_what_one_began(models, whole, tmp_path, monkeypatch):
    kill(monkeypatch, tmp_path, *models, "--per-proc-batch-size", 2, "--no-png", after=1)
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(sample_ddp.__file__)
    words = [sys.executable, script.parents[2] / "utils" / "launch.py", script, *models, "--per-proc-batch-size", "3",
             "--sample-dir", tmp_path]
    process = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    npz, = tmp_path.glob("*.npz")
    assert npz.read_bytes() == whole
    assert len(list(tmp_path.glob("*/*.png"))) == COUNT and not shards(tmp_path)
    with np.load(npz) as packed:
        assert np.array_equal(packed["arr_0"][1], images.load_png(next(tmp_path.glob("*/000001.png"))))


# ---- finished sets


def test_a_finished_set_is_left_alone(models, drawn, tmp_path, capsys):
    npz = sample(tmp_path, *models, "--no-png")
    before, folder = npz.stat(), npz.with_suffix("")
    drawn.clear()
    sample(tmp_path, *models, "--no-png")
    assert "finished already, nothing to sample" in capsys.readouterr().out and not drawn
    sample(tmp_path, *models)
    assert npz.stat().st_mtime_ns == before.st_mtime_ns and not drawn and len(list(folder.glob("*.png"))) == COUNT


def test_a_set_grows_and_shrinks_without_loss(models, whole, drawn, tmp_path):
    words = [*models, "--no-png", "--num-fid-samples"]
    sample(tmp_path, *words, 4)
    npz = sample(tmp_path, *words, COUNT)
    assert sorted(drawn) == list(range(COUNT)) and npz.read_bytes() == whole
    for count in (7, 3, COUNT):
        assert len(np.load(sample(tmp_path, *words, count))["arr_0"]) == count
    assert len(drawn) == COUNT and npz.read_bytes() == whole and not shards(tmp_path)


def test_an_npz_without_its_folder_is_not_believed(models, drawn, tmp_path):
    npz = sample(tmp_path, *models, "--no-png")
    (npz.with_suffix("") / "config.json").unlink()
    sample(tmp_path, *models, "--no-png")
    assert len(drawn) == COUNT  # made as described
    npz.with_suffix("").joinpath("config.json").unlink()
    sample(tmp_path, *models, "--no-png", "--cfg-interval", -1, "--precision", "fp16")
    assert len(drawn) == COUNT  # fp16 is fp32 on a CPU
    images.save_npz(npz, pictures(COUNT), count=COUNT, shape=(4, 6))
    sample(tmp_path, *models, "--no-png")
    assert len(drawn) == 2 * COUNT and np.load(npz)["arr_0"].shape == (COUNT, 16, 16, 3)


# ---- damage


@pytest.mark.usefixtures("shard_per_batch")
def test_damaged_shards_are_named_and_made_again(models, whole, drawn, tmp_path, monkeypatch, capsys):
    flags = [*models, "--no-png", "--per-proc-batch-size", 2]
    kill(monkeypatch, tmp_path, *flags, after=4)
    first, second, third, _ = shards(tmp_path)
    first.write_bytes(first.read_bytes()[:700])
    content = bytearray(second.read_bytes())
    content[600] ^= 1  # a pixel
    second.write_bytes(content)
    drawn.clear()
    assert sample(tmp_path, *flags).read_bytes() == whole and sorted(drawn) == [0, 1, 2, 3, 8, 9]
    errors = capsys.readouterr().err
    assert f"{first.name} is removed" in errors and "Bad CRC-32" in errors and third.name not in errors


def test_any_flipped_bit_of_a_shard_is_noticed_or_harmless(tmp_path, capsys):
    store = new_store(tmp_path)
    given = pictures(3)
    store.add(list(zip([7, 2, 4], given, strict=True)))
    path, = store.shards.iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 3):
        content = bytearray(sound)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        held = store.held(check=True)
        assert not held or (held[path].tolist() == [2, 4, 7] and np.array_equal(
            np.load(path)["arr_0"], given[[1, 2, 0]])), place
    assert capsys.readouterr().err.count("made again") > len(sound) // 6


def test_shards_that_a_kill_left_beside_a_finished_npz_go(models, whole, tmp_path):
    npz = sample(tmp_path, *models, "--no-png")
    (npz.with_suffix("") / "shards").mkdir()
    left = npz.with_suffix("") / "shards" / "shard-000000.npz"
    with zipfile.ZipFile(npz) as archive:
        images.save_npz(left, np.load(npz)["arr_0"], count=COUNT, shape=(16, 16),
                        extra={"indices": np.arange(COUNT)}, comment=archive.comment)
    temporary = npz.with_name(f".{npz.name}.x.tmp")
    temporary.touch()
    assert sample(tmp_path, *models, "--no-png").read_bytes() == whole
    assert not left.parent.exists() and not temporary.exists()


def test_shards_of_another_set_do_not_count(tmp_path, capsys):
    new_store(tmp_path, seed=1).add([(0, pictures(1)[0])])
    assert new_store(tmp_path).lacking(2) == [0, 1]
    assert "of another set" in capsys.readouterr().err


def test_a_missing_image_stops_the_packing(tmp_path):
    store = new_store(tmp_path)
    store.add([(0, pictures(1)[0])])
    with pytest.raises(ValueError, match="1 images, such as 1, are gone"):
        store.pack(np.zeros(2, int))
    assert store.lacking(1) == [] and not store.npz.exists()


# ---- the disk, and company


@pytest.mark.usefixtures("shard_per_batch")
@pytest.mark.parametrize("flags", [["--no-png"], []], ids=str)
def test_a_full_disk_is_one_line_and_costs_nothing_written(models, whole, tmp_path, monkeypatch, capsys, flags):
    def full(path, *given, **named):
        written.append(path)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *given, **named)

    written, name = [], "save_npz" if flags else "save_png"
    original = getattr(images, name)
    with monkeypatch.context() as patch:
        patch.setattr(images, name, full)
        message = stopped(capsys, tmp_path, *models, *flags, "--per-proc-batch-size", 1)
    assert "No space left on device" in message and "run again to continue" in message and str(tmp_path) in message
    assert len(shards(tmp_path)) >= 4 and not list(tmp_path.rglob("*.tmp"))
    assert sample(tmp_path, *models, *flags).read_bytes() == whole


def test_two_runs_do_not_meet(models, whole, tmp_path, capsys):
    folder = sample(tmp_path, *models, "--num-fid-samples", 1).with_suffix("")
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another run is filling" in stopped(capsys, tmp_path, *models)
    os.close(handle)
    assert sample(tmp_path, *models).read_bytes() == whole


def test_an_error_in_the_writer_is_raised_and_the_rest_is_kept(tmp_path):
    def fail() -> np.ndarray:
        raise RuntimeError("decoder")

    store = new_store(tmp_path)
    with pytest.raises(RuntimeError, match="decoder"):  # noqa: PT012
        with SetWriter(store, png=False) as writer:
            writer.add([0], lambda: pictures(1))
            writer.add([1], fail)
            while True:
                writer.add([2], lambda: pictures(1))
    assert 1 in store.lacking(3) and 0 not in store.lacking(3)


# ---- the batch


def test_even_batches():
    assert [even_batch(total, 32) for total in (0, 1, 32, 33, 65, 100)] == [32, 1, 32, 17, 22, 25]


def test_the_batch_that_fits(gpt_ckpt, vq_ckpt, monkeypatch):
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(gpt_ckpt), vq_ckpt=str(vq_ckpt), precision="none"), device=CPU)
    config = pipeline.gpt.config
    pipeline.settings["cfg_scale"] = 1.0
    single = bytes_per_image(pipeline, CPU)
    pipeline.settings["cfg_scale"] = 2.0
    double = bytes_per_image(pipeline, CPU)
    cache = 2 * 4 * config.n_layer * config.dim * 17  # keys and values, fp32, a class and 16 codes
    assert double - single == cache + 8 * 4 * 256 and single - (double - single) == 4 * 3 * 4 * 16 * 16
    for free, expected in ((0, 1), (1e12, batch_size.ENOUGH["cpu"])):
        monkeypatch.setattr(batch_size, "free_memory", lambda device, free=free: free)
        assert batch_that_fits(pipeline, CPU) == expected
    room = batch_size.decoder_bytes(pipeline, CPU) + 7.5 * double
    monkeypatch.setattr(batch_size, "free_memory", lambda device: room / batch_size.SHARE)
    assert batch_that_fits(pipeline, CPU) == 7
    assert batch_size.decoder_bytes(pipeline, CPU, canvas=(4000, 4000)) > batch_size.decoder_bytes(pipeline, CPU)
    wide = bytes_per_image(pipeline, CPU, canvas=(16, 1600))
    assert wide - double == 4 * 3 * 4 * 16 * (1600 - 16)
    assert bytes_per_image(pipeline, torch.device("cuda"), canvas=(16, 1600)) == wide
    room = batch_size.decoder_bytes(pipeline, CPU, canvas=(16, 1600)) + 3.5 * wide
    monkeypatch.setattr(batch_size, "free_memory", lambda device: room / batch_size.SHARE)
    assert batch_that_fits(pipeline, CPU, canvas=(16, 1600)) == 3 < batch_that_fits(pipeline, CPU)


def test_free_memory_is_a_share_of_the_container(monkeypatch, tmp_path):
    (tmp_path / "info").write_text("MemTotal: 9 kB\nMemAvailable:  4000 kB\n")
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("3000000\n")
    (tmp_path / "used").write_text("1000000\n")
    monkeypatch.setattr(batch_size, "MEMINFO", str(tmp_path / "info"))
    monkeypatch.setattr(batch_size, "CONTAINER", ((str(tmp_path / "max"), str(tmp_path / "used")),))
    assert batch_size.free_memory(CPU) == 4000 * 1024
    monkeypatch.setattr(batch_size, "CONTAINER", ((str(tmp_path / "limit"), str(tmp_path / "used")),))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert batch_size.free_memory(CPU) == 1000000
