"""Is my run right? Looks at a store of codes and, if there is one, at the log of a training on it.

    python3 autoregressive/train/doctor.py --code-path /data/codes --vq-ckpt vq_ds16_c2i.pt --gpt-model GPT-B
    python3 autoregressive/train/doctor.py --run-folder results/000-GPT-B

The first form is for before a training, the second for during and after it: codes, tokenizer and settings are those in
the run's config.json, unless they are given. Prints one line per check, with what to do. A new model of the run's size
is built to see its first loss, in one process: where memory is short, name a smaller --gpt-model.
Pictures go to --output (<run-folder>/doctor, without a run results/doctor): random codes, decoded, beside their labels;
how many images each class has; the loss with the published ones. Exit code 0: no problem, 1: a problem, 2: misuse.
"""
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.config import GPTSizeFlags, GPTTrainFlags
from autoregressive.train.log_checks import FIRST_LOSS, Finding, Run, against, check_rate, check_run, conclusion
from autoregressive.train.open_data import open_classes
from autoregressive.train.published_losses import PUBLISHED
from autoregressive.train.train import DEFAULT_VOCAB, build_model
from dataset.build import DatasetFlags
from dataset.code_manifest import same_tokenizer, tokenizer_name
from dataset.codes import CodeStore, CorruptShards, StoreFlags
from tokenizer.build import ImageTokenizer, TokenizerFlags, decode_images, describe_tokenizer, load_tokenizer
from utils import cli, dist, images
from utils.checkpoints.hub import hub_name
from utils.cli import flag
from utils.files import plain
from utils.options import OutputFlags, RecipeFlags, SeedFlags
from utils.training.flags import RateFlags
from utils.training.logger import read_metrics
from utils.training.optim import Kind

SAMPLE = 2000  # images whose codes are examined
SHOWN = 24  # images in the picture
NAMED = 40  # classes that have room for their names in the histogram
BATCH = 4  # images on which an untrained model's loss is computed
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


@dataclass(kw_only=True)
class DoctorFlags(RecipeFlags, StoreFlags, DatasetFlags, TokenizerFlags, GPTSizeFlags, RateFlags, SeedFlags,
                  OutputFlags):
    """What is checked. Settings that are left out are those of --run-folder, without one a training's defaults."""

    recipe_in_part: ClassVar[bool] = True  # a training's recipe has many flags that do not matter here
    run_folder: str | None = flag(None, "folder of a GPT training whose metrics.jsonl and config.json are to be judged")
    code_path: str | None = None
    corrupt_shards: CorruptShards | None = None
    dataset: str | None = None
    optimizer: Kind | None = None
    lr: float | None = None
    global_batch_size: int | None = None
    global_seed: int | None = None
    output: str | None = None


def training_flags(flags: DoctorFlags, config: dict[str, Any]) -> GPTTrainFlags:
    """What a training was or would be started with: what is typed, else what the run's config.json says."""
    known = {field.name for field in fields(GPTTrainFlags)}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    if settings.get("vq_ckpt") and not Path(settings["vq_ckpt"]).exists() and hub_name(settings["vq_ckpt"]) is None:
        del settings["vq_ckpt"]  # moved, or relative to another folder; only the pictures need it
    settings |= {name: value for name, value in vars(flags).items() if value is not None}
    if settings.get("code_path") is None:
        raise ValueError("--code-path is missing: which store of codes? Or give --run-folder, a training on it")
    return GPTTrainFlags(**{name: value for name, value in settings.items() if name in known})


@dataclass
class Sample:
    """Codes of random images of a store, each in a random view."""

    codes: np.ndarray  # (n, L)
    labels: np.ndarray  # (n,)
    vocab: int

    @property
    def counts(self) -> np.ndarray:
        """How often each code occurs, (V,) or longer if there are codes beyond V."""
        return np.bincount(self.codes.ravel(), minlength=self.vocab)

    @property
    def entropy(self) -> float:
        """Entropy of single codes in nats, with Miller's correction for a finite sample: + (used - 1) / 2n."""
        share = self.counts[self.counts > 0] / self.codes.size
        return float(-(share * np.log(share)).sum() + (len(share) - 1) / (2 * self.codes.size))


