"""The numbers that the reference implementation produces, and how far a device is from them.

For the tests on a CPU and for benchmarks/gpu_check.py on a GPU, so without pytest: functions return differences, the
caller says which are too large. Weights are made, not shipped (fill.py).
"""
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from autoregressive.models import decoder
from autoregressive.models.arpg import ARPG, ARPG_models
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.models.sampling import guide
from autoregressive.models.schedule import DrawSchedule
from tests.autoregressive.models.decoding import attention_mask
from tests.data.fill import fill, image
from tokenizer.tokenizer_image.vq_model import VQ_models

DATA = Path(__file__).parent
TOKENIZERS = ("vq16_256", "vq8_128")
ARPG_DRAWS = ("draw0", "draw1", "draw2")  # whole decodings
GPTS = ("gpt_b_c2i_256", "gpt_b_c2i_576_cfg_interval", "gpt_b_t2i_256")
CLEAR = 1e-3  # rounding may decide a step whose two best logits are closer than this
CLEAR_CODE = 1e-4  # the same for the distances to a pixel's two nearest codes
CACHED_STEPS = 24  # drawn by `generate` itself; the other codes are checked by one teacher-forced pass
CPU = torch.device("cpu")


def filled(build, salt: str, *, device: torch.device = CPU, **options) -> torch.nn.Module:
    """A model with the deterministic weights of `salt`, in eval mode."""
    with torch.device("meta"):
        model = build(**options)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    fill(model.state_dict(), salt)
    return model.to(device)


def furthest(ours: Tensor, reference: np.ndarray) -> float:
    """The largest difference; NaN where a value is NaN."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return (ours.cpu() - torch.from_numpy(reference)).abs().max().item()


@torch.no_grad()
def tokenizer_differences(file: str, device: torch.device = CPU) -> dict[str, float]:
    """Of one of TOKENIZERS: the largest differences before quantisation and of pixels, the share of wrong codes among
    the clear ones, the share of clear ones."""
    reference = np.load(DATA / f"{file}.npz")
    salt = str(reference["salt"])
    model = filled(VQ_models["VQ-16" if file.startswith("vq16") else "VQ-8"], salt, device=device)
    height, width = reference["size"].tolist()
    prequant = model.prequant(image(height, width, len(salt)).to(device))
    codes = model.quantize(prequant)[2].cpu().numpy()
    clear = reference["code_gap"] > CLEAR_CODE

    grid = prequant.shape[-2:]
    both = torch.from_numpy(np.stack([reference["codes"], reference["decode_codes"]])).long().to(device)
    decoded, random = model.decode_code(both, (2, 8, *grid)).split(1)
    pixels = [furthest(decoded[:, :, :16, :16], reference["decoded_crop"]),
              furthest(decoded.mean((2, 3)), reference["decoded_mean"]),
              furthest(random[:, :, -16:, -16:], reference["decode_crop"]),
              furthest(random.mean((2, 3)), reference["decode_mean"])]
    return {"before quantisation": furthest(prequant, reference["prequant"]), "pixels": float(np.max(pixels)),
            "wrong codes": (codes != reference["codes"])[clear].mean().item(), "clear codes": clear.mean().item()}


@dataclass(frozen=True)
class GPTReference:
    """A GPT with the reference's weights, what it is given and what must come out."""

    model: Transformer
    numbers: dict[str, np.ndarray]
    tokens: Tensor  # (2, L), the teacher's
    condition: Tensor  # (3,) labels or (3, 120, 2048) features
    valid_text: Tensor | None  # (3, 120) bool

    @property
    def codes(self) -> Tensor:
        """The reference's greedy codes (3, n), on the CPU."""
        return torch.from_numpy(self.numbers["greedy_codes"]).long()


def load_gpt(file: str, device: torch.device = CPU) -> GPTReference:
    """One of GPTS."""
    reference = np.load(DATA / f"{file}.npz")
    kind, block = str(reference["kind"]), int(reference["block"])
    model = filled(GPT_models["GPT-B"], str(reference["salt"]), device=device, block_size=block, model_type=kind,
                   cls_token_num=1 if kind == "c2i" else 120, class_dropout_prob=0.0, token_dropout_p=0.0,
                   resid_dropout_p=0.0, ffn_dropout_p=0.0)
    model.output.weight.mul_(4)
    rng = np.random.RandomState(11)
    tokens = torch.from_numpy(rng.randint(0, 16384, (2, block))).long()
    assert np.array_equal(tokens.numpy(), reference["teacher_tokens"])
    condition, valid_text = torch.from_numpy(reference["classes"]), None
    if kind == "t2i":
        features = torch.from_numpy(rng.standard_normal((3, 120, 2048)).astype(np.float32))
        valid_text = torch.arange(120)[None] >= 120 - condition[:, None]  # captions are padded on the left
        condition, valid_text = features * valid_text[..., None], valid_text.to(device)
    return GPTReference(model, dict(reference), tokens.to(device), condition.to(device), valid_text)


@torch.no_grad()
def teacher_forced_differences(gpt: GPTReference) -> dict[str, float]:
    """The largest differences of logits, in eval mode and between it and training, and that of the loss."""
    model, tokens = gpt.model.eval(), gpt.tokens
    logits, loss = model(tokens[:, :-1], gpt.condition[:2], targets=tokens)
    model.train()  # dropout is 0: the training forward is the same one
    again, _ = model(tokens[:1, :16], gpt.condition[:1])
    model.eval()
    return {"logits": furthest(logits[:, ::37, ::257], gpt.numbers["teacher_logits"]),
            "logits in training": (again - logits[:1, :17]).abs().max().item(),
            "loss": abs(loss.item() - float(gpt.numbers["teacher_loss"]))}


