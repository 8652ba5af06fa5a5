"""Reads any of the four published files of the 2015 Inception weights; which one it is, its content decides.

pytorch-fid's and torch-fidelity's state dict, NVIDIA's TorchScript, and the GraphDef of ADM's evaluator, which is read
without TensorFlow: the tensorboard package brings its message format. Nothing is ever downloaded.
"""
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evaluations.c2i.inception import FIDInception
from utils import cli, files
from utils.checkpoints import containers
from utils.checkpoints.damage import WRONG_CONTENT
from utils.cli import flag
from utils.files import few, first_line, what_it_is

VARIABLE = "LLAMAGEN_INCEPTION"
GRAPH = "ADM GraphDef"
WHERE = f"""give --inception FILE or set {VARIABLE}; any one of: \
https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth \
(pytorch-fid), weights-inception-2015-12-05-6726825d.pth (torch-fidelity), \
https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt (NVIDIA), \
classify_image_graph_def.pb from http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz (ADM)"""
KNOWN = {  # sha256 (md5 of the GraphDef, whose sha256 was never published): whose file it is
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pytorch-fid and torch-fidelity",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "NVIDIA",
    "e6bb154e85f5d4331c22abcddb5dcf31": "ADM",
}

# TensorFlow's scopes → torchvision's modules; inside a block its convolutions.
STEM = {"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1",
        "conv_4": "Conv2d_4a_3x3"}
BLOCK_A = {"conv": "branch1x1", "tower/conv": "branch5x5_1", "tower/conv_1": "branch5x5_2",
           "tower_1/conv": "branch3x3dbl_1", "tower_1/conv_1": "branch3x3dbl_2", "tower_1/conv_2": "branch3x3dbl_3",
           "tower_2/conv": "branch_pool"}
BLOCK_B = {"conv": "branch3x3", "tower/conv": "branch3x3dbl_1", "tower/conv_1": "branch3x3dbl_2",
           "tower/conv_2": "branch3x3dbl_3"}
BLOCK_C = {"conv": "branch1x1", "tower/conv": "branch7x7_1", "tower/conv_1": "branch7x7_2",
           "tower/conv_2": "branch7x7_3", "tower_1/conv": "branch7x7dbl_1", "tower_1/conv_1": "branch7x7dbl_2",
           "tower_1/conv_2": "branch7x7dbl_3", "tower_1/conv_3": "branch7x7dbl_4", "tower_1/conv_4": "branch7x7dbl_5",
           "tower_2/conv": "branch_pool"}
BLOCK_D = {"tower/conv": "branch3x3_1", "tower/conv_1": "branch3x3_2", "tower_1/conv": "branch7x7x3_1",
           "tower_1/conv_1": "branch7x7x3_2", "tower_1/conv_2": "branch7x7x3_3", "tower_1/conv_3": "branch7x7x3_4"}
BLOCK_E = {"conv": "branch1x1", "tower/conv": "branch3x3_1", "tower/mixed/conv": "branch3x3_2a",
           "tower/mixed/conv_1": "branch3x3_2b", "tower_1/conv": "branch3x3dbl_1", "tower_1/conv_1": "branch3x3dbl_2",
           "tower_1/mixed/conv": "branch3x3dbl_3a", "tower_1/mixed/conv_1": "branch3x3dbl_3b",
           "tower_2/conv": "branch_pool"}
BLOCKS = {"mixed": ("Mixed_5b", BLOCK_A), "mixed_1": ("Mixed_5c", BLOCK_A), "mixed_2": ("Mixed_5d", BLOCK_A),
          "mixed_3": ("Mixed_6a", BLOCK_B), "mixed_4": ("Mixed_6b", BLOCK_C), "mixed_5": ("Mixed_6c", BLOCK_C),
          "mixed_6": ("Mixed_6d", BLOCK_C), "mixed_7": ("Mixed_6e", BLOCK_C), "mixed_8": ("Mixed_7a", BLOCK_D),
          "mixed_9": ("Mixed_7b", BLOCK_E), "mixed_10": ("Mixed_7c", BLOCK_E)}


@dataclass(kw_only=True)
class InceptionFlags:
    """The Inception network."""

    shapes_run: ClassVar[bool] = False
    inception: str | None = flag(None, f"file with the Inception weights of 2015-12-05; None: ${VARIABLE}")


