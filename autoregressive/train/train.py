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
from autoregressive.train.conditions import Condition
from autoregressive.train.config import GPTTrainFlags, T2ITrainFlags
from autoregressive.train.finetune import (
    add_lora,
    check_finetune,
    check_same_control,
    check_same_kind,
    check_same_tokenizer,
    freeze,
    go_on_as_trained,
    initial_weights,
    refuse_other_codes,
    warn_of_other_tokenizer,
)
from autoregressive.train.open_data import open_classes, open_texts
from autoregressive.train.task import PREVIEW_IMAGES, GPTTask, SampleStream
from dataset.code_layouts import CodeStore
from dataset.codes import control_pictures
from dataset.control import check_column
from dataset.loader import StepSampler, loader
from evaluations.c2i.monitor import Monitor
from native.build import prepare
from tokenizer.build import load_tokenizer, other_tokenizer
from utils import cli, dist
from utils.checkpoints import containers
from utils.finite import check_finite
from utils.training import parallel
from utils.training.flags import check_flags
from utils.training.run_folder import choose_run, identity_of
from utils.training.trainer import Trainer

DEFAULT_VOCAB = 16384


def build_model(flags: GPTTrainFlags, name: str, store: CodeStore, **options: Any) -> CodeModel:
    """An untrained model of preset `name` that fits the store, with the options of its condition and the
    `recorded_options` of the file that it starts from; under torch.device("meta") without weights."""
    dropout = 0.0 if flags.drop_path_rate > 0 else flags.dropout_p
    return MODELS[name](
        grid=store.grid, vocab_size=flags.vocab_size or store.vocab_size or DEFAULT_VOCAB, resid_dropout_p=dropout,
        ffn_dropout_p=dropout, token_dropout_p=flags.token_dropout_p, drop_path_rate=flags.drop_path_rate,
        class_dropout_prob=flags.class_dropout, **arpg_depth(name, flags.query_layers), **options)


def control_adapter(model: CodeModel, flags: GPTTrainFlags, store: CodeStore) -> AdapterArgs:
    """Give the model the adapter of --control, which fits the store. Raises ValueError for a store that has no such
    pictures."""
    made = store.manifest
    check_column(store.columns, flags.control, made.get("image_size"), flags.source)
    args = flags.adapter_args(model, patch=made["tokenizer"]["downsample"], image_size=made["image_size"])
    attach(model, args)
    return args