@torch.no_grad()
def wrong_greedy_codes(gpt: GPTReference) -> tuple[float, float]:
    """(share of wrong ones among the clear codes, share of clear codes): is every code of the reference the best guided
    logit after the codes before it?"""
    model, numbers, condition, expected = gpt.model, gpt.numbers, gpt.condition, gpt.codes.to(gpt.condition.device)
    scale, interval, steps = float(numbers["cfg_scale"]), int(numbers["cfg_interval"]), expected.shape[1]
    mask, width = None, model.config.cls_token_num + steps - 1
    if gpt.valid_text is not None:
        mask = attention_mask(gpt.valid_text.cpu(), model.config.cls_token_num, width).to(expected.device)

    best = model(expected[:, :-1], condition, mask=mask)[0]
    guided_steps = steps if interval < 0 else interval + 2  # the prefill, then decoding steps 0 … interval
    if scale > 1:
        head = expected[:, :guided_steps - 1]
        part = mask if mask is None else mask[:, :, :width - steps + guided_steps, :width - steps + guided_steps]
        free = model(head, model.cls_embedding.unconditional(condition), mask=part)[0]
        best[:, :guided_steps] = guide(best[:, :guided_steps], free, scale)
    clear = torch.from_numpy(numbers["greedy_gap"] >= CLEAR)
    wrong = (best.argmax(-1) != expected).cpu()
    return wrong[clear].float().mean().item(), clear.float().mean().item()


def generated_codes(gpt: GPTReference) -> tuple[int, int]:
    """(wrong ones, all) of the first codes that `generate` makes, up to the first of each row that is not clear."""
    expected, numbers = gpt.codes, gpt.numbers
    codes = generate(gpt.model, gpt.condition, min(CACHED_STEPS, expected.shape[1]), emb_masks=gpt.valid_text,
                     sample_logits=False, cfg_scale=float(numbers["cfg_scale"]),
                     cfg_interval=int(numbers["cfg_interval"])).cpu()
    wrong = compared = 0
    for row, gap in enumerate(numbers["greedy_gap"]):
        until = min([codes.shape[1], *np.flatnonzero(gap < CLEAR)[:1].tolist()])
        wrong += (codes[row, :until] != expected[row, :until]).sum().item()
        compared += until
    return wrong, compared


def load_arpg(device: torch.device = CPU) -> tuple[ARPG, dict[str, np.ndarray]]:
    """ARPG-L with the reference's weights, and its numbers."""
    numbers = dict(np.load(DATA / "arpg_l_256.npz"))
    model = filled(ARPG_models[str(numbers["model"])], str(numbers["salt"]), device=device)
    model.head.weight.mul_(4)
    return model, numbers


@torch.no_grad()
def arpg_teacher_forced_differences(model: ARPG, numbers: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest differences of logits and loss, an order per sample."""
    orders, codes, labels = (torch.from_numpy(numbers[name]).long().to(model.head.weight.device)
                             for name in ("teacher_orders", "teacher_codes", "classes"))
    codes = codes.gather(1, orders)
    logits, loss = model(codes[:, :-1], labels, codes, orders=orders)
    return {"logits": furthest(logits[:, ::37, ::257], numbers["teacher_logits"]),
            "loss": abs(loss.item() - float(numbers["teacher_loss"]))}


def wrong_arpg_codes(model: ARPG, numbers: dict[str, np.ndarray], draw: str) -> tuple[int, float]:
    """(wrong ones, share of the codes compared) in one of ARPG_DRAWS: up to what rounding may decide.

    Each code is the best of guided log-probability and given noise; the noise takes the place of ours, all else is our
    decoder with the reference's schedule, guidance, order and number of steps.
    """
    own = {name.removeprefix(f"{draw}_"): value for name, value in numbers.items() if name.startswith(draw)}
    device, order = model.head.weight.device, own["order"]
    noise = np.random.RandomState(int(own["noise_seed"])).gumbel(size=(2, 256, 16384)).astype(np.float32)
    noise = torch.from_numpy(noise).to(device)

    def best(logits: Tensor, draws: Tensor, scale: Tensor, settings: object, *, fused: bool) -> tuple[Tensor, Tensor]:
        asks, others, slots, cells = draws[:4]
        assert (others >= 0).all()  # all steps are guided
        sums = guide(logits[asks], logits[others], scale[:, None]).log_softmax(-1)
        return (sums + noise[slots, cells]).argmax(-1), torch.ones(len(asks), dtype=torch.bool, device=device)

    schedule = DrawSchedule(int(own["steps"]), str(own["schedule"]), str(own["guidance"]))
    with mock.patch.object(decoder, "choose", best):
        codes = generate(model, torch.from_numpy(numbers["classes"]).long().to(device), 256,
                         cfg_scale=float(own["scale"]), schedule=schedule, orders=torch.from_numpy(order).long())
    clear = np.cumprod(own["gap"] > CLEAR, axis=1) > 0  # in the order of decoding
    return int((codes.cpu().numpy() != own["codes"])[:, order][clear].sum()), float(clear.mean())
