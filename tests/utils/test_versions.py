"""Old versions of torch are refused in one line; what differs between those that are not."""
import re
from dataclasses import dataclass

import pytest
import torch

from tests.conftest import ROOT
from utils import cli, dist


@dataclass(kw_only=True)
class Flags:
    """Those of a command."""

    size: int = cli.flag(1, "a number")


@pytest.mark.parametrize("version", ["1.13.1", "2.6.0+cu124", "2.7.1"])
def test_an_old_torch_is_refused_in_one_line(version, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda config: pytest.fail("it ran"), Flags, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (f"error: torch 2.8 or newer is needed, this is {version}: "
                                       "pip install --upgrade torch torchvision\n")


@pytest.mark.parametrize("version", ["2.8.0+cu128", "2.8.0a0+5228986c39.nv25.06", "2.10.0", "3.0.0"])
def test_others_are_not(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    ran = []
    cli.run(ran.append, Flags, [])
    assert ran


def test_installing_takes_what_the_commands_take():
    """And newer versions are not kept away."""
    required = re.findall(r"^torch\b(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert required == [">=" + ".".join(map(str, cli.OLDEST_TORCH))]


@pytest.mark.parametrize(("device", "splits", "bound"), [
    ("cuda:1", True, torch.device("cuda:1")), ("cuda:1", False, None), ("cpu", True, None)])
def test_a_process_group_knows_its_gpu(device, splits, bound, monkeypatch):
    """With torch 2.8 it must not: hsdp's groups could not be made."""
    given = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **others: given.update(others))
    monkeypatch.setattr(torch.distributed, "ProcessGroup",
                        type("ProcessGroup", (), {"split_group": None} if splits else {}))
    dist.join_alone(torch.device(device))
    assert given["device_id"] == bound
