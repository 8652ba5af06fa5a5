"""COCO FID and CLIP score of text-to-image samples, by the protocol of LlamaGen's paper (arXiv 2406.06525).

    python3 evaluations/t2i/evaluation.py --fake-dir samples/t2i --ref-dir val2014 --inception inception-2015-12-05.pt

--fake-dir holds images/ and captions.txt, as the sampler writes them. Results go to score.txt and score.json there,
with everything that decides whether they can be compared with others'. Under torchrun the work is shared.

COCO FID is clean-fid's (arXiv 2104.11222), which is another metric than ADM's: all captioned samples against the whole
reference folder; centre square, Lanczos to --eval-res, then Pillow's bicubic filter in floats to 299.
"""
import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluations.c2i.inception import POOL_DIM, FIDInception
from evaluations.c2i.inception_weights import InceptionFlags, load_inception
from evaluations.c2i.metrics import FeatureStatistics, frechet_distance
from evaluations.t2i.clip_score import CLIP_MODELS, CLIP_PROTOCOL, OPENAI, ClipNetwork, clip_score, load_clip
from evaluations.t2i.sample_folder import SampleFolderFlags, Squares, image_files, read_samples, share_of
from utils import cli, dist
from utils.cli import flag
from utils.files import replacing
from utils.options import WorkerFlags

COCO_VAL2014 = 40_504  # images
FID_PROTOCOL = "clean-fid, mode clean; all samples, centre square, LANCZOS (GigaGAN)"
NO_CLIP = "none"


@dataclass(kw_only=True)
class T2IEvaluationFlags(SampleFolderFlags, InceptionFlags, WorkerFlags):
    """The text-to-image scoring command."""

    ref_dir: str | None = flag(None, "folder of real images for FID, such as COCO's val2014; None: no FID")
    ref_data: str = flag("coco2014", "name of the real images, for score.json; coco2014 should be all of val2014")
    ref_type: str = flag("train/valid/test", "which part of them, for score.json")
    how_many: int = flag(30000, "the CLIP score is of the first so many samples")
    clip_model4eval: str = flag(OPENAI, f"CLIP model: {', '.join(CLIP_MODELS)}, with --clip-weights any that open_clip "
                                        f"has; {NO_CLIP}: no CLIP score")
    clip_weights: str | None = flag(None, "file with the weights of the CLIP model; None: open_clip downloads it")
    eval_res: int = flag(256, "side to which samples and real images are resized first, pixels")
    batch_size: int = flag(8, "images at a time on each process; the results do not depend on it")


def clean_view(image: Image.Image) -> Tensor:
    """A picture as clean-fid shows it to Inception: (3, 299, 299) float32 in [0, 255], not rounded."""
    try:
        from cleanfid.resize import build_resizer
    except ImportError:
        raise ValueError("COCO FID needs clean-fid: pip install clean-fid") from None
    return torch.from_numpy(build_resizer("clean")(np.asarray(image))).permute(2, 0, 1)


@torch.inference_mode()
def inception_statistics(network: FIDInception, files: list[Path], process: dist.Process, flags: T2IEvaluationFlags, *,
                         title: str) -> FeatureStatistics:
    """Mean and covariance of the pooled features of all files, the same on every process."""
    statistics = FeatureStatistics(POOL_DIM, device=process.device)
    squares = Squares(files, flags.eval_res, clean_view)
    for _, views in share_of(squares, process, batch_size=flags.batch_size, num_workers=flags.num_workers, title=title):
        statistics.update(network(views.to(process.device))[0])
    statistics.merge()
    return statistics


def coco_fid(network: FIDInception, files: list[Path], reference: list[Path], process: dist.Process,
             flags: T2IEvaluationFlags) -> float:
    """The Fréchet distance (arXiv 1706.08500) between two lists of image files."""
    ours, theirs = (inception_statistics(network, part, process, flags, title=title)
                    for part, title in ((files, "FID, samples"), (reference, "FID, reference")))
    return float(frechet_distance(ours.mean(), ours.covariance(), theirs.mean(), theirs.covariance()))


