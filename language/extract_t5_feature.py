"""Turn captions into text features, which training reads instead of running the text encoder in every step.

    bash scripts/language/extract_flan_t5_feat_laion_coco_stage1.sh --data-path /data/codes/t2i256_codes \\
        --t5-path /data/features --t5-model-path pretrained_models/t5-ckpt

--data-path: a store of codes, as autoregressive/train/extract_codes_t2i.py writes it, whose captions are taken row by
row; or captioned pictures in any layout of dataset/t2i.py, which need not be encoded before. The features go to
--t5-path (with --data-start or --data-end to a folder <first>-<last> in it). Run again to continue after an
interruption; under torchrun the work is shared, and the files are the same for any number of processes.
"""
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import code_writer
from dataset.build import PairFlags, flagged_pairs
from dataset.code_layouts import CodeStore, find_store
from dataset.code_manifest import FEATURES, Column
from dataset.codes import open_store
from dataset.pairs import Pairs
from dataset.part_work import Part, complete_store
from dataset.remote import is_url
from dataset.text_features import as_stored, rows_hash
from language.text_encoder import TextEncoder, TextEncoderFlags, load_text_encoder
from utils import cli, dist
from utils.cli import flag
from utils.options import PrecisionFlags

AT_ONCE = 256  # captions between two steps of the bar
SENTENCE = re.compile(r"[^.!?]*[.!?](?=\s|$)", re.DOTALL)
CaptionKey = Literal["blip", "llava", "llava_first"]


@dataclass(kw_only=True)
class TextFeatureFlags(PairFlags, TextEncoderFlags, PrecisionFlags):
    """The feature extraction command."""

    t5_path: str = cli.REQUIRED
    t5_model_path: str = flag("./pretrained_models/t5-ckpt", "folder of text encoders: see --t5-model-type")
    caption_key: CaptionKey = flag("blip", "blip: the short caption (the only one, where there is one); llava: the "
                                           "long one; llava_first: the first sentence of the long one",
                                   choices=("blip", "llava", "llava_first"))
    trunc_caption: bool = flag(False, "the first sentence of the caption only")


class StoreCaptions:
    """The captions of a store of codes."""

    def __init__(self, store: CodeStore) -> None:
        if not {"name", "caption"} <= store.columns.keys():
            raise ValueError(f"{store.folder} holds codes without captions: extract them with autoregressive/train/"
                             "extract_codes_t2i.py")
        self.store, self.source = store, str(store.folder.name)

    def __len__(self) -> int:
        return len(self.store.labels)

    def read(self, rows: np.ndarray) -> list[tuple[str, str, str]]:
        """(name, long caption, short one or "") of rows (B,)."""
        columns = [self.store.column(name, rows) if name in self.store.columns else [""] * len(rows)
                   for name in ("name", "caption", "short_caption")]
        return list(zip(*columns, strict=True))

    def identity(self) -> dict[str, Any]:
        """What the features' rows belong to, for their manifest."""
        return {"source": self.source, "rows": rows_hash(self.store)}


class PairCaptions:
    """The captions of pictures that need not be encoded yet."""

    def __init__(self, pairs: Pairs, source: str) -> None:
        self.pairs, self.source = pairs, source

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, rows: np.ndarray) -> list[tuple[str, str, str]]:
        """See `StoreCaptions`."""
        found = [(self.pairs.name(row), *self.pairs.captions(row)) for row in rows.tolist()]
        return [(name, long, short or "") for name, long, short in found]

    def identity(self) -> dict[str, Any]:
        """See `StoreCaptions`."""
        return {"source": self.source, "rows": None, "image_names": self.pairs.states()["image_names"]}


def chosen_caption(long: str, short: str, key: CaptionKey, *, trunc: bool) -> str:
    """The caption that --caption-key and --trunc-caption ask for."""
    caption = (short or long) if key == "blip" else long
    return first_sentence(caption) if trunc or key == "llava_first" else caption


def first_sentence(text: str) -> str:
    """What comes before the first full stop, question or exclamation mark that ends a word, with it."""
    found = SENTENCE.match(text)
    return found[0] if found and found[0].strip(" .!?") else text


def open_captions(flags: TextFeatureFlags) -> StoreCaptions | PairCaptions:
    """The captions of --data-path."""
    path = flags.data_path
    store = path is not None and ((is_url(path) and not path.endswith(".tar"))
                                  or (Path(path).is_dir() and find_store(Path(path), subfolder=None) is not None))
    if not store:
        return PairCaptions(flagged_pairs(flags), Path(path or flags.dataset).name)
    if flags.data_start is not None or flags.data_end is not None:
        raise ValueError("--data-start and --data-end choose among .jsonl files or archives; features of a store of "
                         "codes are of all its captions")
    return StoreCaptions(open_store(path))


def write_features(captions: StoreCaptions | PairCaptions, encoder: TextEncoder, folder: Path, parts: list[Part], *,
                   flags: TextFeatureFlags) -> None:
    """Write this process's parts."""
    with tqdm(total=sum(len(rows) for _, rows in parts), desc=f"{encoder.described['name']} features", unit="caption",
              mininterval=1.0, disable=dist.env_rank() > 0) as bar:
        for number, rows in parts:
            names, features = [], []
            for first in range(rows.start, rows.stop, AT_ONCE):
                found = captions.read(np.arange(first, min(first + AT_ONCE, rows.stop)))
                names += [name for name, _, _ in found]
                made = encoder([chosen_caption(long, short, flags.caption_key, trunc=flags.trunc_caption)
                                for _, long, short in found])
                features += [as_stored(one) for one in made]
                bar.update(len(found))
            code_writer.write_part(folder, number, None, [], columns={"name": names, "features": features})


@torch.inference_mode()
def main(flags: TextFeatureFlags) -> None:
    """Make the features that are not there yet."""
    process = dist.setup()
    if is_url(flags.t5_path):
        raise ValueError(f"--t5-path {flags.t5_path} is a URL: write to a folder, and upload that")
    captions = open_captions(flags)
    dtype = torch.float32 if flags.precision != "bf16" else torch.bfloat16
    encoder = load_text_encoder(TextEncoderFlags(
        t5_path=flags.t5_model_path, t5_model_type=flags.t5_model_type, t5_feature_max_len=flags.t5_feature_max_len,
        t5_feature_dim=flags.t5_feature_dim), device=process.device, dtype=dtype)
    some = flags.data_start is not None or flags.data_end is not None
    last = "end" if flags.data_end is None else flags.data_end
    folder = Path(flags.t5_path) / f"{flags.data_start or 0}-{last}" if some else Path(flags.t5_path)
    kind = "uint16" if dtype == torch.bfloat16 else "float32"
    columns = [Column("name", "text", "uint8"), Column("features", "ragged", kind, (encoder.dim,))]
    recipe = {"format": FEATURES, "text_encoder": encoder.described,
              "captions": {**captions.identity(), "key": flags.caption_key, "trunc": flags.trunc_caption},
              "columns": [{**vars(column), "shape": list(column.shape)} for column in columns]}
    start = time.perf_counter()
    manifest, new = complete_store(folder, recipe, len(captions), write_parts=lambda parts: write_features(
        captions, encoder, folder, parts, flags=flags))
    if process.is_main and not new:
        print(f"{folder} is complete: nothing to do")
    elif process.is_main:
        count, seconds = manifest["count"], time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.glob("features-*.npy"))
        print(f"{count} captions x {size / count:.0f} bytes of {encoder.described['name']} features in {folder}, "
              f"{seconds:.1f} s")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, TextFeatureFlags)
