"""Stores that lie elsewhere: fetched once, checked, cut off, changed, damaged, mixed with local ones."""
import io
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dataset import remote
from dataset.code_check import codes_cache
from dataset.codes import open_stores
from tests.conftest import call, two_processes
from tests.dataset.codes import every_code, fake_codes, flip_byte, write_llamagen, write_packed

pytestmark = pytest.mark.usefixtures("own_cache")
LABELS = np.arange(14) % 3
URL = "memory://bucket/codes"


@pytest.fixture
def bucket(tmp_path):
    """upload(folder, url) puts a store into fsspec's memory, which is empty before and after."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()

    def upload(folder: Path, url: str = URL) -> None:
        for path in folder.iterdir():
            with fsspec.open(f"{url}/{path.name}", "wb") as file:
                file.write(path.read_bytes())

    yield upload
    memory.store.clear()


@pytest.fixture
def local(tmp_path) -> Path:
    """Four shards of 14 images."""
    return write_packed(tmp_path / "local", fake_codes(), LABELS)


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the files that are fetched, manifests aside."""
    names, real = [], remote.fetch_file
    monkeypatch.setattr(remote, "fetch_file", lambda files, source, target, **rest: (
        names.append(target.name), real(files, source, target, **rest))[1])
    return names


def test_a_store_is_fetched_once_and_memory_mapped(bucket, local, fetched):
    bucket(local)
    store = open_stores(URL, corrupt="refuse")
    np.testing.assert_array_equal(every_code(store), fake_codes())
    np.testing.assert_array_equal(store.labels, LABELS)
    assert (store.packed, store.folder.parent) == (True, codes_cache())
    assert sorted(fetched) == ["labels.npy", *(f"shard-0000{i}.npy" for i in range(4))]
    fetched.clear()
    again = open_stores(f"{URL}/")
    assert again.folder == store.folder
    assert not fetched
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_below_the_url_only_the_named_folder_is_tried(bucket, local):
    bucket(local, f"{URL}/imagenet16_codes")
    assert len(open_stores(URL, subfolder="imagenet16_codes")) == 14
    for subfolder, said in ((None, "holds no manifest.json: give the URL of a packed store"),
                            ("imagenet32_codes", "holds no manifest.json, nor does imagenet32_codes in it")):
        with pytest.raises(FileNotFoundError, match=said):
            open_stores(URL, subfolder=subfolder)


def test_file_urls_and_folders_may_be_mixed(bucket, local, tmp_path):
    bucket(local)
    old = write_llamagen(tmp_path / "old", fake_codes(seed=1), LABELS)
    both = open_stores(f"{URL},{old},file://{local}")
    assert (both.views, both.packed) == (30, False)
    np.testing.assert_array_equal(every_code(both), np.concatenate([fake_codes(), fake_codes(seed=1), fake_codes()], 1))
    assert len(open_stores(f"{local},{URL}", weights=(1.0, 0.5))) == 21


def test_files_of_an_older_version_are_not_taken_for_new_ones(bucket, local, tmp_path):
    bucket(local)
    old = open_stores(URL)
    codes = fake_codes()
    codes[:4] += 1  # the first shard alone
    codes %= 256
    bucket(write_packed(tmp_path / "newer", codes, LABELS))
    new = open_stores(URL)
    np.testing.assert_array_equal(every_code(new), codes)
    np.testing.assert_array_equal(every_code(old), fake_codes())  # a run that has it open goes on


def test_a_cut_connection_names_the_file_and_keeps_what_came(bucket, local, fetched, monkeypatch):
    bucket(local)
    kind = type(fsspec.filesystem("memory"))
    real = kind.open

    class Cut(io.BytesIO):
        def read(self, *size):
            if self.tell():
                raise RuntimeError("Connection reset by peer\nsecond line")
            return super().read(100)

    def cut_open(self, path, mode="rb", **rest):
        return Cut(real(self, path, mode, **rest).read()) if path.endswith("00002.npy") else \
            real(self, path, mode, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "THREADS", 1)
        patch.setattr(kind, "open", cut_open)
        with pytest.raises(OSError, match=r"^memory://.*/shard-00002\.npy cannot be fetched \(Connection reset by peer"
                                          r"\); run it again to go on, .* keeps what has come$"):
            open_stores(URL, corrupt="skip")  # nothing that the shard can help
    assert not list(codes_cache().glob("*/shard-00002*"))
    assert not list(codes_cache().glob("*/.*"))
    fetched.clear()
    np.testing.assert_array_equal(every_code(open_stores(URL)), fake_codes())
    assert "shard-00002.npy" in fetched
    assert "shard-00000.npy" not in fetched


