"""Start a GPT from the weights of another: the class table fitted to the codes, parts frozen or LoRA adapters trained.

    bash scripts/autoregressive/train_c2i.sh --code-path my_codes --init-from c2i_B_256.pt --lora-rank 8
"""
import copy
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from autoregressive.control.adapter import PREFIX
from autoregressive.models.arpg import ARPG
from autoregressive.models.base import CodeModel
from autoregressive.models.registry import facts_of, recorded_options
from dataset.code_manifest import same_tokenizer, tokenizer_name
from dataset.codes import CodeStore
from utils import cli
from utils.checkpoints import containers, sharded
from utils.checkpoints.lora import DOWN, UP, is_adapter, plain_name
from utils.cli import flag
from utils.seeding import derive_seed
from utils.training.run_folder import differences_of

ADAPTED = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
           "attn.to_q", "attn.to_k", "attn.to_v", "attn.proj", "ffn.w1", "ffn.w2", "ffn.w3")  # of a GPT, of an ARPG
MOST_RANK = 1024  # more is not low for any of the models
ALPHA_PER_RANK = 2  # a fixed ratio, so that --lr means the same for every rank


@dataclass(kw_only=True)
class FinetuneFlags:
    """How a new run begins with the weights of an old one."""

    init_from: str | None = flag(None, "begin a new run with the weights of this GPT checkpoint, of any kind; classes "
                                       "that both know by name keep their embedding")
    freeze: Literal["none", "blocks", "all-but-classes"] = flag(
        "none", "with --init-from, what is not trained: the transformer blocks, or all but the class embeddings",
        choices=("none", "blocks", "all-but-classes"))
    lora_rank: int = flag(0, "with --init-from, train the class embeddings and, in place of the weights, low-rank "
                             "adapters of this rank on attention and feed-forward (LoRA); 8 is usual, 0: none")


def check_finetune(flags: FinetuneFlags, *, gpt_ckpt: str | None, resume: str) -> None:
    """Raise ValueError for settings that contradict each other."""
    from_file = resume not in ("none", "auto")
    if flags.init_from is not None and (gpt_ckpt is not None or from_file):
        other = "--gpt-ckpt" if gpt_ckpt is not None else f"--resume {resume}"
        raise ValueError(f"--init-from and {other} both say where to start: give one of them (an interrupted "
                         "fine-tuning goes on with --resume auto)")
    if not 0 <= flags.lora_rank <= MOST_RANK:
        raise ValueError(f"--lora-rank is {flags.lora_rank}, expected 0 to {MOST_RANK}")
    if flags.lora_rank and flags.freeze != "none":
        raise ValueError(f"--lora-rank freezes all but adapters and classes: leave --freeze {flags.freeze} out")
    if (flags.lora_rank or flags.freeze != "none") and flags.init_from is None and not from_file:
        used = "--lora-rank" if flags.lora_rank else "--freeze"
        raise ValueError(f"{used} needs --init-from: which trained GPT?")


def check_same_classes(content: dict[str, Any], source: str | Path, classes: list[str] | None) -> None:
    """Raise ValueError when a file whose training is to be continued has other class names than the codes."""
    known = containers.saved_config(content).get("classes")
    if known and classes and known != classes:
        apart = [f"{theirs} and {ours}" for theirs, ours in zip(known, classes, strict=False) if theirs != ours]
        raise ValueError(f"the classes of {source} are not those of the codes ({(apart or ['their number'])[0]}): "
                         "--init-from takes weights over by the names of the classes")


def check_same_tokenizer(content: dict[str, Any], source: str | Path, store: CodeStore, *, code_path: str) -> None:
    """Raise ValueError when a file whose training is to be continued was trained on codes of another tokenizer."""
    made, now = containers.saved_config(content).get("tokenizer"), store.manifest.get("tokenizer")
    if same_tokenizer(made, now) is False:
        raise ValueError(f"{source} was trained on codes of tokenizer {tokenizer_name(made)}, those in {code_path} are "
                         f"of {tokenizer_name(now)}: extract them with the tokenizer of that training")


