"""Turn captions into text features, which training reads instead of running the text encoder in every step.

    bash scripts/language/extract_flan_t5_feat_laion_coco_stage1.sh --data-path /data/codes/t2i256_codes \\
        --t5-path /data/features --t5-model-path pretrained_models/t5-ckpt

--data-path: a store of codes, as autoregressive/train/extract_codes_t2i.py writes it, whose captions are taken row by
row; or captioned pictures in any layout of dataset/t2i.py, which need not be encoded before. The features go to
--t5-path (with --data-start or --data-end to a folder <first>-<last> in it). Run again to continue after an
interruption; under torchrun the work is shared, and the files are the same for any number of processes. Loading
processes read and clean the captions meanwhile.
"""
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset import code_writer
from dataset.build import PairFlags, flagged_pairs
from dataset.code_layouts import CodeStore
from dataset.code_manifest import FEATURES, Column
from dataset.codes import open_store
from dataset.loader import worker_count
from dataset.pairs import PairProblemError, Pairs
from dataset.part_work import Part, complete_store
from dataset.remote import is_url
from dataset.text_codes import holds_codes
from dataset.text_features import as_stored, captions_hash, rows_hash
from language.caption import clean_caption
from language.text_encoder import TextEncoder, TextEncoderFlags, load_text_encoder
from utils import cli, dist
from utils.cli import flag
from utils.files import plain
from utils.options import PrecisionFlags, SeedFlags, WorkerFlags

AT_ONCE = 256  # captions that a loading process reads at a time
SHOWN = 3  # captions that are printed as examples
SENTENCE = re.compile(r"[^.!?]*[.!?](?=\s|$)", re.DOTALL)
CaptionKey = Literal["blip", "llava", "llava_first"]


@dataclass(kw_only=True)
class TextFeatureFlags(PairFlags, TextEncoderFlags, PrecisionFlags, SeedFlags, WorkerFlags):
    """The feature extraction command. --global-seed draws the captions that are printed as examples."""

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
        return {"source": self.source, "rows": rows_hash(self.store), "contents": captions_hash(self.store)}


class PairCaptions:
    """The captions of pictures that need not be encoded yet."""

    def __init__(self, pairs: Pairs, source: str) -> None:
        self.pairs, self.source = pairs, source

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, rows: np.ndarray) -> list[tuple[str, str, str]]:
        """See `StoreCaptions`."""
        try:
            found = [(self.pairs.name(row), *self.pairs.captions(row)) for row in rows.tolist()]
        except PairProblemError as error:  # a loading process could not pass it on
            raise ValueError(f"{self.source} has changed since it was opened: {error}; run it again") from None
        return [(name, long, short or "") for name, long, short in found]

    def identity(self) -> dict[str, Any]:
        """See `StoreCaptions`."""
        states = self.pairs.states()
        return {"source": self.source, "rows": None, "image_names": states["image_names"],
                "contents": states["image_sizes"]}


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
    if path is None or not holds_codes(path):
        return PairCaptions(flagged_pairs(flags), Path(path or flags.dataset).name)
    if flags.data_start is not None or flags.data_end is not None:
        raise ValueError("--data-start and --data-end choose among .jsonl files or archives; features of a store of "
                         "codes are of all its captions")
    return StoreCaptions(open_store(path))


class CleanedCaptions(Dataset):
    """Rows (a range) → (their names, their cleaned captions)."""

    def __init__(self, captions: StoreCaptions | PairCaptions, flags: TextFeatureFlags) -> None:
        self.captions, self.flags = captions, flags

    def __getitem__(self, rows: range) -> tuple[list[str], list[str]]:
        found, flags = self.captions.read(np.array(rows)), self.flags
        chosen = [chosen_caption(long, short, flags.caption_key, trunc=flags.trunc_caption) for _, long, short in found]
        return [name for name, _, _ in found], [clean_caption(caption) for caption in chosen]

    def loaded(self, parts: list[Part]) -> Iterator[tuple[list[str], list[str]]]:
        """All rows of the parts, AT_ONCE of a part at a time, in order."""
        chunks = [rows[first:first + AT_ONCE] for _, rows in parts for first in range(0, len(rows), AT_ONCE)]
        workers = worker_count(self.flags.num_workers) if len(chunks) > 1 else 0
        return iter(DataLoader(self, batch_size=None, sampler=chunks, num_workers=workers))


def write_features(captions: StoreCaptions | PairCaptions, encoder: TextEncoder, folder: Path, parts: list[Part], *,
                   flags: TextFeatureFlags) -> int:
    """Write this process's parts → how many captions they have."""
    loaded = CleanedCaptions(captions, flags).loaded(parts)
    with tqdm(total=sum(len(rows) for _, rows in parts), desc=f"{encoder.described['name']} features", unit="caption",
              mininterval=1.0, disable=dist.env_rank() > 0) as bar:
        for number, rows in parts:
            names, features = [], []
            while len(names) < len(rows):
                some, cleaned = next(loaded)
                names += some
                features += [as_stored(one) for one in encoder.features_of(cleaned)]
                bar.update(len(some))
            code_writer.write_part(folder, number, None, [], columns={"name": names, "features": features})
    return sum(len(rows) for _, rows in parts)


def show_examples(captions: StoreCaptions | PairCaptions, encoder: TextEncoder, flags: TextFeatureFlags) -> None:
    """Print what becomes of some captions, drawn by --global-seed."""
    count = min(SHOWN, len(captions))
    drawn = np.sort(np.random.default_rng(flags.global_seed).choice(len(captions), count, replace=False))
    for row in drawn.tolist():
        (name,), (cleaned,) = CleanedCaptions(captions, flags)[range(row, row + 1)]
        shown = cleaned if len(cleaned) <= 80 else f"{cleaned[:79]}…"
        cli.say(f"{plain(name)}: {shown!r}, {len(encoder.tokens(cleaned))} tokens")


def main(flags: TextFeatureFlags) -> None:
    """Make the features that are not there yet."""
    process = dist.setup()
    if is_url(flags.t5_path):
        raise ValueError(f"--t5-path {flags.t5_path} is a URL: write to a folder, and upload that")
    captions = open_captions(flags)
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32  # in fp16 T5 overflows
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
    show_examples(captions, encoder, flags)
    start, written = time.perf_counter(), []
    manifest, new = complete_store(folder, recipe, len(captions), write_parts=lambda parts: written.append(
        write_features(captions, encoder, folder, parts, flags=flags)))
    written = sum(dist.gather_lists(written))
    if process.is_main and not new:
        print(f"{folder} is complete: nothing to do")
    elif process.is_main:
        count, seconds = manifest["count"], time.perf_counter() - start
        size = sum(path.stat().st_size for path in folder.glob("features-*.npy"))
        print(f"{count} captions x {size / count:.0f} bytes of {encoder.described['name']} features in {folder}, "
              f"of which this run made {written} in {seconds:.1f} s, {written / seconds:.0f} captions/s")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, TextFeatureFlags)
