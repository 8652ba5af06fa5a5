"""Reconstructions under the names that LlamaGen's scripts give them, beside ours, which tell the checkpoint too.

    reconstructions/VQ-16-imagenet-size-256-size-256-codebook-size-16384-dim-8-seed-0.npz   a link to our npz
    reconstructions/VQ-16-imagenet-size-256-size-256-codebook-size-16384-dim-8-seed-0_results.txt   PSNR: …, SSIM: …
    reconstructions/val_imagenet.npz                                                        a link to the reference set

So `python3 evaluations/c2i/evaluator.py reconstructions/val_imagenet.npz reconstructions/VQ-16-….npz` works as written
in LlamaGen's documents. The SSIM is LlamaGen's (`ssim_llamagen`). The last run of a name has it.
"""
import math
import os
import secrets
from pathlib import Path

from tokenizer.reconstructors import Reconstructor, ReconstructorFlags, ThroughCodes
from utils import cli
from utils.files import first_line, replacing


def original_name(flags: ReconstructorFlags, reconstructor: Reconstructor, *, dataset: str, size: tuple[int, int],
                  scored: tuple[int, int]) -> str:
    """What LlamaGen calls this set."""
    seed = f"seed-{flags.global_seed}"
    if flags.reconstructor == "identity":
        return f"val_{dataset}"
    if flags.reconstructor != "vq":
        return f"{reconstructor.name}-{dataset}-size-{cli.shown_size(size)}-{seed}"
    assert isinstance(reconstructor, ThroughCodes)
    config = reconstructor.model.config
    return (f"{reconstructor.name}-{dataset}-size-{cli.shown_size(size)}-size-{cli.shown_size(scored)}"
            f"-codebook-size-{config.codebook_size}-dim-{config.codebook_embed_dim}-{seed}")


def give_original_name(folder: Path, name: str, *, psnr: float | None = None, ssim: float | None = None) -> str:
    """Link <name>.npz to the npz of the set `folder`, and with an SSIM write <name>_results.txt.

    psnr in dB (None: all images are identical), ssim as LlamaGen has it. Files of these names that are no link of ours
    are left alone. Returns a line about what could not be done, "" if all was.
    """
    link, report = folder.with_name(f"{name}.npz"), folder.with_name(f"{name}_results.txt")
    ours = link.is_symlink() and os.path.dirname(os.readlink(link)) == ""
    if not ours and (os.path.lexists(link) or report.exists()):
        there = link if os.path.lexists(link) else report
        return f"{there} is there already, from LlamaGen perhaps, and is left as it is: this set is {folder.name}.npz"
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.symlink_to(f"{folder.name}.npz")
        temporary.replace(link)
    except OSError as error:  # not every file system has links
        return f"no link {link} could be made ({first_line(error)}): this set is {folder.name}.npz"
    if ssim is not None:
        with replacing(report) as file:
            file.write_text(f"PSNR: {math.inf if psnr is None else psnr:f}, SSIM: {ssim:f}\n")
    return ""
