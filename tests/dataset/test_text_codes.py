"""LlamaGen's codes of captioned pictures: a numbered file for each line of .jsonl files."""
import fsspec
import numpy as np
import pytest

from dataset import code_index
from dataset.codes import CodeBatches
from dataset.text_codes import holds_codes, open_text_codes
from tests.dataset.captioned import caption, write_jsonl, write_tars
from tests.dataset.codes import every_code, fake_codes

pytestmark = pytest.mark.usefixtures("own_cache")
CODES = fake_codes(7, views=1)


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data")


@pytest.fixture
def code_folder(tmp_path):
    """Codes (1, 1, 16) of 4 + 3 lines."""
    for i, codes in enumerate(CODES):
        folder = tmp_path / "codes" / f"part-{i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i % 4}.npy", codes[None])
    return tmp_path / "codes"


def test_codes_and_captions_of_the_lines(data, code_folder):
    store = open_text_codes(data, code_folder)
    np.testing.assert_array_equal(every_code(store), CODES)
    assert store.column("name", np.array([5, 0])) == ["part-1.jsonl:1", "part-0.jsonl:0"]
    assert store.column("caption", np.array([5, 0])) == [caption(5), caption(0)]
    assert store.column("short_caption", np.array([6])) == ["short 6"]
    assert (store.grid, store.views, store.labels.tolist(), store.num_classes) == ((4, 4), 1, [0] * 7, 1)
    assert len(open_text_codes(data, code_folder, part=(1, 1))) == 3
    batch = CodeBatches(store, vocab_size=256, seed=0, columns=("caption",)).__getitems__(np.array([[0, 3], [0, 1]]))
    assert batch["caption"] == [caption(3), caption(1)]


def test_pairs_without_codes_and_lines_that_are_none_are_left_out(data, code_folder, capsys):
    (code_folder / "part-0" / "1.npy").unlink()
    lines = (data / "part-0.jsonl").read_text().splitlines()
    (data / "part-0.jsonl").write_text("\n".join([lines[0], lines[1], "no json", lines[3]]))
    store = open_text_codes(data, code_folder)
    np.testing.assert_array_equal(every_code(store), CODES[[0, 3, 4, 5, 6]])
    assert store.column("caption", np.arange(5)) == [caption(i) for i in (0, 3, 4, 5, 6)]
    said = capsys.readouterr().err
    assert "1 of 6 pairs have no codes and are left out, such as part-0.jsonl:1: there is no " in said
    store.leave_out(np.array([0]))
    assert store.column("name", np.array([0])) == ["part-0.jsonl:3"]


def test_what_is_found_out_about_many_files_is_kept(data, code_folder, monkeypatch):
    monkeypatch.setattr(code_index, "INDEXED_FROM", 1)
    monkeypatch.setattr(code_index, "SETTLED", -1e9)
    whole = open_text_codes(data, code_folder)
    monkeypatch.setattr("dataset.text_codes.list_numbers", None)
    again = open_text_codes(data, code_folder)
    assert again.fingerprint() == whole.fingerprint() and len(again) == 7


def test_what_holds_no_codes_of_the_lines_is_refused(data, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has codes of none of the 7 pairs: expected .*part-0/0.npy and so on"):
        open_text_codes(data, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"--code-path .* is not a folder"):
        open_text_codes(data, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"belong to the lines of \.jsonl files"):
        open_text_codes(write_tars(tmp_path / "tars"), tmp_path / "empty")


@pytest.mark.parametrize(("url", "codes"), [
    ("memory://text/t2i256_codes", True), ("memory://text/archives", False), ("s3://bucket/00000.tar", False),
    ("https://server/{00000..00009}.TAR?signature=a.b", False)])
def test_urls_of_archives_are_pictures_also_with_a_signature(url, codes):
    files = fsspec.filesystem("memory")
    files.pipe_file("/text/t2i256_codes/manifest.json", b"{}")
    files.pipe_file("/text/archives/00000.tar", b"")
    assert holds_codes(url) == codes


def test_a_package_that_a_url_needs_is_named_with_the_flag(monkeypatch):
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (_ for _ in ()).throw(ImportError("no s3fs")))
    with pytest.raises(ValueError, match="--data-path s3://bucket/codes: s3:// needs s3fs"):
        holds_codes("s3://bucket/codes")