def draw_sample(store: CodeStore, *, vocab: int, seed: int) -> Sample:
    """Up to SAMPLE random images."""
    random, count = np.random.default_rng(seed), len(store.labels)  # each image once, whatever --store-weights says
    rows = np.sort(random.choice(count, min(SAMPLE, count), replace=False))
    return Sample(store.read(rows, random.integers(store.views, size=len(rows))), store.labels[rows], vocab)


def check_classes(store: CodeStore) -> Finding:
    """The label histogram; was --data-path the folder above the classes by mistake?"""
    counts = np.bincount(store.labels, minlength=store.num_classes)
    names = store.classes or [str(label) for label in range(len(counts))]
    empty, full = np.flatnonzero(counts == 0), counts[counts > 0]
    text = f"{len(counts)} classes of {full.min()} to {full.max()} images"
    if store.classes and {name.lower() for name in store.classes} <= SPLITS:
        return Finding("classes", "problem", f"{text}, named {', '.join(store.classes)}: these are parts of a set, no "
                                             "classes. Extract again with --data-path one folder further down")
    if not store.classes and len(counts) == 2 and full.max() > 20 * full.min():
        return Finding("classes", "warning", f"{text}: train/ and val/ of ImageNet look so, when --data-path was the "
                                             "folder above them")
    if len(empty):
        return Finding("classes", "warning", f"{text}; {len(empty)} have none, such as {names[empty[0]]}: the model "
                                             "cannot learn those")
    if full.max() > 10 * full.min():
        rare = names[int(counts.argmin())]
        return Finding("classes", "warning", f"{text}: rare ones such as {rare} will be learned less well")
    return Finding("classes", "ok", text)


def check_tokenizer(store: CodeStore, tokenizer: ImageTokenizer, source: str) -> Iterator[Finding]:
    """Whether a tokenizer is the one that made the codes, by its size and its hash."""
    made = store.manifest.get("tokenizer", {})
    if store.vocab_size not in (None, tokenizer.codebook_size):
        yield Finding("vocabulary", "problem", f"the codes are of a codebook of {store.vocab_size}, {source} has "
                                               f"{tokenizer.codebook_size}: give the tokenizer that made them")
        return
    if made.get("downsample") not in (None, tokenizer.downsample):
        yield Finding("grid", "problem", f"the codes have {made['downsample']} pixels per side of a token, {source} "
                                         f"{tokenizer.downsample}")
    else:
        size = "x".join(str(side * tokenizer.downsample) for side in store.grid)
        yield Finding("grid", "ok", f"{store.grid[0]}x{store.grid[1]} tokens, {size} pixels")
    if "weights_sha256" not in made:
        yield Finding("tokenizer", "warning", "the store does not say which tokenizer made it: judge by the picture")
    elif same_tokenizer(made, own := describe_tokenizer("tokenizer", tokenizer)) is False:
        yield Finding("tokenizer", "problem", f"{source} is not the tokenizer that made the codes (its weights have "
                                              f"another hash, {tokenizer_name(own)}, not {tokenizer_name(made)}): its "
                                              "pictures of them will be wrong")
    else:
        yield Finding("tokenizer", "ok", f"{source} made the codes")


