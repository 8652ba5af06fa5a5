"""The Inception network against ADM's graph and public libraries; its four kinds of weights file."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluations.c2i import inception_weights
from evaluations.c2i.inception import FIDInception, resize_tf1
from evaluations.c2i.inception_weights import BLOCKS, STEM, load_inception
from tests.conftest import ROOT

DATA = ROOT / "tests" / "data" / "evaluation"
sys.path.insert(0, str(DATA))
import recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The random weights that the fixtures were made with."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in FIDInception().state_dict().items()}
    assert len(shapes) == 566
    return {name: torch.from_numpy(np.asarray(value))
            for name, value in recipe.random_inception_state(shapes).items()}


@pytest.fixture(scope="module")
def network(state) -> FIDInception:
    model = FIDInception()
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def pixels(size: int) -> torch.Tensor:
    with np.load(DATA / "inception_rand.npz") as fixture:
        return torch.from_numpy(fixture[f"img_{size}"]).permute(0, 3, 1, 2).float()


def test_resize_is_tensorflows_bit_for_bit():
    with np.load(DATA / "resize_tf1.npz") as fixture:
        for i in range(5):
            source, wanted = fixture[f"in_{i}"], fixture[f"out_{i}"]
            made = resize_tf1(torch.from_numpy(source).permute(0, 3, 1, 2).float(), wanted.shape[1:3])
            assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), wanted)
    same = torch.rand(1, 3, 299, 299)
    assert resize_tf1(same) is same


@pytest.mark.parametrize("size", [64, 256, 384])
def test_features_are_those_of_adms_graph(network, size):
    pooled, spatial = network(resize_tf1(pixels(size)))
    probabilities = network.logits(pooled).softmax(1)
    with np.load(DATA / "inception_rand.npz") as fixture:
        for name, made in (("pool", pooled), ("spatial", spatial), ("softmax", probabilities)):
            wanted = fixture[f"{name}_{size}"]
            assert made.shape == wanted.shape
            assert np.linalg.norm(made.numpy() - wanted) < 2e-5 * np.linalg.norm(wanted), name


def test_features_are_those_of_pytorch_fid(network, state):
    """Their network on our resized and normalised input: an oracle beside the fixtures."""
    from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception_v3

    other = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, block in (("Mixed_5b", FIDInceptionA(192, 32)), ("Mixed_5c", FIDInceptionA(256, 64)),
                        ("Mixed_5d", FIDInceptionA(288, 64)), ("Mixed_6b", FIDInceptionC(768, 128)),
                        ("Mixed_6c", FIDInceptionC(768, 160)), ("Mixed_6d", FIDInceptionC(768, 160)),
                        ("Mixed_6e", FIDInceptionC(768, 192)), ("Mixed_7b", FIDInceptionE_1(1280)),
                        ("Mixed_7c", FIDInceptionE_2(2048))):
        setattr(other, name, block)
    other.load_state_dict(state)
    other.fc = nn.Identity()
    x = resize_tf1(pixels(64)[:2])
    with torch.inference_mode():
        wanted = other.eval()((x - 128) / 128)
    made, _ = network(x)
    assert torch.linalg.norm(made - wanted) < 1e-5 * torch.linalg.norm(wanted)


def tensorflow_arrays(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same weights under the graph's names, convolutions as (h, w, in, out)."""
    scopes = STEM | {f"{scope}/{inner}": f"{module}.{branch}" for scope, (module, block) in BLOCKS.items()
                     for inner, branch in block.items()}
    assert len(scopes) == 94
    found = {"softmax/weights": state["fc.weight"].T.numpy(), "softmax/biases": state["fc.bias"].numpy()}
    for scope, module in scopes.items():
        found[f"{scope}/conv2d_params"] = state[f"{module}.conv.weight"].permute(2, 3, 1, 0).numpy()
        for key, name in (("beta", "bias"), ("moving_mean", "running_mean"), ("moving_variance", "running_var")):
            found[f"{scope}/batchnorm/{key}"] = state[f"{module}.bn.{name}"].numpy()
        found[f"{scope}/batchnorm/gamma"] = np.full(len(state[f"{module}.bn.bias"]), 7, np.float32)  # without effect
    return found


def test_name_map_is_the_published_one():
    """Pairs written out by hand, where branches have the same shapes and an exchange would load."""
    for scope, name in {
            "mixed/tower_1/conv_2": "Mixed_5b.branch3x3dbl_3", "mixed_2/tower_2/conv": "Mixed_5d.branch_pool",
            "mixed_3/tower/conv": "Mixed_6a.branch3x3dbl_1", "mixed_4/tower/conv_1": "Mixed_6b.branch7x7_2",
            "mixed_6/conv": "Mixed_6d.branch1x1", "mixed_7/tower_1/conv_1": "Mixed_6e.branch7x7dbl_2",
            "mixed_7/tower_1/conv_3": "Mixed_6e.branch7x7dbl_4", "mixed_7/tower_1/conv_4": "Mixed_6e.branch7x7dbl_5",
            "mixed_8/tower/conv": "Mixed_7a.branch3x3_1", "mixed_8/tower_1/conv": "Mixed_7a.branch7x7x3_1",
            "mixed_9/tower/mixed/conv": "Mixed_7b.branch3x3_2a", "mixed_10/tower/mixed/conv_1": "Mixed_7c.branch3x3_2b",
            "mixed_9/tower_1/mixed/conv": "Mixed_7b.branch3x3dbl_3a",
            "mixed_10/tower_1/conv_1": "Mixed_7c.branch3x3dbl_2",
            "mixed_10/tower_2/conv": "Mixed_7c.branch_pool"}.items():
        block, inner = scope.split("/", 1)
        module, branches = BLOCKS[block]
        assert f"{module}.{branches[inner]}" == name
    assert list(STEM.values()) == ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]


