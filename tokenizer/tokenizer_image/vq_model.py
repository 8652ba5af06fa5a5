"""The VQ image tokenizer: images in [-1, 1] ↔ a grid of code indices (LlamaGen, arXiv 2406.06525 §2.1).

`VQ_models` is the registry: VQ-16 (72M parameters, 16x downsampling) and VQ-8 (70M, 8x) are those of the released
checkpoints; VQ-4-S is the small one that a laptop trains in minutes.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from tokenizer.tokenizer_image.layers import Decoder, Encoder, PointwiseConv
from tokenizer.tokenizer_image.quantize import CodebookLosses, VectorQuantizer
from utils.compatible import missing_names
from utils.finite import NotFiniteError, fault


@dataclass(frozen=True)
class VQConfig:
    """Everything that shapes a tokenizer. The downsample ratio is 2 ** (len(ch_mult) - 1)."""

    encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    ch: int = 128
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    dropout_p: float = 0.0


class VQModel(nn.Module):
    """Encoder → quantizer → decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        if len(config.encoder_ch_mult) != len(config.decoder_ch_mult):
            raise ValueError(f"encoder_ch_mult {config.encoder_ch_mult} and decoder_ch_mult {config.decoder_ch_mult} "
                             "differ in length: images would not come back at their size")
        self.config = config
        self.rounded_from: str | None = None  # hash of the weights of which these are a copy, perhaps in fewer bits
        shape = {"ch": config.ch, "num_res_blocks": config.num_res_blocks, "z_channels": config.z_channels,
                 "dropout": config.dropout_p}
        self.encoder = Encoder(ch_mult=config.encoder_ch_mult, **shape)
        self.decoder = Decoder(ch_mult=config.decoder_ch_mult, **shape)
        self.quantize = VectorQuantizer(config.codebook_size, config.codebook_embed_dim, beta=config.commit_loss_beta,
                                        entropy_loss_ratio=config.entropy_loss_ratio, l2_norm=config.codebook_l2_norm)
        self.quant_conv = PointwiseConv(config.z_channels, config.codebook_embed_dim)
        self.post_quant_conv = PointwiseConv(config.codebook_embed_dim, config.z_channels)

    @property
    def downsample(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (len(self.config.encoder_ch_mult) - 1)

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.config.codebook_size

    def prequant(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → features before quantisation (B, C, H/p, W/p).

        Raises ValueError when H or W is not divisible by p.
        """
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"image size {height}x{width} is not divisible by {self.downsample}, the tokenizer's "
                             "downsample ratio: choose another --image-size")
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> tuple[Tensor, CodebookLosses | None, tuple[None, None, Tensor]]:
        """Images (B, 3, H, W) → (quantised (B, C, h, w), losses, (None, None, codes (B*h*w,)))."""
        quantised, losses, codes = self.quantize(self.prequant(images))
        return quantised, losses, (None, None, codes)

    def encode_codes(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → codes (B, h*w) int64 in raster order. Raises NotFiniteError for features without."""
        features = self.prequant(images)
        if fault(features) is not None:
            raise NotFiniteError("the tokenizer's encoder gave features that are not finite: are its weights sound?")
        return self.quantize(features)[2].view(images.shape[0], features.shape[2] * features.shape[3])

    def decode(self, quantised: Tensor) -> Tensor:
        """Quantised features (B, C, h, w) → images (B, 3, h*p, w*p), about [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(quantised))

    def decode_code(self, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Decode code indices, B*h*w of them in any shape, into images (B, 3, h*p, w*p).

        `shape` is (B, C, h, w), or the grid (h, w) when codes are (B, h*w). Raises ValueError when a code is outside
        the codebook or the shape does not hold the codes.
        """
        h, w = shape[-2:]
        batch = shape[0] if len(shape) == 4 else codes.shape[0]
        if codes.numel() != batch * h * w:
            raise ValueError(f"{codes.numel()} codes do not fill {batch} grids of {h}x{w} tokens")
        vectors = self.quantize.lookup(codes.reshape(batch, h, w)).permute(0, 3, 1, 2)  # (B, C, h, w)
        return self.decode(vectors.to(self.post_quant_conv.weight.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, CodebookLosses | None]:
        """Images (B, 3, H, W) → (reconstructions (B, 3, H, W), codebook losses)."""
        quantised, losses, _ = self.encode(images)
        return self.decode(quantised), losses


def _build(preset: VQConfig, **overrides) -> VQModel:
    return VQModel(replace(preset, **overrides))


PRESETS: dict[str, VQConfig] = {
    "VQ-16": VQConfig(),
    "VQ-8": VQConfig(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4)),
    "VQ-4-S": VQConfig(encoder_ch_mult=(1, 2, 4), decoder_ch_mult=(1, 2, 4), ch=8, num_res_blocks=1, z_channels=32,
                       codebook_size=256),
}
VQ_models: dict[str, Callable[..., VQModel]] = {name: partial(_build, preset) for name, preset in PRESETS.items()}

__getattr__ = missing_names(__name__)  # LlamaGen's other names: VQ_16, …
