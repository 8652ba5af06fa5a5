"""Flags of GPT training, and those that it shares with sampling."""
from dataclasses import dataclass
from typing import ClassVar, Literal

from autoregressive.control.adapter import AdapterFlags
from autoregressive.models.registry import MODELS
from autoregressive.train.finetune import FinetuneFlags
from dataset.build import DatasetFlags, FeaturePathFlags, PairFlags, PictureFlags, SmallPictureFlags
from dataset.codes import StoreFlags
from dataset.control import ControlFlags
from evaluations.c2i.monitor import MonitorFlags
from language.text_encoder import TextEncoderFlags
from tokenizer.build import TokenizerFlags
from utils.cli import flag
from utils.options import SizeFlags
from utils.training.flags import TrainFlags
from utils.training.parallel import ParallelFlags


@dataclass(kw_only=True)
class GPTSizeFlags(SizeFlags):
    """Which GPT. What is left out is taken from the checkpoint or the codes."""

    shapes_run: ClassVar[bool] = False
    gpt_model: str | None = flag(None, "model; None: what the checkpoint says, else GPT-B", choices=tuple(MODELS))
    vocab_size: int | None = flag(None, "number of codes; None: the codes' or checkpoint's, else 16384")
    num_classes: int | None = flag(None, "classes; None: the codes' or checkpoint's; training with 1: without classes")
    downsample_size: int | None = flag(None, "pixels per token side; None: the tokenizer's")


@dataclass(kw_only=True)
class GPTFlags(GPTSizeFlags):
    """The GPT's checkpoint and condition."""

    shapes_run: ClassVar[bool] = False
    gpt_ckpt: str | None = flag(None, "GPT checkpoint")
    gpt_type: Literal["c2i", "t2i"] = flag("c2i", "condition: class or text", choices=("c2i", "t2i"))
    cls_token_num: int | None = flag(None, "prefix tokens; None: 1 for c2i, 120 for t2i")


@dataclass(kw_only=True)
class GuidanceFlags:
    """Guidance."""

    shapes_run: ClassVar[bool] = False
    cfg_scale: float = flag(4.0, "classifier-free guidance; 1 or less: none")


@dataclass(kw_only=True)
class GPTTrainFlags(TrainFlags, ParallelFlags, GPTFlags, FinetuneFlags, ControlFlags, AdapterFlags, TokenizerFlags,
                    StoreFlags, DatasetFlags, GuidanceFlags, MonitorFlags):
    """The GPT's training command. --vq-ckpt is for previews and --eval-every: without it there are none."""

    gpt_resume: str | None = flag(None, "the same as --resume CHECKPOINT (LlamaGen's name for it when sharded); takes "
                                        "LlamaGen's folders with consolidated.pth too")
    cfg_scale: float = 2.0
    dataset: str = "imagenet_code"  # with --image-size: the store <code-path>/<name><size>_codes
    dropout_p: float = 0.1
    token_dropout_p: float = flag(0.1, "dropout on the embeddings")
    drop_path_rate: float = flag(0.0, "stochastic depth, rising linearly with depth to this rate")
    token_noise: float = flag(0.0, "share of input codes replaced by random ones: the model learns to go on after a "
                                   "wrong code of its own (VQGAN's pkeep, arXiv 2012.09841); for small data sets")
    query_layers: int | None = flag(None, "ARPG: how many of its layers are in the second half, whose queries ask for "
                                          "cells; None: half of them")
    class_dropout: float = flag(0.1, "how often the condition is dropped, for classifier-free guidance")

    @property
    def source(self) -> str:
        """Where the codes come from, for messages."""
        return self.code_path


@dataclass(kw_only=True)
class TextFlags(TextEncoderFlags, FeaturePathFlags):
    """Where the captions' features come from."""

    short_t5_feat_path: str | None = flag(None, "features of short captions, which take the place of the long ones "
                                                "with --short-caption-share")
    short_caption_share: float = flag(0.3, "how often a short caption is taken, of pictures that have one")
    text_features: Literal["stored", "online"] = flag(
        "stored", "features are read from --t5-feat-path, or made in the loop by the text encoder",
        choices=("stored", "online"))


@dataclass(kw_only=True)
class T2ITrainFlags(GPTTrainFlags, TextFlags, PairFlags, PictureFlags, SmallPictureFlags):
    """The text-to-image training command. --data-path is a store of codes with captions, as extract_codes_t2i.py writes
    it; or captioned pictures, whose codes --vq-ckpt makes in the loop."""

    data_path: str | None = None
    code_path: str | None = None
    gpt_type: Literal["c2i", "t2i"] = "t2i"
    dataset: str = "t2i"
    cfg_scale: float = 7.5

    @property
    def source(self) -> str:
        """See `GPTTrainFlags`."""
        return self.code_path or self.data_path or self.dataset
