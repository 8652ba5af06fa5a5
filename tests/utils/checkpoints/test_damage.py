"""Only wrong content is damage: a failing disk and a wrong call of ours leave a checkpoint where it is."""
import errno
import io
import zipfile

import pytest
import torch

from tests.conftest import call
from tests.runs import OFTEN, TINY_GPT
from utils.checkpoints import containers, sharded
from utils.checkpoints.damage import DamagedError, is_damage
from utils.training.writer import CheckpointWriter

RUN = "000-GPT-S"


@pytest.fixture
def written(tmp_path):
    """A checkpoint folder of two tensors."""
    writer = CheckpointWriter([tmp_path], keep=0, is_main=True)
    writer.save(3, {"model.a": torch.arange(3.0), "model.b": torch.ones(2)}, {"steps": 3, "config": {}})
    writer.wait()
    return tmp_path / "0000003"


@pytest.fixture
def command(code_store, tmp_path):
    return ["train_gpt", "--code-path", code_store, *TINY_GPT, *OFTEN, "--resume", "auto", "--results-dir", tmp_path]


def broken(number):
    def fail(*args, **kwargs):
        raise OSError(number, "the disk fails")
    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("what", ["facts", "hash", "index", "tensors"])
def test_a_disk_that_fails_is_no_damage(what, number, written, monkeypatch):
    if what == "facts":
        monkeypatch.setattr(type(written), "read_text", broken(number))
    elif what == "hash":
        monkeypatch.setattr(sharded, "file_hash", broken(number))
    elif what == "index":
        monkeypatch.setattr(sharded, "open", broken(number), raising=False)
    else:
        monkeypatch.setattr(sharded.SafeReader, "read_data", broken(number))
    with pytest.raises(OSError, match="the disk fails"):
        containers.read(written)


def test_a_checkpoint_on_a_disk_that_fails_once_is_gone_on_from(command, tmp_path, monkeypatch, capsys):
    call(*command, "--epochs", 1)
    newest = containers.newest(tmp_path / RUN / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(sharded, "file_hash", broken(errno.EIO))
        with pytest.raises(SystemExit) as caught:
            call(*command, "--epochs", 1)
    assert caught.value.code == 2 and "the disk fails" in capsys.readouterr().err
    assert containers.newest(tmp_path / RUN / "checkpoints") == newest
    call(*command, "--epochs", 1)
    assert "already trained" in capsys.readouterr().out


def test_a_wrong_call_is_no_damage(written, monkeypatch):
    load = sharded.dcp.load

    def without_it(state_dict, *, storage_reader):  # as an older torch has it
        load(state_dict, storage_reader=storage_reader, unheard_of=True)

    monkeypatch.setattr(sharded.dcp, "load", without_it)
    with pytest.raises(TypeError):
        containers.read(written)
    state = torch.nn.Linear(2, 2).state_dict()
    torch.save(state, written.parent / "x.pt")
    monkeypatch.setattr(torch, "load", lambda path, *, map_location: {})
    with pytest.raises(TypeError):
        containers.read(written.parent / "x.pt")


def test_what_unpickling_raises_is_damage():
    kept = io.BytesIO()
    torch.save({"a": torch.ones(3)}, kept, _use_new_zipfile_serialization=False)
    seen: dict[type, bool] = {}
    for place in range(0, len(kept.getvalue()), 7):
        spoilt = bytearray(kept.getvalue())
        spoilt[place] ^= 0x55
        try:
            torch.load(io.BytesIO(bytes(spoilt)), weights_only=True)
        except Exception as error:
            seen[type(error)] = is_damage(error) or isinstance(error, MemoryError)
    assert len(seen) > 2 and all(seen.values()), seen
    assert not is_damage(TypeError("of ours")) and not is_damage(OSError(5, "x")) and not is_damage(MemoryError())
    assert not is_damage(torch.OutOfMemoryError("x"))
    assert not is_damage(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_damage(DamagedError("x"))


def test_a_compressed_archive_is_read_too(tmp_path):
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as whole, zipfile.ZipFile(tmp_path / "y.pt", "w",
                                                                      zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert torch.equal(containers.read(tmp_path / "y.pt")["model"]["a"], torch.ones(3))


def test_a_large_file_is_mapped_not_copied(tmp_path):
    """Its tensors take memory only when they are looked at."""
    torch.save({"model": {"a": torch.zeros(2**26)}, "optimizer": {}}, tmp_path / "x.pt")  # 256 MiB

    def resident() -> int:
        """KiB of this process that are not of files."""
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    before = resident()
    contents = [containers.read(tmp_path / "x.pt") for _ in range(3)]
    assert all(content["model"]["a"].sum() == 0 for content in contents)
    assert resident() - before < 2**16
    contents[0]["model"]["a"][0] = 1  # its own from here on
    assert contents[1]["model"]["a"][0] == 0 and containers.read(tmp_path / "x.pt")["model"]["a"][0] == 0