def check_codes(sample: Sample) -> Iterator[Finding]:
    """Range, share of the codebook, entropy, and images that occur twice."""
    counts, size = sample.counts, sample.vocab
    if len(counts) > size:
        yield Finding("vocabulary", "problem", f"the store holds code {len(counts) - 1}, the vocabulary is {size}: "
                                               "give the tokenizer's by --vocab-size")
    used, possible = int((counts > 0).sum()), min(size, sample.codes.size)
    text = (f"{used / size:.1%} of {size} codes occur in {len(sample.codes)} images, perplexity "
            f"{math.exp(sample.entropy):.0f}")
    if used < 0.05 * possible:
        yield Finding("codebook", "problem", f"{text}: it has collapsed. Train the tokenizer again with a lower --lr "
                                             "or --entropy-loss-ratio 0.1, or look for a broken extraction")
    elif used < 0.3 * possible:
        yield Finding("codebook", "warning", f"{text}: most codes are never used, a smaller codebook would do as well")
    else:
        yield Finding("codebook", "ok", text)
    again = 1 - len(np.unique(sample.codes, axis=0)) / len(sample.codes)
    text = f"{again:.1%} of {len(sample.codes)} images have the codes of another one"
    if again > 0.2:
        yield Finding("duplicates", "problem", f"{text}: the extraction or the data are broken, look at the picture")
    else:
        yield Finding("duplicates", "warning" if again > 0.01 else "ok",
                      text + (": copies in the data, or the tokenizer sees no difference" if again > 0.01 else ""))
    yield Finding("reference", "ok", f"ln {size} = {math.log(size):.3f} nats is the loss of guessing; "
                                     f"a trained model gets below {sample.entropy:.3f}, the entropy of single codes")


def check_untrained(flags: GPTTrainFlags, name: str, store: CodeStore, sample: Sample, device: torch.device) -> Finding:
    """Loss and gradient of a new model, on real codes."""
    torch.manual_seed(flags.global_seed)
    classes = flags.num_classes or store.num_classes
    model = build_model(flags, name, store, num_classes=classes)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        model.init_weights(flags.global_seed)
    model = model.to(device).train()
    codes, labels = (torch.from_numpy(part[:BATCH]).to(device) for part in (sample.codes, sample.labels))
    _, loss = model(codes[:, :-1], labels, targets=codes)
    loss.backward()
    expected, found = math.log(model.config.vocab_size), float(loss.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    text = f"{found:.4f} of a new {name}, ln {model.config.vocab_size} = {expected:.4f}"
    if not abs(found - expected) < FIRST_LOSS:
        return Finding("first loss", "problem", f"{text}: the head does not start at zero, or targets are out of range")
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return Finding("first loss", "problem", f"{text}, but the gradient is not finite")
    return Finding("first loss", "ok", f"{text}; the gradient is finite")


def check_store(flags: GPTTrainFlags, name: str, store: CodeStore, sample: Sample, tokenizer: ImageTokenizer | None,
                device: torch.device) -> list[Finding]:
    """All checks that need no training."""
    size = f"{store.views} views of {store.grid[0]}x{store.grid[1]} codes"
    found = [Finding("store", "ok", f"{len(store)} images, {size}"), check_classes(store)]
    if tokenizer is None:
        found.append(Finding("tokenizer", "warning", "not given: with --vq-ckpt the codes are decoded to look at"))
    else:
        found += check_tokenizer(store, tokenizer, flags.vq_ckpt)
    found += check_codes(sample)
    if sample.codes.max() < sample.vocab:
        found.append(check_untrained(flags, name, store, sample, device))
    return found


def open_run(folder: Path) -> Run:
    """A run's log and settings. Raises FileNotFoundError or ValueError when there are none."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--run-folder {folder} has no config.json: expected a run, such as results/000-GPT-B")
    rows = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl")}
    for row in read_metrics(folder / "speed.jsonl"):
        rows[row["step"]] = rows.get(row["step"], {}) | row
    return Run([rows[step] for step in sorted(rows)], json.loads((folder / "config.json").read_text()))


def check_data(run: Run, store: CodeStore, store_flags: GPTTrainFlags) -> Finding:
    """Whether a run was on these codes."""
    flags = {name: (run.config.get(name), getattr(store_flags, name))
             for name in ("num_classes", "store_weights", "corrupt_shards")}
    other = [f"--{name.replace('_', '-')} (the run: {theirs})" for name, (theirs, mine) in flags.items()
             if name in run.config and theirs != (list(mine) if isinstance(mine, tuple) else mine)]
    differs = [what for what, mine, theirs in (("number of images", run.images, len(store)),
                                               ("grid", tuple(run.model["grid"]), store.grid),
                                               ("list of classes", run.model.get("classes"), store.classes))
               if mine != theirs]
    if differs:
        return Finding("data", "problem", f"the run was trained on other codes, with another {', '.join(differs)}: "
                                          f"judge it with the {' and '.join(['--code-path', *other])} that it was "
                                          "trained on")
    return Finding("data", "ok", "the run is of these codes: images, grid and class names agree")


def decoded(store: CodeStore, sample: Sample, tokenizer: ImageTokenizer) -> np.ndarray:
    """Some images from their codes, above their labels → uint8 (H, W, 3)."""
    chosen = np.linspace(0, len(sample.codes) - 1, min(SHOWN, len(sample.codes))).round().astype(int)
    names = [store.classes[label] if store.classes else str(label) for label in sample.labels[chosen]]
    codes = torch.from_numpy(sample.codes[chosen]).to(next(tokenizer.parameters()).device)
    return images.grid(images.to_uint8(decode_images(tokenizer, codes, store.grid)), columns=8, labels=names)


def plot(folder: Path, store: CodeStore, sample: Sample, run: Run | None) -> None:
    """labels.png, and of a run loss.png, in `folder`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    axes.bar(range(store.num_classes), np.bincount(store.labels, minlength=store.num_classes), width=1.0)
    axes.set(xlabel="label", ylabel="images", title=f"{len(store.labels)} images of {store.num_classes} classes")
    if store.classes and store.num_classes <= NAMED:
        axes.set_xticks(range(store.num_classes), store.classes, rotation=90)
    figure.savefig(folder / "labels.png", dpi=110, bbox_inches="tight")
    if run is None:
        return
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    axes.plot(run.steps, run.losses, label="this run")
    axes.axhline(math.log(sample.vocab), color="grey", linestyle=":", label=f"ln {sample.vocab} (knows nothing)")
    axes.axhline(sample.entropy, color="grey", linestyle="--", label="entropy of single codes")
    for curve in PUBLISHED:
        points = [(step, loss) for step, _, loss in against(curve, run)]
        if points:
            axes.plot(*zip(*points, strict=True), "x", label=curve.name)
    axes.set(xlabel="step", ylabel="loss, nats per code")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=110, bbox_inches="tight")


