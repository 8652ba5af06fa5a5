"""What `generate` takes: integers and numbers as lists, NumPy arrays or tensors, all else refused in one line."""
import math

import numpy as np
import pytest
import torch

from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import generate
from autoregressive.models.plan import Groups, Raster, Request
from autoregressive.models.schedule import DrawSchedule
from tests.autoregressive.models.decoding import streams
from tests.autoregressive.models.small_arpg import tiny
from tests.autoregressive.models.test_gpt import CAPTION, TEXT, V
from tests.autoregressive.models.test_gpt import tiny as tiny_gpt

ORDER = [3, 0, 11, 7, 1, 2, 4, 5, 6, 8, 10, 9]
KNOWN = [[4, -1, 36, *[-1] * 8, 0], [-1] * 12]
WAYS = {  # of giving integers: those of a list
    "list": lambda values: values, "tuple": tuple, "array": np.array, "int16 array": lambda values: np.array(
        values, np.int16), "big-endian": lambda values: np.array(values, ">i4"),
    "backwards": lambda values: np.flip(np.flip(np.array(values)).copy()), "tensor": torch.tensor,
    "int8 tensor": lambda values: torch.tensor(values, dtype=torch.int8),
    "strided int32": lambda values: torch.tensor(values, dtype=torch.int32).repeat_interleave(2, -1)[..., ::2],
    "scalars": lambda values: [np.int64(v) for v in values] if np.ndim(values) == 1 else [*map(np.array, values)],
    "tensors": lambda values: [torch.tensor(value) for value in values]}


@pytest.mark.parametrize("way", WAYS)
def test_integers_in_any_form(way):
    model, schedule, give = tiny(), DrawSchedule(5), WAYS[way]
    plain = {"schedule": schedule, "orders": torch.tensor(ORDER), "known": torch.tensor(KNOWN), "top_k": 5}
    expected = generate(model, torch.tensor([0, 2]), 12, generators=streams(2), **plain)
    found = generate(model, give([0, 2]), np.int64(12), generators=tuple(streams(2)), schedule=schedule,
                     orders=give(ORDER), known=give(KNOWN), top_k=give([5, 5]))
    assert torch.equal(found, expected)
    each = generate(model, give([[0], [2]]), 12, generators=streams(2), schedule=schedule, orders=give([ORDER] * 2),
                    known=give(KNOWN), top_k=5)
    assert torch.equal(each, expected)


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.int64, np.uint8, np.uint64])
def test_unsigned_integers(kind):
    """They hold no -1, but orders, labels and whole images."""
    give = (lambda values: torch.tensor(values).to(kind)) if isinstance(kind, torch.dtype) else (
        lambda values: np.array(values, kind))
    model, schedule = tiny(), DrawSchedule(4)
    expected = generate(model, torch.tensor([1]), 12, generators=streams(1), schedule=schedule,
                        orders=torch.tensor(ORDER))
    assert torch.equal(generate(model, give([1]), 12, generators=streams(1), schedule=schedule, orders=give(ORDER)),
                       expected)
    assert generate(model, give([1]), 12, known=give([ORDER])).tolist() == [ORDER]


@pytest.mark.parametrize("give", [list, tuple, np.array, torch.tensor, lambda values: torch.tensor(
    values, dtype=torch.bfloat16), lambda values: np.array(values, np.float32)[::-1][::-1]])
def test_settings_of_each_image_in_any_form(give):
    model, labels, schedule = tiny(), [0, 1, 2], DrawSchedule(5)
    settings = {"cfg_scale": [1.0, 3.0, 2.0], "temperature": [0.5, 1.0, 2.0], "top_p": [0.5, 1.0, 0.75]}
    found = generate(model, labels, 12, generators=streams(3), schedule=schedule,
                     **{name: give(values) for name, values in settings.items()})
    for image in range(3):
        alone = {name: np.float32(values[image]) for name, values in settings.items()}
        assert torch.equal(generate(model, labels[image:image + 1], 12, generators=streams(3)[image:image + 1],
                                    schedule=schedule, **alone)[0], found[image])


