"""Files are written whole or not at all, and others may read them."""
import pytest

from utils.files import replacing, sweep


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    with replacing(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_text(2)
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["notes.txt"]
    assert path.stat().st_mode & 0o777 == 0o644  # temporary files are for their owner alone


def test_what_killed_writers_left_is_swept(tmp_path):
    (tmp_path / ".a.tmp").mkdir()
    (tmp_path / ".a.tmp" / "part").touch()
    for name in (".b.tmp", ".hidden", "c.tmp", "d"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".hidden", "c.tmp", "d"]
