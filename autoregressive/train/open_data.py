"""The data of a training: codes from their store, checked against the flags that describe it, and what the model is to
follow."""
from pathlib import Path

import torch

from autoregressive.train.conditions import Classes, Condition, Texts
from autoregressive.train.config import GPTTrainFlags, T2ITrainFlags
from autoregressive.train.finetune import without_classes
from autoregressive.train.online_codes import OnlineCodes
from dataset.build import flagged_pairs
from dataset.code_joins import Mixture
from dataset.code_layouts import CodeStore
from dataset.codes import open_store, open_stores
from dataset.pictures import PictureReader
from dataset.remote import is_url
from dataset.text_batches import TextColumns
from dataset.text_codes import holds_codes, open_text_codes
from dataset.text_features import attach_features, feature_facts
from language.text_encoder import TextEncoder, load_text_encoder
from tokenizer.tokenizer_image.vq_model import VQModel
from utils import dist

MOST_TOKENS = 120  # of a caption whose encoder is not known: LlamaGen's
ONLINE_SIZE = (384, 384)  # of pictures that are encoded in the loop, as in LlamaGen's command


def open_classes(flags: GPTTrainFlags) -> tuple[CodeStore, Condition]:
    """The store of --code-path, whose images have classes."""
    if flags.gpt_type != "c2i":
        raise ValueError("--gpt-type t2i: this command trains on classes, the store holds no captions: "
                         "autoregressive/train/train_t2i.py takes captions")
    subfolder, grid = expected_layout(flags)
    store = open_stores(flags.code_path, subfolder=subfolder, grid=grid, weights=flags.store_weights,
                        corrupt=flags.corrupt_shards)
    if flags.num_classes == 1:
        store = without_classes(store)
    if flags.num_classes is not None and int(store.labels.max()) >= flags.num_classes:
        raise ValueError(f"--num-classes is {flags.num_classes}, but the store has label {store.labels.max()}")
    if store.classes and flags.num_classes not in (None, len(store.classes)):
        raise ValueError(f"--num-classes is {flags.num_classes}, but the store names {len(store.classes)} classes: "
                         "leave it out (or give 1 to train without classes)")
    check_described(store, flags)
    return store, Classes(store, num_classes=flags.num_classes, cls_token_num=flags.cls_token_num)