REFUSED = [  # of an ARPG of 12 cells and 3 classes, for a batch of two
    ({"cond": torch.tensor([0.0, 1.0])}, "class labels are of type torch.float32, expected integers"),
    ({"cond": [0.5, 1]}, "class labels are of type float64"),
    ({"cond": [True, False]}, "class labels are of type bool"),
    ({"cond": ["cat", "dog"]}, "class labels are of type <U3"), ({"cond": [[0, 1], [1]]}, "class labels are no"),
    ({"cond": [0, None]}, "class labels are of type object"), ({"cond": 3}, r"class labels are of shape \(\)"),
    ({"cond": torch.zeros(2, 2, dtype=torch.long)}, r"class labels are of shape \(2, 2\)"),
    ({"cond": [0, 4]}, r"class labels lie in \[0, 4\]"),
    ({"cond": np.array([-1, 0])}, r"class labels lie in \[-1, 0\]"),
    ({"cond": []}, "the batch is empty"), ({"cond": np.array([2**64 - 1, 0], np.uint64)}, "class labels"),
    ({"orders": torch.tensor(ORDER).float()}, "orders are of type torch.float32, expected integers"),
    ({"orders": [cell + 0.5 for cell in ORDER]}, "orders are of type float64"),
    ({"orders": torch.tensor(ORDER, dtype=torch.bfloat16)}, "orders are of type torch.bfloat16"),
    ({"orders": torch.tensor(ORDER) > 3}, "orders are of type torch.bool"),
    ({"orders": np.array(ORDER, complex)}, "orders are of type complex128"),
    ({"orders": "spiral"}, "orders are of type"), ({"orders": ORDER[1:]}, r"orders are of shape \(11,\)"),
    ({"orders": [ORDER]}, r"orders are of shape \(1, 12\)"), ({"orders": 3}, r"orders are of shape \(\)"),
    ({"orders": [ORDER, ORDER[1:]]}, "orders are no"), ({"orders": []}, r"orders are of shape \(0,\)"),
    ({"orders": np.zeros(12, int)}, "every cell of the grid once"),
    ({"orders": [*ORDER[:-1], 12]}, "cell of the grid once"),
    ({"orders": [-1, *range(1, 12)]}, "cell of the grid once"),
    ({"known": torch.tensor(KNOWN).double()}, "known codes are of type torch.float64, expected integers"),
    ({"known": torch.tensor(KNOWN) >= 0}, "known codes are of type torch.bool"),
    ({"known": KNOWN[0]}, r"known codes are of shape \(12,\), expected \(2, 12\)"),
    ({"known": [[V, *KNOWN[0][1:]], KNOWN[1]]}, f"known codes lie in .-1, {V}., expected codes 0 to {V - 1}, or -1"),
    ({"known": [[V] * 12] * 2}, f"known codes lie in .{V}, {V}."),
    ({"known": [[-2, *KNOWN[0][1:]], KNOWN[1]]}, "known codes lie in .-2, 36."),
    ({"cfg_scale": math.nan}, "--cfg-scale is nan"), ({"cfg_scale": [1.0, -math.inf]}, "--cfg-scale is -inf"),
    ({"cfg_scale": [[1.0], [2.0]]}, r"--cfg-scale is of shape \(2, 1\), expected a number, or one for each image"),
    ({"cfg_scale": "4.5"}, "--cfg-scale is of type <U3, expected numbers"), ({"cfg_scale": None}, "--cfg-scale is of"),
    ({"temperature": True}, "--temperature is of type bool"), ({"temperature": 1j}, "--temperature is of type complex"),
    ({"top_k": 2.5}, "--top-k is 2.5, expected a whole"), ({"top_k": 2**70}, "--top-k"), ({"top_k": -1}, "--top-k"),
    ({"top_p": [0.5] * 3}, "3 values of top_p for 2 samples"), ({"cfg_interval": math.nan}, "--cfg-interval is nan"),
    ({"cfg_interval": math.inf}, "--cfg-interval is inf"),
    ({"control_strength": math.nan}, "--control-strength is nan"),
    ({"generators": torch.Generator()}, "generators is a Generator, expected a list of 2"),
    ({"generators": [None, None]}, "generators hold a NoneType"), ({"generators": [0, 1]}, "generators hold a int"),
    ({"generators": streams(3)}, "3 generators for 2 samples"), ({"max_new_tokens": 12.0}, "max_new_tokens is 12.0"),
    ({"schedule": DrawSchedule(2.0)}, "--step is 2.0"), ({"schedule": DrawSchedule("4")}, "--step is '4'"),
    ({"schedule": DrawSchedule(13)}, "--step is 13, expected 1 to 12"),
    ({"control": [np.full((3, 8, 8), 255, np.uint8), None]}, r"a control picture has values in \[255, 255\], expected"),
    ({"control": ["edges.png", None]}, "a control picture is of type"),
    ({"control": [None]}, "1 control pictures for 2 samples"),
    ({"control": [np.zeros((3, 8, 8)), None]}, "no control adapter")]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_makes_no_sense_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(tiny(), **{"cond": torch.tensor([0, 1]), "max_new_tokens": 12, **changes})
    assert "\n" not in str(caught.value)


