"""A small ARPG, and its codes by whole forwards without a cache."""
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.arpg import ARPG, ARPGArgs
from tests.autoregressive.models.test_gpt import V


def tiny(*, seed: int = 0, **options) -> ARPG:
    """An ARPG of 2 + 2 layers with a head that is not zero, its norms not one."""
    torch.manual_seed(seed)
    model = ARPG(ARPGArgs(**{"dim": 48, "n_layer": 2, "n_head": 4, "multiple_of": 16, "num_classes": 3,
                             "vocab_size": V, "grid": (3, 4), "initializer_range": 0.2, **options}))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def block_masks(sizes: list[int], *, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """What each input and each query sees when groups of these sizes are drawn, after a prefix of N tokens: (1, 1, N +
    L - 1, N + L - 1) bool each."""
    ends = np.cumsum(sizes)
    before = np.repeat(ends - sizes, sizes)  # codes that are there when a code is drawn
    first = np.arange(1, prefix + 1)  # each token of the prefix sees those before it
    inputs = np.concatenate([first, prefix + np.repeat(ends, sizes)])[:-1]  # then codes with their whole group
    queries = np.concatenate([first[:-1], prefix + before])
    seen = torch.arange(len(inputs))[None]
    return tuple((seen < torch.from_numpy(count)[:, None])[None, None] for count in (inputs, queries))


@torch.no_grad()
def plain_codes(model: ARPG, label: int, plan: SimpleNamespace, choose) -> list[int]:
    """Codes of one image: plan.order, plan.sizes, plan.scales, plan.known (codes). choose(logits (V,), cell) → code."""
    done, order = len(plan.known), torch.tensor(plan.order)
    codes, sizes = list(plan.known), [done] if plan.known else []  # in the order of the plan
    for size in plan.sizes:
        sizes.append(size)
        fed = torch.tensor([[*codes, *[0] * size]])[:, :-1]  # what a group holds itself is not seen
        with_class, without = (model(fed, torch.tensor([row]), orders=order, masks=block_masks(sizes))[0][0, done:]
                               for row in (label, model.config.num_classes))
        for i in range(size):
            scale, cell = plan.scales[done + i], plan.order[done + i]
            guided = without[i] + scale * (with_class[i] - without[i]) if scale > 1 else with_class[i]
            codes.append(choose(guided, cell))
        done += size
    return torch.tensor(codes)[order.argsort()].tolist()