def check_same_control(content: dict[str, Any], source: str | Path, wanted: dict[str, Any] | None, *,
                       begins: bool = False) -> None:
    """Raise ValueError when a file has another control adapter than this run, whose config is `wanted` (None: none).

    begins: its weights are a new run's first ones, which may get an adapter or follow another kind of pictures.
    """
    theirs = containers.saved_config(content).get("control")
    if not isinstance(content.get("config"), dict) or (theirs is None and (begins or wanted is None)):
        return
    if theirs is None:
        raise ValueError(f"{source} has no control adapter: a new run gets one, --init-from {source} with --control "
                         f"{wanted['kind']}")
    if wanted is None:
        raise ValueError(f"{source} has a control adapter, this run has none: give --control {theirs.get('kind')} and "
                         "the flags of its adapter as in that training")
    for name in ("mode",) if begins else ("kind", "mode", "vit", "layers"):
        if theirs.get(name) != wanted[name]:
            flag_name = "--control" if name == "kind" else f"--control-{name}"
            raise ValueError(f"{source} was trained with {flag_name} {theirs.get(name)}, this run has {wanted[name]}: "
                             "give the flags of its adapter as in that training")


def go_on_as_trained(content: dict[str, Any], source: str | Path, *, name: str, model: CodeModel,
                     saved: dict[str, Any]) -> None:
    """Let a run's model, a `name`, be what the checkpoint says from which it goes on, and no tensor shows; and `saved`,
    which describes the model in the checkpoints to come."""
    config = containers.saved_config(content)
    if isinstance(model, ARPG) and config:
        recorded = recorded_options(name, config)
        model.place_class(recorded["class_at_origin"])
        saved |= recorded


def warn_of_other_tokenizer(content: dict[str, Any], source: str, store: CodeStore, *, code_path: str) -> None:
    """The same as a warning, for a file whose weights are a new run's first ones."""
    try:
        check_same_tokenizer(content, source, store, code_path=code_path)
    except ValueError as error:
        cli.warn(f"{error}, unless the model is to learn another code")


def refuse_other_codes(theirs: dict[str, Any], folder: Path, *, ours: dict[str, Any], code_path: str) -> None:
    """Raise ValueError when the run in `folder` and this one (their identities) differ in the codes' tokenizer alone.

    The hash of the data differs with it.
    """
    made, now = (identity.get("model", {}).get("tokenizer") for identity in (theirs, ours))
    if same_tokenizer(made, now) is not False:
        return
    rest = [{**identity, "data": None, "model": {**identity["model"], "tokenizer": None}}
            for identity in (theirs, ours)]
    if not differences_of(*rest):
        raise ValueError(f"{folder} was trained on codes of tokenizer {tokenizer_name(made)}, those in {code_path} are "
                         f"of {tokenizer_name(now)}, and all else is the same: extract them with the tokenizer of that "
                         "run, or give another --results-dir, or leave --resume auto out for a new run")


def class_names(content: dict[str, Any], source: str | Path, *, count: int) -> list[str] | None:
    """The names of a checkpoint's `count` classes, None if it has none. Raises ValueError for more or fewer names."""
    known = containers.saved_config(content).get("classes")
    if known and len(known) != count:
        raise ValueError(f"the config of {source} names {len(known)} classes, but its class table has {count}")
    return known


def without_classes(store: CodeStore) -> CodeStore:
    """The store for unconditional training (--num-classes 1): every label 0, no names."""
    plain = copy.copy(store)
    plain.labels, plain.classes = np.zeros_like(store.labels), None
    return plain


# ---- what is trained