def preview_control(flags: GPTTrainFlags, store: CodeStore, condition: Condition) -> tuple[np.ndarray, Tensor] | None:
    """Conditions and control pictures of evenly spaced images of the store, for previews; None without --control."""
    if flags.control is None:
        return None
    rows = np.linspace(0, len(store.labels) - 1, PREVIEW_IMAGES // 2).round().astype(int)
    return condition.of_rows(rows), control_pictures(store, flags.control, rows, np.zeros_like(rows))


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
    if process.device.type == "cpu":
        prepare(("train",))
    flags.check(process.world_size)
    for name in ("token_noise", "class_dropout", "token_dropout_p", "drop_path_rate"):
        if not 0 <= getattr(flags, name) <= 1 or (name.endswith(("_p", "_rate")) and getattr(flags, name) == 1):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected a share from 0 to 1")
    check_finetune(flags, gpt_ckpt=flags.gpt_ckpt, resume=flags.resume)
    flags.check_adapter(flags.control)
    vq_name, tokenizer = load_tokenizer(flags, device=process.device) if flags.vq_ckpt is not None else (None, None)
    if isinstance(flags, T2ITrainFlags):
        store, condition = open_texts(flags, tokenizer and (vq_name, tokenizer), device=process.device)
    else:
        store, condition = open_classes(flags)
    if tokenizer is not None:
        if store.vocab_size not in (None, tokenizer.codebook_size):
            raise ValueError(f"{flags.vq_ckpt} has {tokenizer.codebook_size} codes, the store {store.vocab_size}")
        other = other_tokenizer(store.manifest.get("tokenizer"), vq_name, tokenizer, source=flags.vq_ckpt,
                                codes=f"the codes in {flags.source} are")
        if other:
            cli.warn(other)
    if flags.eval_every > 0 and tokenizer is None:
        raise ValueError("--eval-every needs --vq-ckpt: the tokenizer that turns codes into images")
    monitor = Monitor.wanted(flags, process)
    source = flags.init_from or flags.gpt_ckpt
    content = {} if source is None else containers.read(source)
    check_codes = partial(check_same_tokenizer, store=store, code_path=flags.source)
    if flags.init_from is None:
        condition.check(content, source)
    if is_training_checkpoint(content) and flags.init_from is None:
        check_codes(content, source)
    else:
        warn_of_other_tokenizer(content, source, store, code_path=flags.source)
    name = flags.gpt_model or containers.saved_config(content).get("gpt_model") or "GPT-B"
    with torch.device("meta"):
        model = build_model(flags, name, store, **condition.model_options(),
                            **recorded_options(name, containers.saved_config(content)))
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
                             "vocab_size": config.vocab_size, "cls_token_num": config.cls_token_num,
                             **condition.described(), "tokenizer": store.manifest.get("tokenizer"),
                             "image_size": store.manifest.get("image_size")}
    if lora is not None:
        saved["lora"] = lora
    if control is not None:
        found = store.manifest.get("control", {})
        saved["control"] = adapter | (found if found.get("kind") == flags.control else {})
    identity = identity_of(flags, data=store.fingerprint(), model=saved, start=source, covered=("init_from",))
    if model.any_order:  # no part of the identity: name and start decide it for a new run, else the checkpoint does
        saved["class_at_origin"] = config.class_at_origin
    task = GPTTask(parallel.apply_ddp(model, process.device), condition, dtype=dtype, tokenizer=tokenizer,
                   seed=flags.global_seed, token_noise=flags.token_noise, cfg_scale=flags.cfg_scale,
                   checks=(check_codes, condition.check, partial(check_same_control, wanted=adapter),
                           partial(go_on_as_trained, name=name, model=model, saved=saved)),
                   controlled=preview_control(flags, store, condition))
    refuse = partial(refuse_other_codes, ours=identity, code_path=flags.source)
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
            f"{store.views} views, {condition.what_there_is}, {config.grid[0]}x{config.grid[1]} tokens of "
            f"{config.vocab_size}, {trainer.steps} steps on {process.world_size} x {process.device}, {dtype}"
            f"{', ' + flags.data_parallel if process.world_size > 1 or flags.sharded else ''}; "
            f"run folder {trainer.folder}")
    if monitor and control is not None:
        cli.say("--eval-every draws without control pictures; previews follow some of the store's")

    def batches(start: int):
        sampler = StepSampler(len(store), global_batch=flags.global_batch_size, rank=process.rank,
                              accumulation=flags.gradient_accumulation_steps, world_size=process.world_size,
                              seed=flags.global_seed, start_step=start, end_step=trainer.steps)
        data = condition.batches(vocab_size=config.vocab_size, seed=flags.global_seed,
                                 condition_dropout=flags.class_dropout, any_order=model.any_order,
                                 control=flags.control)
        # a packed batch is one gather, faster than asking a process; codes made when they are read need the tokenizer
        workers = 0 if store.packed or store.may_lose else flags.num_workers
        return loader(data, sampler, num_workers=workers, pin_memory=process.device.type == "cuda")

    def evaluate(model: CodeModel) -> dict[str, float]:
        try:
            return monitor(SampleStream(task, model, flags.eval_images))
        finally:
            release(model)

    trainer.train(batches, eval_every=flags.eval_every, evaluate=monitor and evaluate)


if __name__ == "__main__":
    cli.run(main, GPTTrainFlags)