def load_inception(path: str | Path | None, *, device: torch.device) -> tuple[FIDInception, dict[str, str]]:
    """The network in eval mode, and {"file", "format", "sha256", "known", "weights_sha256"} of its weights file.

    The last is a hash of the values, the same for every format of the same weights.

    Raises FileNotFoundError with where to get the weights, ValueError for a file that does not hold them.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise FileNotFoundError(f"the Inception weights are missing: {WHERE}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}: {WHERE}")
    kind, state = read_weights(path)
    state = {name.removeprefix("module.").removeprefix("model."): value.float() for name, value in state.items()
             if not name.endswith("num_batches_tracked")}
    with torch.device("meta"):
        network = FIDInception()
    network.to_empty(device="cpu")
    state |= {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    containers.load_strict(network, state, path)
    described = {"file": path.name, "format": kind, "sha256": files.file_hash(path)}
    digest = hashlib.md5(path.read_bytes()).hexdigest() if kind == GRAPH else described["sha256"]
    described["known"] = KNOWN.get(digest, "no")
    if digest not in KNOWN:
        cli.warn(f"{path} (sha256 {described['sha256'][:12]}…) is none of the published Inception files: the "
                 "numbers compare with each other, but not with published ones")
    described["weights_sha256"] = weights_hash(network)
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last), described


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over a network's state."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(kind of file, state dict in torchvision's names), decided by what the file holds."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed: unpack it (tar xzf) and give classify_image_graph_def.pb")
    if start[:1] == b"\x0a":
        return GRAPH, from_tensorflow(dict(graph_constants(path)), path)
    if start == b"PK" and is_torchscript(path):
        return "NVIDIA TorchScript", from_tensorflow(torchscript_state(path), path)
    return "state dict", containers.weights(containers.read(path), path)


def is_torchscript(path: Path) -> bool:
    """Whether a zip file holds a TorchScript program rather than a state dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is damaged: a zip file without its end") from None


def load_torchscript(path: str | Path) -> torch.jit.ScriptModule:
    """A TorchScript program on the CPU. Raises ValueError for a damaged file. (TorchScript cannot call Python.)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, the published files are not
            return torch.jit.load(str(path), map_location="cpu")
    except (*WRONG_CONTENT, MemoryError) as error:
        found = what_it_is(path)
        reason = first_line(error)[:200] if found is None or "zip archive" in found else f"it is {found}"
        raise ValueError(f"{path} cannot be read as TorchScript: {reason}") from None


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """NVIDIA's weights in the form of `graph_constants`."""
    state = {}
    for name, value in load_torchscript(path).state_dict().items():
        scope, _, kind = name.rpartition(".")
        if scope.startswith("layers."):
            kind = {"weight": "conv2d_params", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}.get(
                kind, kind)
            state[f"{scope.removeprefix('layers.')}/{'' if kind == 'conv2d_params' else 'batchnorm/'}{kind}"] = value
        elif scope == "output":
            state[f"softmax/{'weights' if kind == 'weight' else 'biases'}"] = value
    return state


def graph_constants(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(node name, value) of the float constants in a GraphDef, convolutions as (out, in, h, w)."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ValueError(f"{path} is damaged: it starts like a GraphDef, but cannot be read to its end") from None
    for node in graph.node:
        tensor = node.attr["value"].tensor if node.op == "Const" else None
        if tensor is None or tensor.dtype != 1:  # DT_FLOAT
            continue
        shape = [dimension.size for dimension in tensor.tensor_shape.dim]
        values = np.frombuffer(tensor.tensor_content, "<f4") if tensor.tensor_content else \
            np.asarray(tensor.float_val, "<f4")
        count = int(np.prod(shape))
        if len(values) not in (1, count):  # a single value stands for all
            raise ValueError(f"{path} is damaged: {node.name} has {len(values)} values, expected {count}")
        value = torch.from_numpy(np.broadcast_to(values, count).reshape(shape).copy())
        yield node.name, value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value


def from_tensorflow(constants: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weights under TensorFlow's names → under torchvision's. Scales of the BatchNorms are one: the graph has none.

    Separators are not compared: NVIDIA writes a scope's parts with dots, in the last two blocks with underscores.
    """
    def plain(name: str) -> str:
        return name.replace("/", "_").replace(".", "_")

    found = {plain(name): value for name, value in constants.items()}
    convolutions = STEM | {f"{scope}/{inner}": f"{module}.{branch}" for scope, (module, block) in BLOCKS.items()
                           for inner, branch in block.items()}
    wanted = {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
    for scope, module in convolutions.items():
        wanted[f"{module}.conv.weight"] = f"{scope}/conv2d_params"
        wanted[f"{module}.bn.bias"] = f"{scope}/batchnorm/beta"
        wanted[f"{module}.bn.running_mean"] = f"{scope}/batchnorm/moving_mean"
        wanted[f"{module}.bn.running_var"] = f"{scope}/batchnorm/moving_variance"
    missing = [name for name in wanted.values() if plain(name) not in found]
    if missing:
        raise ValueError(f"{source} is not the Inception network of 2015-12-05: it has no {few(missing)}")
    state = {name: found[plain(scope)] for name, scope in wanted.items()}
    state |= {f"{module}.bn.weight": torch.ones(len(state[f"{module}.bn.bias"])) for module in convolutions.values()}
    if state["fc.weight"].shape[0] == 2048:
        state["fc.weight"] = state["fc.weight"].T.contiguous()
    return state