def remarks(flags: T2IEvaluationFlags, *, samples: int, padding: int, reference: int | None) -> list[str]:
    """Why the numbers cannot be compared with published ones."""
    found = []
    if padding:
        found.append(f"{padding} images without a line in captions.txt are padding: not counted")
    if flags.clip_model4eval != NO_CLIP and samples < flags.how_many:
        found.append(f"{samples} samples, --how-many is {flags.how_many}")
    if reference is not None and samples < POOL_DIM:
        found.append(f"FID of {samples} samples is mostly bias: at least {POOL_DIM} are needed, 30000 are usual")
    if reference is not None and flags.ref_data == "coco2014" and reference != COCO_VAL2014:
        found.append(f"{flags.ref_dir} has {reference} images, val2014 has {COCO_VAL2014}: another FID than the usual")
    return found


def check_request(flags: T2IEvaluationFlags) -> None:
    """Raise ValueError for flags that ask for nothing or nonsense."""
    if min(flags.how_many, flags.eval_res, flags.batch_size) < 1:
        raise ValueError("--how-many, --eval-res and --batch-size must be at least 1")
    if flags.clip_model4eval == NO_CLIP and flags.ref_dir is None:
        raise ValueError(f"nothing to score: give --ref-dir for FID, or a --clip-model4eval other than {NO_CLIP}")


def main(flags: T2IEvaluationFlags) -> None:
    """Score and write what was asked for."""
    process = dist.setup()
    check_request(flags)
    files, captions, padding = read_samples(Path(flags.fake_dir))
    reference = image_files(Path(flags.ref_dir), "--ref-dir") if flags.ref_dir else None
    clip: ClipNetwork | None = None
    if flags.clip_model4eval != NO_CLIP:
        clip = load_clip(flags.clip_model4eval, flags.clip_weights, device=process.device)
    if reference:
        if min(len(files), len(reference)) < 2:
            raise ValueError(f"FID needs 2 images on either side, got {len(files)} samples and {len(reference)} real")
        clean_view(Image.new("RGB", (8, 8)))  # raises if clean-fid is not installed
        inception, weights_file = load_inception(flags.inception, device=process.device)
    notes = remarks(flags, samples=len(files), padding=padding, reference=len(reference) if reference else None)
    for note in notes if process.is_main else ():
        cli.warn(note)

    result: dict[str, Any] = {"eval_res": flags.eval_res, "notes": notes}
    if clip is not None:
        first = files[:flags.how_many]
        score = clip_score(clip, first, captions, process, size=flags.eval_res, batch_size=flags.batch_size,
                           num_workers=flags.num_workers)
        result |= {"clip_score": score, "clip_protocol": CLIP_PROTOCOL, "clip_images": len(first),
                   "clip": clip.described}
    if reference:
        result |= {"fid": coco_fid(inception, files, reference, process, flags), "fid_protocol": FID_PROTOCOL,
                   "fid_images": len(files), "inception": weights_file, "reference": flags.ref_dir,
                   "reference_data": flags.ref_data, "reference_type": flags.ref_type,
                   "reference_images": len(reference)}
    if process.is_main:
        write_scores(Path(flags.fake_dir), result)
    dist.barrier()


def write_scores(folder: Path, result: dict[str, Any]) -> None:
    """Print the scores and write score.txt and score.json."""
    lines, packages = [], ["torch", "torchvision", "pillow"]
    if "clip_score" in result:
        lines.append(f"CLIP score: {result['clip_score']:.6f}")
        packages.append("open_clip_torch")
    if "fid" in result:
        lines.append(f"FID_{result['eval_res']}px: {result['fid']:.6f}")
        packages.append("clean-fid")
    result["versions"] = {name: importlib.metadata.version(name) for name in packages}
    for name, text in (("score.json", json.dumps(result, indent=2)), ("score.txt", "\n".join(lines))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, T2IEvaluationFlags)