def expected_layout(flags: GPTTrainFlags) -> tuple[str | None, tuple[int, int] | None]:
    """(name of the store's folder, grid of codes that are no square), as far as the flags say."""
    grid = subfolder = None
    if flags.image_size is not None:
        height, width = flags.image_size
        size = f"{height}x{width}" if height != width else str(height)
        subfolder = f"{flags.dataset.removesuffix('_code')}{size}_codes"
        p = flags.downsample_size or 16
        grid = (height // p, width // p) if height != width else None
    return subfolder, grid


def check_described(store: CodeStore, flags: GPTTrainFlags) -> None:
    """Raise ValueError if the store is not as the flags say."""
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
    if store.vocab_size is not None and (flags.vocab_size or store.vocab_size) < store.vocab_size:
        raise ValueError(f"--vocab-size is {flags.vocab_size}, but the codes are of a codebook of {store.vocab_size}")


def open_captioned(flags: T2ITrainFlags, tokenizer: tuple[str, VQModel] | None) -> CodeStore:
    """The codes and captions of --data-path with the features of --t5-feat-path and --short-t5-feat-path: packed
    stores, one or several (comma-separated), LlamaGen's files, or pictures, whose codes are made when they are read."""
    names = [] if flags.data_path is None else flags.data_path.split(",")
    subfolder, grid = expected_layout(flags)
    if flags.code_path is not None:
        stores = [open_text_codes(flags.data_path, flags.code_path, grid=grid, part=(flags.data_start, flags.data_end))]
    elif names and all(holds_codes(name, subfolder=subfolder) for name in names):
        if (flags.data_start, flags.data_end) != (None, None):
            raise ValueError("--data-start and --data-end choose among .jsonl files or archives, and --data-path "
                             f"{flags.data_path} holds codes: extract a part of the pictures")
        stores = [open_store(name, subfolder=subfolder, corrupt=flags.corrupt_shards) for name in names]
    elif flags.data_path is None and not flags.dataset.startswith("emoji"):
        raise ValueError("--data-path is missing: a store of codes, as autoregressive/train/extract_codes_t2i.py "
                         "writes it, or captioned pictures")
    elif len(names) == 1 and not is_url(names[0]) and "{" not in names[0] and not Path(names[0]).exists():
        raise FileNotFoundError(f"there is no --data-path {names[0]}")
    elif tokenizer is None:
        raise ValueError(f"{flags.source} holds pictures: give --vq-ckpt, the tokenizer that makes "
                         "their codes in the loop, or extract them with autoregressive/train/extract_codes_t2i.py")
    else:
        size = flags.image_size or ONLINE_SIZE
        reader = PictureReader(exif_orientation=flags.exif_orientation)
        pairs = flagged_pairs(flags, reader=reader, smallest=flags.least(size), emoji_size=max(size))
        stores = [OnlineCodes(pairs, tokenizer[1], name=tokenizer[0], size=size)]
    for column, path in (("features", flags.t5_feat_path), ("short_features", flags.short_t5_feat_path)):
        if path is None:
            continue
        paths = path.split(",")
        if len(paths) != len(stores):
            raise ValueError(f"{len(paths)} folders of features for {len(stores)} of codes: give one for each, in the "
                             "same order, with commas between")
        for store, one in zip(stores, paths, strict=True):
            attach_features(store, one, column=column)
    if len(stores) > 1:
        return Mixture(names, stores, flags.store_weights or (1.0,) * len(stores))
    if flags.store_weights is not None:
        raise ValueError("--store-weights is for several stores in --data-path, with commas between")
    stores[0].leave_out(stores[0].damaged)
    return stores[0]


def open_texts(flags: T2ITrainFlags, tokenizer: tuple[str, VQModel] | None, *,
               device: torch.device) -> tuple[CodeStore, Condition]:
    """The data of --data-path, whose images have captions, and the features of these. Raises ValueError for what does
    not fit together."""
    if flags.gpt_type != "t2i":
        raise ValueError("--gpt-type c2i: this command trains on captions, autoregressive/train/train.py on classes")
    if flags.control is not None:
        raise ValueError(f"--control {flags.control}: control pictures are for models of classes, whose codes are "
                         "extracted with them")
    if not 0 <= flags.short_caption_share <= 1:
        raise ValueError(f"--short-caption-share is {flags.short_caption_share}, expected a share from 0 to 1")
    if flags.text_features == "online" and (flags.t5_feat_path or flags.short_t5_feat_path):
        raise ValueError("--text-features online makes the features in the loop: leave --t5-feat-path and "
                         "--short-t5-feat-path out")
    store = open_captioned(flags, tokenizer)
    check_described(store, flags)
    if flags.text_features == "stored" and "features" not in store.columns:
        raise ValueError("--t5-feat-path is missing: where are the features of the captions? "
                         "language/extract_t5_feature.py makes them, or give --text-features online")
    if flags.text_features == "online" and "caption" not in store.columns:
        raise ValueError(f"{flags.source} holds no captions for --text-features online: give --t5-feat-path")
    columns = TextColumns(store, features=flags.text_features == "stored", short_share=flags.short_caption_share)
    encoder: TextEncoder | None = None
    if columns.features:
        facts = feature_facts(store)
        width, described = facts.dim, facts.encoder
        most = (described or {}).get("max_tokens") or MOST_TOKENS
    else:
        dtype = dist.compute_dtype(flags.mixed_precision, device)
        encoder = load_text_encoder(flags, device=device, dtype=dtype)
        width, most, described = encoder.dim, encoder.max_tokens, encoder.described
    return store, Texts(store, columns, cls_token_num=flags.cls_token_num or most, caption_dim=width, encoder=encoder,
                        described=described)