def freeze(model: CodeModel, choice: str) -> None:
    """Freeze parts of the model; `choice` is the value of --freeze."""
    if choice == "none":
        return
    if isinstance(model, ARPG) and choice == "all-but-classes":
        raise ValueError("--freeze all-but-classes: the classes of an ARPG lie in one table with its codes and cannot "
                         "be trained alone: give --freeze blocks or --lora-rank 8")
    model.requires_grad_(False)
    for part in embeddings_of(model):
        part.requires_grad_(True)
    if choice == "blocks":
        model.get_submodule(model.HEAD).requires_grad_(True)
        if not isinstance(model, ARPG):
            model.tok_embeddings.requires_grad_(True)


def embeddings_of(model: CodeModel) -> list[torch.nn.Module]:
    """What embeds the condition: of an ARPG the one table of classes and codes."""
    return [model.embeddings if isinstance(model, ARPG) else model.cls_embedding]


def add_lora(model: CodeModel, rank: int) -> dict[str, int]:
    """Put adapters on every block, in place; only they and the class table are trained (of an ARPG the table of classes
    and codes). Returns {"rank", "alpha"}.

    The model stays a CodeModel. Works on the meta device too; `initial_weights` gives the values.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(f"--lora-rank needs peft: {sys.executable} -m pip install peft") from None
    alpha = ALPHA_PER_RANK * rank
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(ADAPTED),
                                       init_lora_weights=False), model)
    if model.config.model_type == "c2i":
        for part in embeddings_of(model):  # for new classes
            part.requires_grad_(True)
    return {"rank": rank, "alpha": alpha}


# ---- what it starts from


def initial_weights(content: dict[str, Any], source: str | Path, *, model: CodeModel, classes: list[str] | None,
                    seed: int) -> tuple[dict[str, Tensor], str]:
    """A state dict for `model` (on any device, with adapters or without) from a checkpoint, and a line for the log.

    All names and shapes must fit, except for the class table; a control adapter may be in both or in the model alone:
    it is then left out. The grid may differ: no weight depends on it. Adapters
    start with B zero, so that they change nothing, and A uniform as in peft, fixed by (seed, name). Raises ValueError
    for a file of another vocabulary, width, depth or condition.
    """
    state = containers.weights(content, source)
    own = model.state_dict()
    if not any(name.startswith(PREFIX) for name in state):  # a control adapter that is new begins as it is
        own = {name: tensor for name, tensor in own.items() if not name.startswith(PREFIX)}
    expected = {plain_name(name): tensor for name, tensor in own.items() if not is_adapter(name)}
    check_same_kind(state, expected, f"--init-from {source}", new_classes=True)
    matched, facts = "the condition is text", facts_of(state)
    if facts.classes:
        table, matched = fit_class_table(
            facts.class_table(state), class_names(content, source, count=facts.num_classes),
            count=model.config.num_classes, names=classes)
        state[facts.classes] = facts.with_class_table(state, table)
    containers.check_fit(expected, state, source, "this run's GPT")
    values = {name: adapter_start(name, tensor.shape, seed=seed) if is_adapter(name) else state[plain_name(name)]
              for name, tensor in own.items()}
    return values, f"starting from the weights of {source}: {matched}"


def check_same_kind(state: dict[str, Tensor], expected: dict[str, Tensor], source: str, *,
                    new_classes: bool = False) -> None:
    """Raise ValueError, naming both, if a file is no GPT, or one of another size or condition than the run's;
    new_classes: it may have another number of classes. source: the flag and its value."""
    theirs, ours = facts_of(state), facts_of(expected)
    if any(name.startswith(PREFIX) for name in state) and not any(
            name.startswith(PREFIX) for name in expected):
        raise ValueError(f"{source} has a control adapter, this run has none: give --control and the flags "
                         "of its adapter as in that training")
    if theirs is None:
        hint = ": it looks like a tokenizer" if "quantize.embedding.weight" in state else ""
        raise ValueError(f"{source} is no GPT or ARPG checkpoint{hint}")
    kinds = [f"{facts.kind} conditioned on {'classes' if facts.classes else 'text'}" for facts in (theirs, ours)]
    if kinds[0] != kinds[1]:
        mended = f": give {theirs.flags()}" if theirs.family != ours.family and theirs.flags() else ""
        raise ValueError(f"{source} is {kinds[0]}, this run's is {kinds[1]}{mended}")
    if theirs.size != ours.size:
        mended = "it takes the same --gpt-model and codes of the same tokenizer"
        if theirs.vocab_size == ours.vocab_size and theirs.flags():
            mended = f"give {theirs.flags()}"
            if theirs.preset() == ours.preset():
                mended = f"give --query-layers {theirs.depth[-1]}"
        raise ValueError(f"{source} is {theirs.kind} of {theirs.size}, this run's has {ours.size}: {mended}")
    if theirs.caption_dim != ours.caption_dim:
        raise ValueError(f"{source} takes text features that are {theirs.caption_dim} numbers wide, those here are "
                         f"{ours.caption_dim} wide: give features of the encoder that it was trained with")
    if theirs.prefix != ours.prefix:
        raise ValueError(f"{source} takes captions of {theirs.prefix} tokens, this run's model {ours.prefix}: give "
                         f"--cls-token-num {theirs.prefix}")
    if theirs.num_classes != ours.num_classes and not new_classes:
        raise ValueError(f"{source} has {theirs.num_classes} classes, this run's model {ours.num_classes}: give "
                         "--init-from in its place, which fits the class table")


def check_resumed(path: Path, expected: dict[str, Tensor]) -> None:
    """Raise ValueError if a training checkpoint is of another model than the run's."""
    if sharded.is_sharded(path):
        state = {name.removeprefix("model."): torch.empty(size, device="meta")
                 for name, size in sharded.sizes_in(path).items() if name.startswith("model.")}
    elif path.is_file():
        state = containers.weights(containers.read(path), path)
    else:
        return  # of LlamaGen's FSDP, whose names are compared when it is read
    check_same_kind(state, expected, str(path))