def write_graph(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A GraphDef with the arrays as constants; small ones as lists of floats, equal ones as a single float."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    graph.node.add(name="ExpandDims", op="Placeholder")
    for name, value in arrays.items():
        node = graph.node.add(name=name, op="Const")
        tensor = node.attr["value"].tensor
        tensor.dtype = 1
        for size in value.shape:
            tensor.tensor_shape.dim.add(size=size)
        if "gamma" in name:
            tensor.float_val.append(float(value[0]))
        elif "beta" in name:
            tensor.float_val.extend(value.tolist())
        else:
            tensor.tensor_content = np.ascontiguousarray(value).tobytes()
    path.write_bytes(graph.SerializeToString())
    return path


class Node(nn.Module):
    """A place in NVIDIA's tree of modules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_torchscript(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The tree of the published TorchScript: layers.mixed_6.tower_1.conv_2.weight, but layers.mixed_9.tower_conv.…"""
    root = Node()
    root.layers, root.output = Node(), Node()
    root.output.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(arrays["softmax/weights"].T)))
    root.output.bias = nn.Parameter(torch.from_numpy(arrays["softmax/biases"]))
    names = {"beta": "beta", "moving_mean": "mean", "moving_variance": "var", "conv2d_params": "weight"}
    for name, value in arrays.items():
        scope, _, kind = name.replace("/batchnorm", "").rpartition("/")
        if scope == "softmax" or kind == "gamma":
            continue
        block, _, inner = scope.partition("/")
        parts = [block, inner.replace("/", "_")] if block in ("mixed_9", "mixed_10") else scope.split("/")
        place = root.layers
        for part in parts:
            if part not in dict(place.named_children()):
                place.add_module(part, Node())
            place = getattr(place, part)
        tensor = torch.from_numpy(np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value))
        setattr(place, names[kind], nn.Parameter(tensor)) if kind == "conv2d_params" else \
            place.register_buffer(names[kind], tensor)
    torch.jit.script(root).save(str(path))
    return path


def test_four_kinds_of_file_are_one_network(state, tmp_path, capsys, monkeypatch):
    plain = {name: value for name, value in state.items() if "num_batches" not in name}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "zip.pth")
    torch.save(plain, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    arrays = tensorflow_arrays(state)
    files = {"zip.pth": "state dict", "old.pth": "state dict",
             write_graph(tmp_path / "graph.dat", arrays).name: "ADM GraphDef",
             write_torchscript(tmp_path / "script.dat", arrays).name: "NVIDIA TorchScript"}
    for name, kind in files.items():
        model, described = load_inception(tmp_path / name, device=CPU)
        assert described["format"] == kind and described["known"] == "no" and len(described["sha256"]) == 64
        assert "none of the published Inception files" in capsys.readouterr().err
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        loaded = model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in plain.items() if key != "fc.bias"), name
    monkeypatch.setitem(inception_weights.KNOWN, described["sha256"], "ours")
    monkeypatch.setenv(inception_weights.VARIABLE, str(tmp_path / "script.dat"))
    assert load_inception(None, device=CPU)[1]["known"] == "ours"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("write", "says"), [
    (lambda path, state: None, "no Inception weights at"),
    (lambda path, state: path.write_bytes(b"\x1f\x8b" + bytes(64)), "unpack it"),
    (lambda path, state: path.write_bytes(b"\x0a\xff\xff\xff"), "is damaged"),
    (lambda path, state: path.write_bytes(b"PK" + bytes(64)), "is damaged"),
    (lambda path, state: path.write_bytes(b"\x80\x02cos\nsystem\nU\x04echoq\x00."), "would run code"),
    (lambda path, state: write_graph(path, {"conv/conv2d_params": np.zeros((1, 1, 1, 1), np.float32)}),
     "is not the Inception network"),
    (lambda path, state: torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path), "fc.weight is (1000, 2048"),
    (lambda path, state: torch.save({k: v for k, v in state.items() if k != "fc.bias"}, path), "missing fc.bias"),
    (lambda path, state: torch.save({**state, "AuxLogits.fc.weight": torch.zeros(1)}, path), "unexpected AuxLogits"),
])
def test_other_files_are_refused(state, tmp_path, write, says):
    path = tmp_path / "weights"
    write(path, state)
    with pytest.raises((ValueError, FileNotFoundError), match=says.replace("(", r"\(").replace(")", r"\)")):
        load_inception(path, device=CPU)


def test_without_weights_it_is_said_where_they_are(monkeypatch):
    monkeypatch.delenv(inception_weights.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=r"--inception FILE or set LLAMAGEN_INCEPTION.*pytorch-fid.*NVIDIA"):
        load_inception(None, device=CPU)
