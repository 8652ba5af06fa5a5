"""What a pickle names is found without loading it, in every format that torch, pickle and numpy write."""
import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from utils.pickles import names_in_pickles, suspicious_names, why_no_array


class Evil:
    """Loading it creates a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


class Harmless:
    """Nothing but a class that nobody else knows."""


WRITERS = {
    "torch": lambda content, path: torch.save(content, path),
    "torch's old format": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "torch, protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    **{f"pickle, protocol {number}": lambda content, path, number=number: path.write_bytes(
        pickle.dumps(content, protocol=number)) for number in range(6)},
}


@pytest.mark.parametrize("how", WRITERS)
def test_what_would_run_is_named_in_the_depth_of_any_container(how, tmp_path):
    path, proof = tmp_path / "x.pt", tmp_path / "ran"
    WRITERS[how]({"model": {"a": torch.ones(3)}, "args": [{"b": (Harmless(), Evil(proof))}, Harmless()]}, path)
    assert suspicious_names(path) == ["tests.utils.test_pickles.Harmless", "os.system"]
    WRITERS[how](eval, path)
    assert suspicious_names(path) == ["builtins.eval"]
    assert not proof.exists()


@pytest.mark.parametrize("how", WRITERS)
def test_tensors_and_plain_values_are_not_named(how, tmp_path):
    path = tmp_path / "x.pt"
    WRITERS[how]({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.Size([2]), "c": np.ones(3), "d": {1, 2},
                  "e": torch.nn.Parameter(torch.ones(1)), "f": torch.float16, "g": "os.system", "h": 1.5}, path)
    assert suspicious_names(path) == []


@pytest.mark.parametrize("content", [torch.nn.Linear(2, 2), torch.load, np.load], ids=["module", "load", "np.load"])
def test_torch_and_numpy_have_code_too(content, tmp_path):
    torch.save({"model": content}, tmp_path / "x.pt")
    assert len(suspicious_names(tmp_path / "x.pt")) >= 1


@pytest.mark.parametrize("text", ["count\n1\n", "cat\nsystem\n", "initial\nvalue\n", "hello", "", "<html>"])
def test_a_text_names_nothing(text):
    assert names_in_pickles(io.BytesIO(text.encode())) == []


def test_damage_is_no_error(tmp_path):
    path, dice = tmp_path / "x.pt", random.Random(0)
    torch.save({"a": Harmless(), "b": torch.ones(9)}, path)
    whole = path.read_bytes()
    for _ in range(200):
        spoilt = bytearray(whole[:dice.randrange(len(whole))] if dice.random() < 0.3 else whole)
        if spoilt:
            spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
        path.write_bytes(spoilt)
        assert all("\n" not in name for name in suspicious_names(path))


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_objects_in_arrays_are_named(ending, tmp_path):
    path, proof = tmp_path / f"x.{ending}", tmp_path / "ran"
    array = np.array([Evil(proof), None], dtype=object)
    np.save(path, array) if ending == "npy" else np.savez(path, first=np.ones(3), second=array)
    assert suspicious_names(path) == ["os.system"]
    assert "os.system" in why_no_array(path, ValueError("objects"))
    assert not proof.exists()
    with pytest.raises(ValueError):  # noqa: PT011 (numpy itself refuses)
        np.load(path)["second"] if ending == "npz" else np.load(path)


def test_numbers_are_not_read_as_a_pickle(tmp_path):
    np.save(tmp_path / "x.npy", np.frombuffer(pickle.dumps(os.system), np.uint8))
    assert suspicious_names(tmp_path / "x.npy") == []


def test_a_name_can_do_nothing_to_a_terminal(tmp_path):
    evil = b"\x80\x02cmod\x1b[31m\nEv\x07il\n."
    (tmp_path / "x.pkl").write_bytes(evil)
    assert suspicious_names(tmp_path / "x.pkl") == [r"mod\x1b[31m.Ev\x07il"]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", evil)
    assert suspicious_names(tmp_path / "x.pt") == [r"mod\x1b[31m.Ev\x07il"]
