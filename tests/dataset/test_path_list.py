"""Paths as bytes: every name comes back; loading processes that are started afresh get them through shared memory."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataset import image_folders
from dataset.path_list import PathList
from tests.conftest import ROOT, write_images

NAMES = ["a.png", "", "ünïcode €.jpg", "x" * 200, "b/c/d.png", os.fsdecode(b"\xff\xfe.png"), "line\nbreak"]


@pytest.mark.parametrize("root", ["", "/data/my images/", "é/"])
def test_names_come_back(root):
    paths = PathList.of(root, [NAMES[:3], [], NAMES[3:]])
    assert [paths.name(i) for i in range(len(paths))] == [root + name for name in NAMES]
    assert list(paths) == [Path(root + name) for name in NAMES]
    for index in (-1, len(NAMES)):
        with pytest.raises(IndexError):
            paths[index]
    assert len(PathList.of(root, [])) == 0


def test_a_data_set_holds_bytes(image_folder):
    data = image_folders.class_tree(image_folder)
    assert data.files.names.dtype.itemsize * len(data.files.names) == sum(
        len(str(path.relative_to(image_folder))) for path in data.files)
    assert [data.name(i) for i in range(36)] == [str(path) for path in data.files]


def test_files_are_in_the_order_of_paths(tmp_path, monkeypatch):
    names = ["a/x.png", "a-b/x.png", "a.png", "a/b/c.png", "B.png", "a/b.png", "a b/é.png", "z/q.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    wanted = sorted(tmp_path / name for name in names)
    assert list(image_folders.flat_folder(tmp_path).files) == image_folders.scan(tmp_path) == wanted
    monkeypatch.chdir(tmp_path)
    for root in (".", "./", "a/.."):
        assert [Path(path).resolve() for path in image_folders.flat_folder(root).files] == wanted
    assert image_folders.flat_folder(".").name(0) == str(wanted[0].relative_to(tmp_path))
    (tmp_path / "z").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path.parent / "elsewhere", target_is_directory=True)
    assert tmp_path / "link" / "q.jpg" in image_folders.scan(tmp_path)


STARTED_AFRESH = """
import io, multiprocessing, sys
import numpy as np
from torch.utils.data import DataLoader

def main():
    from autoregressive.train.extract_codes import ClassViews, ExtractFlags
    from dataset.image_folders import ImageFiles, class_tree
    from dataset.loader import TrainImages
    from dataset.path_list import PathList

    real = class_tree(sys.argv[1])
    count = 100_000  # the real images again and again, then names that are never read
    names = [real.name(i % 36) for i in range(200)] + [f"{'n' * 50}/{i:08d}.JPEG" for i in range(count)]
    data = ImageFiles(PathList.of("", [names]), np.zeros(len(names), np.int64))
    flags = ExtractFlags(data_path=sys.argv[1], code_path="", vq_ckpt="", image_size=(16, 16))
    sizes, dump = [], multiprocessing.reduction.dump

    def measured(process, file, protocol=None):
        dump(process, file, protocol)
        sizes.append(file.tell())

    multiprocessing.reduction.dump = measured
    view = ClassViews(data, flags, 1.0)
    loaded = DataLoader(view, batch_sampler=[[0, 150], [7]], num_workers=1, multiprocessing_context="forkserver",
                        collate_fn=list)
    for (index, (ours, _)), key in zip([pair for batch in loaded for pair in batch], [0, 150, 7], strict=True):
        assert index == key and np.array_equal(ours, view[key][1][0])
    train = TrainImages(data, (16, 16), seed=0)
    dump(train, file := io.BytesIO())
    assert max(*sizes, file.tell()) < 20_000, (sizes, file.tell())
    assert len(sizes) == 2, sizes  # what the process is to do, and with what

if __name__ == "__main__":
    main()
"""


@pytest.mark.processes
def test_processes_that_are_started_afresh_share_the_names(tmp_path):
    """Python 3.14 starts workers so; 100,000 names are 6 MB, of which no worker is sent any."""
    (tmp_path / "afresh.py").write_text(STARTED_AFRESH)
    command = [sys.executable, str(tmp_path / "afresh.py"), str(write_images(tmp_path / "images"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_parts_of_an_extraction_share_their_workers(image_folder, monkeypatch):
    """It was a new pool of processes for each shard."""
    from autoregressive.train import extract_codes, extraction

    made, real = [], extraction.DataLoader
    monkeypatch.setattr(extraction, "DataLoader", lambda *args, **rest: (made.append(rest), real(*args, **rest))[1])
    monkeypatch.setattr("dataset.loader.os.cpu_count", lambda: 2)
    flags = extract_codes.ExtractFlags(data_path=str(image_folder), code_path="", vq_ckpt="", image_size=(16, 16))
    parts = [range(0, 10), range(20, 27), range(27, 28)]
    data = extract_codes.ClassViews(image_folders.class_tree(image_folder), flags, 1.0)
    found = [[[index for index, _ in batch] for batch in batches]
             for batches in extraction.part_batches(data, parts, size=4, num_workers=2)]
    assert found == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [[20, 21, 22, 23], [24, 25, 26]], [[27]]]
    assert [rest["num_workers"] for rest in made] == [2]
    assert not list(extraction.part_batches(data, [], size=4, num_workers=2))
    assert len(made) == 1