def main(doctor_flags: DoctorFlags) -> None:
    """Check, draw, print; exit 1 when there is a problem."""
    cli.require_package("matplotlib", purpose="the doctor, which draws plots,")
    process = dist.setup()
    run = None if doctor_flags.run_folder is None else open_run(Path(doctor_flags.run_folder))
    flags = training_flags(doctor_flags, run.config if run else {})
    store, _ = open_classes(flags)
    tokenizer = None if flags.vq_ckpt is None else load_tokenizer(flags, device=process.device)[1]
    sample = draw_sample(store, vocab=flags.vocab_size or store.vocab_size or DEFAULT_VOCAB, seed=flags.global_seed)
    name = flags.gpt_model or (run and run.model["gpt_model"]) or "GPT-B"
    found = check_store(flags, name, store, sample, tokenizer, process.device)
    if run:
        found += [check_data(run, store, flags), *check_run(run, sample.entropy)]
    else:
        found.append(check_rate({key: getattr(flags, key) for key in ("optimizer", "lr", "global_batch_size")}, name))
    folder = Path(doctor_flags.output or Path(doctor_flags.run_folder or "results") / "doctor")
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and sample.codes.max() < tokenizer.codebook_size:
        images.save_png(folder / "codes.png", decoded(store, sample, tokenizer))
    plot(folder, store, sample, run)
    for finding in found:
        print(f"{finding.grade:<8}{finding.topic:<12}{plain(finding.text)}")
    print(f"pictures: {folder}")
    if run:
        print(f"verdict: {conclusion(run, found, sample.entropy)}")
    if any(finding.grade == "problem" for finding in found):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, DoctorFlags)
