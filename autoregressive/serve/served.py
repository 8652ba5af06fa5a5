"""Which models a server or a page offers: those of the command line, of a list, or of the quickstart.

A list (--models) is JSON; its entries have the names of flags, and what they leave out comes from the command line:

    [{"name": "emoji", "gpt-ckpt": "runs/quickstart/gpt", "vq-ckpt": "runs/quickstart/tokenizer", "cfg-scale": 2.0},
     {"name": "imagenet", "gpt-ckpt": "pretrained_models/c2i_L_256.pt", "vq-ckpt": "pretrained_models/vq_ds16_c2i.pt"}]
"""
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from autoregressive.models.registry import facts_of
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.prompts import TextSampleFlags
from autoregressive.serve.protocol import MOST_SCALE
from utils import cli
from utils.checkpoints import containers
from utils.cli import flag
from utils.files import few

QUICKSTART = Path("runs/quickstart")
QUICKSTART_MODELS = {  # folder: name, and how the quickstart draws with it
    "gpt": ("emoji-gpt", {"cfg_scale": 2.0, "temperature": 0.9, "top_k": 0}),
    "arpg": ("emoji-arpg", {"cfg_scale": 4.0, "temperature": 0.9, "top_k": 0}),
    "t2i": ("emoji-text", {"cfg_scale": 1.5, "temperature": 0.8, "top_k": 0}),
}
DEFAULTS = {"c2i": {"cfg_scale": 4.0, "top_k": 2000}, "t2i": {"cfg_scale": 7.5, "top_k": 1000}}  # of the grid commands
NAME = re.compile(r"[\w][\w.:@/-]{0,99}", re.ASCII)


@dataclass(kw_only=True)
class ServeFlags(TextSampleFlags):
    """The models. With none of --gpt-ckpt and --models those of the quickstart, if it was run."""

    gpt_type: Literal["c2i", "t2i"] | None = None
    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    models: str | None = flag(None, "JSON file with a list of models: each has a name, gpt-ckpt, vq-ckpt, and other "
                                    "flags where it differs from the command line")
    model_name: str | None = flag(None, "what clients call the model of --gpt-ckpt; None: the file's name")


@dataclass(frozen=True)
class ServedModel:
    """A model to load: its name, and the flags of the sampling command that it would be drawn with."""

    name: str
    flags: SampleFlags | TextSampleFlags


def served_models(flags: ServeFlags) -> list[ServedModel]:
    """The models that the flags name; the first is the default.

    Raises ValueError or FileNotFoundError where there are none, or one cannot be read.
    """
    if flags.models is not None and flags.gpt_ckpt is not None:
        raise ValueError("--models and --gpt-ckpt both say which models: give one of them")
    if flags.models is not None:
        entries = list(from_list(flags))
    elif flags.gpt_ckpt is not None:
        entries = [(flags.model_name or name_of(flags.gpt_ckpt), flags)]
    else:
        entries = list(from_quickstart(flags))
    names = [name for name, _ in entries]
    if flags.model_name is not None and flags.gpt_ckpt is None:
        raise ValueError("--model-name is for the model of --gpt-ckpt")
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a model: expected letters, digits and ._:@/-, at most 100; give "
                             "another by --model-name, or in the list of --models")
        if names.count(name) > 1:
            raise ValueError(f"--models {flags.models} has two models named {name}: clients could not tell them apart")
    found = [ServedModel(name, sampling_flags(own)) for name, own in entries]
    for model in found:
        if not 0 <= model.flags.cfg_scale <= MOST_SCALE:
            raise ValueError(f"--cfg-scale of {model.name} is {model.flags.cfg_scale}, expected 0 to {MOST_SCALE:g}")
    return found


def name_of(path: str) -> str:
    """A model's name from that of its file: c2i_B_256 of c2i_B_256.pt, 000-GPT-S of runs/gpt/000-GPT-S/checkpoints/1.
    """
    place = Path(path.rsplit(":", 1)[-1])
    parents = [part for part in place.parts if not (part.isdecimal() or part == "checkpoints")]
    return Path(parents[-1]).stem if parents else "model"


def from_list(flags: ServeFlags) -> Iterator[tuple[str, ServeFlags]]:
    """The entries of --models: (name, flags)."""
    path = Path(flags.models)
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"--models: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"--models {path} is no JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'--models {path}: expected a list such as [{{"name": "emoji", "gpt-ckpt": …, "vq-ckpt": …}}]')
    parser = cli.build_parser(ServeFlags)
    actions = {action.dest: action for action in parser._actions if action.dest in vars(flags)}
    for place, entry in enumerate(entries):
        entry = {key.replace("-", "_"): value for key, value in entry.items()}
        name = entry.pop("name", None)
        source = f"--models {path}: model {name or place}"
        unknown = [key for key in entry if key not in actions or key in ("models", "model_name")]
        if unknown:
            raise ValueError(f"{source} has {few(unknown)}, which is no flag of a model")
        if not isinstance(entry.get("gpt_ckpt"), str):
            raise ValueError(f"{source} has no gpt-ckpt: which checkpoint?")
        values = {}
        for key, value in entry.items():
            wrong = cli.misfit(actions[key], value)
            if wrong:
                raise ValueError(f"{source}: {key.replace('_', '-')} {wrong}")
            values[key] = value if isinstance(value, bool) else actions[key].type(str(value))
        yield str(name or name_of(values["gpt_ckpt"])), replace(flags, **values, models=None)


def from_quickstart(flags: ServeFlags) -> Iterator[tuple[str, ServeFlags]]:
    """The models that the quickstart trained, wherever the command is started: (name, flags)."""
    places = [QUICKSTART, Path(__file__).resolve().parents[2] / QUICKSTART]
    home = next((place for place in places if any((place / name).is_dir() for name in QUICKSTART_MODELS)), None)
    found = [] if home is None else [name for name in QUICKSTART_MODELS if newest_run(home / name)]
    if not found or not newest_run(home / "tokenizer"):
        raise FileNotFoundError("no model is given, and the quickstart has trained none here: run bash "
                                "scripts/quickstart.sh, or give --gpt-ckpt and --vq-ckpt")
    for folder in found:
        name, settings = QUICKSTART_MODELS[folder]
        settings = {key: value for key, value in settings.items() if getattr(flags, key) is None}
        yield name, replace(flags, gpt_ckpt=str(newest_run(home / folder)), **settings,
                            vq_ckpt=flags.vq_ckpt or str(newest_run(home / "tokenizer")))


def newest_run(folder: Path) -> Path | None:
    """The newest run in a folder that has a checkpoint."""
    runs = sorted((run for run in folder.glob("[0-9]*-*") if any(run.glob("checkpoints/[0-9]*"))), reverse=True)
    return runs[0] if runs else None


def sampling_flags(flags: ServeFlags) -> SampleFlags | TextSampleFlags:
    """The flags of the command that draws with a model: of classes, or of prompts, as its checkpoint says."""
    facts = facts_of(containers.weights(containers.read(flags.gpt_ckpt), flags.gpt_ckpt))
    kind = flags.gpt_type or (facts and facts.condition) or "c2i"  # what is no model is refused when it is loaded
    own: dict[str, Any] = {key: value for key, value in vars(flags).items() if value is not None}
    kind_class = TextSampleFlags if kind == "t2i" else SampleFlags
    names = {field.name for field in fields(kind_class)} - {"gpt_type"}
    return kind_class(**DEFAULTS[kind] | {key: value for key, value in own.items() if key in names}, gpt_type=kind)