def test_what_does_not_fit_its_hash_is_refused_or_skipped(bucket, local, capsys):
    flip_byte(local / "shard-00001.npy")
    bucket(local)
    fsspec.filesystem("memory").rm(f"{URL}/shard-00003.npy")
    with pytest.raises(ValueError, match=r"shard-00001\.npy has SHA-256 .* its manifest says .*shard-00003\.npy is "
                                         rf"missing: upload {URL} again, or go on without by --corrupt-shards skip"):
        open_stores(URL)
    store = open_stores(URL, corrupt="skip")
    left = [*range(4), *range(8, 12)]
    np.testing.assert_array_equal(every_code(store), fake_codes()[left])
    assert "6 of 14 images are left out" in capsys.readouterr().err
    assert not (store.folder / "shard-00001.npy").exists()


def test_labels_that_do_not_fit_are_refused(bucket, local):
    flip_byte(local / "labels.npy")
    bucket(local)
    with pytest.raises(ValueError, match=rf"labels\.npy has SHA-256 .*: upload {URL} again$"):
        open_stores(URL, corrupt="skip")


def test_a_copy_that_was_spoilt_in_the_cache_is_named(bucket, local):
    bucket(local)
    folder = open_stores(URL).folder
    flip_byte(folder / "shard-00001.npy")
    with pytest.raises(ValueError, match=rf"shard-00001\.npy has changed .*: remove {folder}, a copy"):
        open_stores(URL, corrupt="refuse")


def test_several_processes_may_fetch_at_once(local, monkeypatch):
    together, real = threading.Barrier(4), remote.find_manifest
    monkeypatch.setattr(remote, "find_manifest", lambda *args, **rest: (together.wait(30), real(*args, **rest))[1])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: every_code(open_stores(f"file://{local}")), range(4)))
    for codes in found:
        np.testing.assert_array_equal(codes, fake_codes())


@pytest.mark.processes
def test_two_processes_share_the_work_and_skip_alike(local, tmp_path):
    """Each fetches and hashes every second file; both leave out what either found."""
    flip_byte(local / "shard-00001.npy")
    flip_byte(local / "shard-00002.npy")
    two_processes([], tmp_path, setup=f"""
from dataset import code_check, remote
from dataset.codes import open_stores
process = dist.setup()
said, fetch, file_hash = [], remote.fetch_file, code_check.file_hash
code_check.file_hash = lambda path: said.append("hashed " + path.stem) or file_hash(path)
store = open_stores({str(local)!r}, corrupt="skip")
said.append(store.labels.tolist())
remote.fetch_file = lambda files, source, target, **rest: (said.append("fetched " + target.stem),
                                                      fetch(files, source, target, **rest))[1]
store = open_stores("file://{local}", corrupt="skip")
said.append(store.labels.tolist())
open({str(tmp_path)!r} + f"/rank{{process.rank}}", "w").write(json.dumps(said))
""")
    left = LABELS[[*range(4), 12, 13]].tolist()
    for rank, hashed, fetched in ((0, [0, 2, "labels"], ["labels", 1, 3]), (1, [1, 3], [0, 2])):
        said = json.loads((tmp_path / f"rank{rank}").read_text())
        stems = ([name if name == "labels" else f"shard-0000{name}" for name in part] for part in (hashed, fetched))
        hashed, fetched = ([f"{verb} {stem}" for stem in part]
                           for verb, part in zip(("hashed", "fetched"), stems, strict=True))
        assert said[:len(hashed) + 1] == [*hashed, left]
        assert sorted(said[len(hashed) + 1:][:len(fetched)]) == sorted(fetched)
        assert said[-1] == left


@pytest.mark.parametrize(("url", "said"), [
    ("s3://bucket/codes", "--code-path s3://bucket/codes: s3:// needs s3fs: pip install s3fs"),
    ("nonsense://bucket", "--code-path nonsense://bucket: Protocol not known: nonsense"),
])
def test_what_fsspec_lacks_is_named(url, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SystemExit) as caught:
        call("verify", "--code-path", url)
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_manifest_cannot_name_files_elsewhere(bucket, local, tmp_path):
    manifest = json.loads((local / "manifest.json").read_text())
    manifest["shards"][1]["file"] = "../../shard.npy"
    (local / "manifest.json").write_text(json.dumps(manifest))
    bucket(local)
    with pytest.raises(ValueError, match=r"names the file '\.\./\.\./shard\.npy', expected one beside it"):
        open_stores(URL)


def test_the_commands_take_urls(bucket, local, capsys):
    bucket(local)
    call("verify", "--code-path", URL)
    assert "14 images, 10 views of 4x4 codes, 3 classes: sound" in capsys.readouterr().out
