"""Train a GPT or an ARPG on image codes.

    bash scripts/autoregressive/train_c2i.sh --code-path /data/codes --image-size 256 --gpt-model GPT-B

Number of images and classes, class names, grid and vocabulary come from the store.
"""
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.control.adapter import PREFIX, AdapterArgs, attach, pretrained_values
from autoregressive.models.base import CodeModel
from autoregressive.models.generate import release
from autoregressive.models.registry import MODELS, arpg_depth, recorded_options
from autoregressive.train.config import GPTTrainFlags
from autoregressive.train.finetune import (
    add_lora,
    check_finetune,
    check_same_classes,
    check_same_control,
    check_same_kind,
    check_same_tokenizer,
    freeze,
    go_on_as_trained,
    initial_weights,
    refuse_other_codes,
    warn_of_other_tokenizer,
    without_classes,
)
from autoregressive.train.task import PREVIEW_IMAGES, GPTTask, SampleStream
from dataset.codes import CodeBatches, CodeStore, control_pictures, open_stores
from dataset.control import check_column
from dataset.loader import StepSampler, loader
from evaluations.c2i.monitor import Monitor
from tokenizer.build import load_tokenizer, other_tokenizer
from utils import cli, dist
from utils.checkpoints import containers
from utils.finite import check_finite
from utils.training import parallel
from utils.training.flags import check_flags
from utils.training.run_folder import choose_run, identity_of
from utils.training.trainer import Trainer

DEFAULT_VOCAB = 16384