def fit_class_table(table: Tensor, known: list[str] | None, *, count: int,
                    names: list[str] | None) -> tuple[Tensor, str]:
    """Rows (count + 1, D) for classes `names` from the table (n + 1, D) of classes `known`, and how they were matched.

    Without names on both sides rows are matched by number if there are equally many, else none is taken over. The last
    row, "no class", is always taken over. A new class starts at the mean of the old ones: for a class of emoji that a
    GPT had not seen, the first loss was 1.967; 1.968 from "no class", which only class dropout trains; 1.996 from N(0,
    0.02^2).
    """
    old, no_class = table[:-1], table[-1:]
    rows = old.float().mean(0).to(table.dtype).repeat(count, 1)
    if known and names:
        by_name = dict(zip(known, old, strict=True))
        for label, name in enumerate(names):
            rows[label] = by_name.get(name, rows[label])
        matched = f"{sum(name in by_name for name in names)} of {count} classes taken over by name"
        for what, side, other in (("new", names, by_name), ("left out", known, names)):
            apart = [name for name in side if name not in other]
            if apart:
                matched += f", {len(apart)} {what}: {', '.join(apart[:5])}{' …' if len(apart) > 5 else ''}"
    elif count == len(old):
        rows, matched = old, f"all {count} classes taken over by number, as there are no names"
    else:
        matched = (f"class embeddings start anew ({len(old)} classes in the file, {count} here, without names on both "
                   "sides)")
    return torch.cat([rows, no_class]), matched


def adapter_start(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """First values of a LoRA matrix: B zero; A uniform within 1 / sqrt(in), from (seed, name) alone."""
    if UP in name:
        return torch.zeros(shape)
    assert DOWN in name, name
    stream = torch.Generator().manual_seed(derive_seed(seed, zlib.crc32(name.encode())))
    return torch.empty(shape).uniform_(-shape[1] ** -0.5, shape[1] ** -0.5, generator=stream)