def test_text_features_in_any_form_and_type():
    """Their type need not be the model's."""
    model = tiny_gpt(model_type="t2i")
    features, mask = torch.randn(2, TEXT, CAPTION).bfloat16().float(), torch.ones(2, TEXT)
    mask[0, 3:] = 0
    expected = generate(model, features, 9, mask, generators=streams(2))
    for given, valid in ((features.numpy(), mask.numpy()), (features.tolist(), mask.bool().tolist()),
                         (features.double(), mask.long()), (features.bfloat16(), mask.bool())):
        assert torch.equal(generate(model, given, 9, valid, generators=streams(2)), expected)
    for given in ([[True] * CAPTION] * TEXT, features[0], "cat", features[:, :, None]):
        with pytest.raises(ValueError, match="text features are"):
            generate(model, given, 9)
    with pytest.raises(ValueError, match=r"the window is 2\.5"):
        generate(model, features, 9, window=2.5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 7)])
def test_grids_of_any_shape(grid, engine):
    model, length = tiny(grid=grid), grid[0] * grid[1]
    for steps in (None, 1, length):
        codes = generate(model, [0, 1], length, cfg_scale=2.0, schedule=DrawSchedule(steps), generators=streams(2))
        assert codes.shape == (2, length) and codes.min() >= 0
        known = codes.clone()
        known[:, 0] = -1
        again = generate(model, [0, 1], length, schedule=DrawSchedule(steps), known=known)
        assert torch.equal(again[:, 1:], codes[:, 1:]) and again.min() >= 0


def test_requests_and_plans_take_what_generate_takes():
    with pytest.raises(ValueError, match="groups are of type float64"):
        Groups(range(12), np.ones(12), [5.5, 6.5])
    with pytest.raises(ValueError, match="an order is of type float64"):
        Groups(np.arange(12.0), np.ones(12), [12])
    decoder, plans = CodeDecoder(model := tiny()), [Groups(ORDER, np.ones(12), (4, 6), known=2) for _ in range(2)]
    decoder.reserve(2)
    for plan, known in zip(plans, ([5, 6], np.array([5, 6])), strict=True):
        decoder.join(Request(np.int64(2), plan, 7, known=known))
    one, other = (done.codes for _ in range(2) for done in decoder.step())
    assert torch.equal(one, other) and one[ORDER[:2]].tolist() == [5, 6]
    with pytest.raises(ValueError, match="known codes are of type float64"):
        decoder.join(Request(2, Groups(ORDER, np.ones(12), (4, 6), known=2), 7, known=[5.0, 6.5]))
    with pytest.raises(ValueError, match=r"class 1\.0 is out of range"):
        decoder.join(Request(1.0, Groups(ORDER, np.ones(12), [12]), 7))
    assert Raster([1.0, 2.0]).guided_until == 2 and model is not None