def open_codes(flags: GPTTrainFlags) -> CodeStore:
    """The store of --code-path, checked against the flags that describe it."""
    grid = subfolder = None
    if flags.image_size is not None:
        height, width = flags.image_size
        size = f"{height}x{width}" if height != width else str(height)
        subfolder = f"{flags.dataset.removesuffix('_code')}{size}_codes"
        p = flags.downsample_size or 16
        grid = (height // p, width // p) if height != width else None
    store = open_stores(flags.code_path, subfolder=subfolder, grid=grid, weights=flags.store_weights,
                        corrupt=flags.corrupt_shards)
    if flags.num_classes == 1:
        store = without_classes(store)
    made = store.manifest
    if made and flags.image_size is not None and list(flags.image_size) != made["image_size"]:
        raise ValueError(f"--image-size is {flags.image_size}, but the codes are of {tuple(made['image_size'])} images")
    if made and flags.downsample_size not in (None, made["tokenizer"]["downsample"]):
        raise ValueError(f"--downsample-size is {flags.downsample_size}, but the codes were made with "
                         f"{made['tokenizer']['downsample']}")
    if not made and flags.image_size is not None:
        tokens = tuple(side // (flags.downsample_size or 16) for side in flags.image_size)
        if tokens != store.grid:
            raise ValueError(f"--image-size and --downsample-size mean {tokens[0]}x{tokens[1]} tokens, the codes are "
                             f"{store.grid[0]}x{store.grid[1]}")
    if flags.num_classes is not None and int(store.labels.max()) >= flags.num_classes:
        raise ValueError(f"--num-classes is {flags.num_classes}, but the store has label {store.labels.max()}")
    if store.classes and flags.num_classes not in (None, len(store.classes)):
        raise ValueError(f"--num-classes is {flags.num_classes}, but the store names {len(store.classes)} classes: "
                         "leave it out (or give 1 to train without classes)")
    if store.vocab_size is not None and (flags.vocab_size or store.vocab_size) < store.vocab_size:
        raise ValueError(f"--vocab-size is {flags.vocab_size}, but the codes are of a codebook of {store.vocab_size}")
    return store


def build_model(flags: GPTTrainFlags, name: str, store: CodeStore, **recorded: Any) -> CodeModel:
    """An untrained model of preset `name` that fits the store, with the `recorded_options` of the file that it starts
    from; under torch.device("meta") without weights."""
    dropout = 0.0 if flags.drop_path_rate > 0 else flags.dropout_p
    return MODELS[name](
        grid=store.grid, vocab_size=flags.vocab_size or store.vocab_size or DEFAULT_VOCAB,
        num_classes=flags.num_classes or store.num_classes, model_type=flags.gpt_type,
        cls_token_num=flags.cls_token_num or 1, resid_dropout_p=dropout, ffn_dropout_p=dropout,
        token_dropout_p=flags.token_dropout_p, drop_path_rate=flags.drop_path_rate,
        class_dropout_prob=flags.class_dropout, **arpg_depth(name, flags.query_layers), **recorded)


def control_adapter(model: CodeModel, flags: GPTTrainFlags, store: CodeStore) -> AdapterArgs:
    """Give the model the adapter of --control, which fits the store. Raises ValueError for a store that has no such
    pictures."""
    made = store.manifest
    check_column(store.columns, flags.control, made.get("image_size"), flags.code_path)
    args = flags.adapter_args(model, patch=made["tokenizer"]["downsample"], image_size=made["image_size"])
    attach(model, args)
    return args


def preview_control(flags: GPTTrainFlags, store: CodeStore) -> tuple[np.ndarray, Tensor] | None:
    """Labels and control pictures of evenly spaced images of the store, for previews; None without --control."""
    if flags.control is None:
        return None
    rows = np.linspace(0, len(store.labels) - 1, PREVIEW_IMAGES // 2).round().astype(int)
    return store.labels[rows], control_pictures(store, flags.control, rows, np.zeros_like(rows))


def first_weights(model: CodeModel, flags: GPTTrainFlags, content: dict[str, Any], *, classes: list[str] | None,
                  control: AdapterArgs | None = None) -> str:
    """Give a model, of which this process may hold a part, its first weights: from the seed, or a file (`content`).

    Returns a line for the log; empty from the seed, and for a --gpt-ckpt that `Trainer.restore` is to read.
    """
    model.init_weights(flags.global_seed, assign=parallel.copy_whole_into)
    if flags.control_pretrained:
        own = dict(model.named_parameters())
        for name, values in pretrained_values(control).items():
            parallel.copy_whole_into(own[name], values)
    if flags.init_from is not None:
        state, said = initial_weights(content, flags.init_from, model=model, classes=classes, seed=flags.global_seed)
    elif content and not is_training_checkpoint(content):
        state, said = containers.weights(content, flags.gpt_ckpt), f"starting from the weights of {flags.gpt_ckpt}"
    else:
        return ""
    own = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    new_control = control is not None and not any(name.startswith(PREFIX) for name in state)
    if new_control:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(PREFIX)}
        said += f", with a new control adapter of {control.vit}"
    if flags.init_from is None:
        check_same_kind(state, own, f"--gpt-ckpt {flags.gpt_ckpt}")
    containers.check_fit(own, state, flags.init_from or flags.gpt_ckpt, type(model).__name__)
    check_finite(state, flags.init_from or flags.gpt_ckpt)
    for name, tensor in own.items():
        parallel.copy_whole_into(tensor, state[name])
    return said


def is_training_checkpoint(content: dict[str, Any]) -> bool:
    """Whether a checkpoint holds more than weights: the step, and the optimizer where it is one file."""
    return "steps" in content and ("optimizer" in content or "flags" in content)


def main(flags: GPTTrainFlags) -> None:
    """Train to the end of --epochs."""
    process = dist.setup(timeout=flags.dist_timeout)
    flags.resume, flags.gpt_resume = flags.gpt_resume or flags.resume, None
    check_flags(flags, world_size=process.world_size)
    flags.check(process.world_size)
    for name in ("token_noise", "class_dropout", "token_dropout_p", "drop_path_rate"):
        if not 0 <= getattr(flags, name) <= 1 or (name.endswith(("_p", "_rate")) and getattr(flags, name) == 1):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected a share from 0 to 1")
    check_finetune(flags, gpt_ckpt=flags.gpt_ckpt, resume=flags.resume)
    flags.check_adapter(flags.control)
    if flags.gpt_type != "c2i":
        raise ValueError("--gpt-type t2i: this command trains on classes, the store holds no captions")
    store = open_codes(flags)
    tokenizer = None
    if flags.vq_ckpt is not None:
        vq_name, tokenizer = load_tokenizer(flags, device=process.device)
        if store.vocab_size not in (None, tokenizer.codebook_size):
            raise ValueError(f"{flags.vq_ckpt} has {tokenizer.codebook_size} codes, the store {store.vocab_size}")
        other = other_tokenizer(store.manifest.get("tokenizer"), vq_name, tokenizer, source=flags.vq_ckpt,
                                codes=f"the codes in {flags.code_path} are")
        if other:
            cli.warn(other)
    if flags.eval_every > 0 and tokenizer is None:
        raise ValueError("--eval-every needs --vq-ckpt: the tokenizer that turns codes into images")
    monitor = Monitor.wanted(flags, process)
    source = flags.init_from or flags.gpt_ckpt
    content = {} if source is None else containers.read(source)
    check_codes = partial(check_same_tokenizer, store=store, code_path=flags.code_path)
    if flags.init_from is None:
        check_same_classes(content, source, store.classes)
    if is_training_checkpoint(content) and flags.init_from is None:
        check_codes(content, source)
    else:
        warn_of_other_tokenizer(content, source, store, code_path=flags.code_path)
    name = flags.gpt_model or containers.saved_config(content).get("gpt_model") or "GPT-B"
    with torch.device("meta"):
        model = build_model(flags, name, store, **recorded_options(name, containers.saved_config(content)))
    dtype = dist.compute_dtype(flags.mixed_precision, process.device,
                               weights=sum(p.numel() for p in model.parameters()))
    freeze(model, flags.freeze)
    lora = add_lora(model, flags.lora_rank) if flags.lora_rank else None
    control = control_adapter(model, flags, store) if flags.control is not None else None
    adapter = None if control is None else {**control.described(), "kind": flags.control}
    begins = flags.init_from is not None or not is_training_checkpoint(content)
    check_same_control(content, source, adapter, begins=begins)
    parallel.apply_parallelism(model, flags, process.device, dtype=dtype, compiled=flags.compile)
    started = first_weights(model, flags, content, classes=store.classes, control=control)
    config = model.config
    saved: dict[str, Any] = {"kind": "gpt", "gpt_model": name, "gpt_type": flags.gpt_type, "grid": list(config.grid),
                             "vocab_size": config.vocab_size, "num_classes": config.num_classes,
                             "cls_token_num": config.cls_token_num, "classes": store.classes,
                             "tokenizer": store.manifest.get("tokenizer"),
                             "image_size": store.manifest.get("image_size")}
    if lora is not None:
        saved["lora"] = lora
    if control is not None:
        found = store.manifest.get("control", {})
        saved["control"] = adapter | (found if found.get("kind") == flags.control else {})
    identity = identity_of(flags, data=store.fingerprint(), model=saved, start=source, covered=("init_from",))
    if model.any_order:  # no part of the identity: name and start decide it for a new run, else the checkpoint does
        saved["class_at_origin"] = config.class_at_origin
    task = GPTTask(parallel.apply_ddp(model, process.device), dtype=dtype, classes=store.classes, tokenizer=tokenizer,
                   seed=flags.global_seed, token_noise=flags.token_noise, cfg_scale=flags.cfg_scale,
                   checks=(check_codes, partial(check_same_control, wanted=adapter),
                           partial(go_on_as_trained, name=name, model=model, saved=saved)),
                   controlled=preview_control(flags, store))
    refuse = partial(refuse_other_codes, ours=identity, code_path=flags.code_path)
    trainer = Trainer(task, flags, process, choose_run(flags, name, identity, refuse=refuse), samples=len(store),
                      saved_config=saved)
    if content and not started:
        trainer.restore(containers.resolve(flags.gpt_ckpt))
    del content  # frees as much memory as the model takes, or model and optimizer
    trainer.resume()
    trainer.begin()
    if started and trainer.step == 0:
        cli.say(started)
    cli.say(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(store)} images x "
            f"{store.views} views, {config.num_classes} classes, {config.grid[0]}x{config.grid[1]} tokens of "
            f"{config.vocab_size}, {trainer.steps} steps on {process.world_size} x {process.device}, {dtype}"
            f"{', ' + flags.data_parallel if process.world_size > 1 or flags.sharded else ''}; "
            f"run folder {trainer.folder}")
    if monitor and control is not None:
        cli.say("--eval-every draws without control pictures; previews follow some of the store's")

    def batches(start: int):
        sampler = StepSampler(len(store), global_batch=flags.global_batch_size, rank=process.rank,
                              accumulation=flags.gradient_accumulation_steps, world_size=process.world_size,
                              seed=flags.global_seed, start_step=start, end_step=trainer.steps)
        data = CodeBatches(store, vocab_size=config.vocab_size, seed=flags.global_seed,
                           condition_dropout=flags.class_dropout, any_order=model.any_order,
                           control=flags.control)
        workers = 0 if store.packed else flags.num_workers  # a packed batch is one gather: faster than asking a process
        return loader(data, sampler, num_workers=workers, pin_memory=process.device.type == "cuda")

    def evaluate(model: CodeModel) -> dict[str, float]:
        try:
            return monitor(SampleStream(task, model, flags.eval_images))
        finally:
            release(model)

    trainer.train(batches, eval_every=flags.eval_every, evaluate=monitor and evaluate)


if __name__ == "__main__":
    cli.run(main, GPTTrainFlags)
