"""The GPT: one function of its tokens whether cached or not, and the recipe of the specification."""
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from autoregressive.models.conditions import CaptionMLP
from autoregressive.models.engines import engine_for
from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.models.rope import apply_rope, rope_table
from tests.autoregressive.models.decoding import attention_mask, run_step

V, CAPTION, TEXT = 37, 24, 5
PLAIN = {"token_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "class_dropout_prob": 0.0}


def tiny(*, seed: int = 0, head: float = 0.5, **options) -> Transformer:
    """A GPT of two layers with a head that is not zero."""
    torch.manual_seed(seed)
    kind = {"cls_token_num": TEXT, "caption_dim": CAPTION} if options.get("model_type") == "t2i" else {}
    model = Transformer(ModelArgs(**{"dim": 48, "n_layer": 2, "n_head": 4, "multiple_of": 16, "num_classes": 3,
                                     "vocab_size": V, "grid": (3, 3), "initializer_range": 0.2, **kind, **options}))
    torch.nn.init.normal_(model.output.weight, std=head)
    return model.eval()


def condition(model: Transformer, batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(conditions, validity of the text tokens or None); captions have 1, 2, … words, padded on the left."""
    if model.config.model_type == "c2i":
        return torch.arange(batch) % 3, None
    valid = torch.arange(TEXT)[None] >= TEXT - 1 - torch.arange(batch)[:, None] % TEXT
    return torch.randn(batch, TEXT, CAPTION) * valid[..., None], valid


@pytest.mark.parametrize("options", [
    {}, {"n_kv_head": 2}, {"n_kv_head": 1}, {"grid": (2, 5)}, {"grid": (1, 7)}, {"dim": 40, "n_head": 2},
    {"model_type": "t2i"}, {"model_type": "t2i", "n_kv_head": 2, "grid": (4, 2)}], ids=str)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(options, engine):
    model = tiny(**options)
    length, prefix_length = model.config.block_size, model.config.cls_token_num
    codes = torch.randint(V, (5, length))
    cond, _ = condition(model, 5)
    whole, _ = model(codes[:, :-1], cond, mask=attention_mask(None, prefix_length, prefix_length + length - 1))
    torch.testing.assert_close(model(codes[:, :-1], cond)[0], whole, atol=1e-4, rtol=0)  # the fused causal path

    decoder = engine_for(model)
    assert type(decoder) is engine
    decoder.reserve(5, prefix_length + length - 1)
    prefix, _ = model.prefix(list(cond) if cond.ndim > 1 else cond.tolist())
    steps = [run_step(decoder, prefix, torch.zeros(1, dtype=torch.long), [0] * 5,
                      wanted=[row * prefix_length - 1 for row in range(1, 6)])]
    for at in range(prefix_length, prefix_length + length - 1):
        x = model.tok_embeddings(codes[:, at - prefix_length])[:, None]
        steps.append(run_step(decoder, x, torch.tensor([at]), [at] * 5))
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.1


@torch.no_grad()
def test_forward_is_causal():
    model = tiny()
    codes = torch.randint(V, (2, 8))
    other = codes.clone()
    other[:, 5] = (other[:, 5] + 1) % V
    a, b = (model(x, torch.tensor([0, 1]))[0] for x in (codes, other))
    assert torch.equal(a[:, :6], b[:, :6])  # logits 0 … 5 see at most x_1 … x_5, that is codes[:, :5]
    assert (a[:, 6:] - b[:, 6:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_left_padding_is_invisible():
    model = tiny(model_type="t2i")
    cond, valid = condition(model, 4)
    codes = torch.randint(V, (4, 8))
    noisy = torch.where(valid[..., None], cond, torch.randn_like(cond))
    mask = attention_mask(valid, TEXT, TEXT + 8)
    clean, dirty = (model(codes, x, mask=mask)[0] for x in (cond, noisy))
    torch.testing.assert_close(clean, dirty, atol=1e-5, rtol=0)
    assert (model(codes, cond)[0] - model(codes, noisy)[0]).abs().max() > 1e-3
    assert torch.equal(model(codes, cond, mask=mask[:, 0])[0], clean)  # (B, T, T) means the same as (B, 1, T, T)


def test_the_oracle_s_mask_is_causal_with_hidden_padding_and_its_diagonal():
    valid = torch.tensor([[0, 0, 1], [1, 1, 1]])
    mask = attention_mask(valid, 3, 5)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                assert bool(mask[b, 0, i, j]) == (i == j or (j < i and (j >= 3 or bool(valid[b, j]))))


def test_what_is_not_said_is_as_in_llamagen():
    found = ModelArgs()
    assert (found.norm_eps, found.rope_base, found.multiple_of, found.initializer_range) == (1e-5, 10000.0, 256, 0.02)
    assert (found.token_dropout_p, found.resid_dropout_p, found.ffn_dropout_p, found.class_dropout_prob) == (0.1,) * 4
    assert (found.attn_dropout_p, found.drop_path_rate) == (0.0, 0.0)
    assert (found.vocab_size, found.grid, found.num_classes, found.caption_dim) == (16384, (16, 16), 1000, 2048)
    weights = tiny(initializer_range=0.02, dim=192).layers[0].feed_forward.w1.weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)


def test_first_loss_is_the_log_of_the_vocabulary():
    for vocab in (V, 16384):
        model = GPT_models["GPT-S"](vocab_size=vocab, num_classes=3, block_size=16)
        codes = torch.randint(vocab, (2, 16))
        _, loss = model(codes[:, :-1], torch.tensor([0, 2]), targets=codes)
        assert loss.item() == pytest.approx(math.log(vocab), abs=1e-5)


def naive_rotation(x: torch.Tensor, row: int, column: int, base: float = 10000.0) -> torch.Tensor:
    """One head vector (K,) turned pair by pair with complex numbers, from the definition."""
    half = len(x) // 2
    out = []
    for c in range(half):
        place, j = (row, c) if c < half // 2 else (column, c - half // 2)
        turned = complex(x[2 * c], x[2 * c + 1]) * complex(math.cos(place * base ** (-2 * j / half)),
                                                           math.sin(place * base ** (-2 * j / half)))
        out += [turned.real, turned.imag]
    return torch.tensor(out)


@pytest.mark.parametrize(("grid", "size"), [((3, 3), 8), ((2, 5), 20), ((4, 2), 100), ((1, 3), 4)])
def test_rotary_is_its_definition_and_zero_on_the_prefix(grid, size):
    table = rope_table(grid, size, 2)
    assert table.shape == (2 + grid[0] * grid[1], size // 2, 2) and table.dtype == torch.float32
    assert not table[:2].any()
    x = torch.randn(1, len(table), 1, size)
    turned = apply_rope(x, table)
    assert not turned[:, :2].any()
    for place in range(grid[0] * grid[1]):
        expected = naive_rotation(x[0, 2 + place, 0].double(), *divmod(place, grid[1]))
        torch.testing.assert_close(turned[0, 2 + place, 0], expected.float(), atol=1e-5, rtol=0)
    assert apply_rope(x.bfloat16(), table).dtype == torch.bfloat16


def test_head_size_must_be_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4"):
        rope_table((2, 2), 6, 1)


@torch.no_grad()
def test_set_grid_makes_the_model_one_of_that_grid():
    model, wanted = tiny(), tiny(grid=(2, 6))
    cond, codes = torch.tensor([0, 1]), torch.randint(V, (2, 11))
    model(codes[:, :8], cond)  # the table of the old grid is cached
    model.set_grid((2, 6))
    wanted.load_state_dict(model.state_dict())
    assert model.config.block_size == 12
    assert torch.equal(model(codes, cond)[0], wanted(codes, cond)[0])
    assert not torch.equal(model(codes, cond)[0], tiny(grid=(3, 4))(codes, cond)[0])


@pytest.mark.parametrize(("name", "millions", "digits"), [
    ("GPT-B", 111, 0), ("GPT-L", 343, 0), ("GPT-XL", 775, 0), ("GPT-XXL", 1400, -2), ("GPT-XXXL", 3900, -2),
    ("GPT-1B", 1200, -2), ("GPT-3B", 3100, -2), ("GPT-7B", 6600, -2)])
def test_parameter_counts(name, millions, digits):
    text = {"model_type": "t2i", "cls_token_num": 120} if name in ("GPT-1B", "GPT-7B") else {}
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT_models[name](**text).parameters()) / 1e6
    assert round(count, digits) == millions, count


def test_state_dict_has_no_rotary_table_whatever_ran_before():
    model = tiny()
    names = set(model.state_dict())
    model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0]))
    assert set(model.state_dict()) == names
    assert not [name for name in names if "rope" in name or "freq" in name]


def test_bfloat16_model_keeps_its_rotary_table_in_fp32():
    model = tiny().bfloat16()
    assert model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0]))[0].dtype == torch.bfloat16
    model.bfloat16()
    table = model.rope(torch.device("cpu"))
    assert torch.equal(table, rope_table((3, 3), 12, 1)) and table.dtype == torch.float32


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_autocast_keeps_the_residual_stream_in_fp32(kind):
    model = tiny(model_type=kind)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    cond, _ = condition(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(torch.randint(V, (2, 8)), cond, targets=torch.randint(V, (2, 9)))
    assert seen == [torch.float32] and loss.dtype == torch.float32


def test_drop_path_rises_linearly_and_acts_in_training_only():
    model = tiny(n_layer=5, drop_path_rate=0.4, **PLAIN)
    assert [layer.drop_path.p for layer in model.layers] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    x = torch.ones(2000, 1, 1)
    assert torch.equal(model.layers[4].drop_path(x), x)
    kept = model.layers[4].train().drop_path(x)
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert (kept > 0).float().mean().item() == pytest.approx(0.6, abs=0.05)


def test_dropout_follows_its_rates():
    model = tiny(token_dropout_p=0.3, resid_dropout_p=0.2, ffn_dropout_p=0.15, attn_dropout_p=0.05)
    layer = model.layers[1]
    assert (model.tok_dropout.p, layer.attention.dropout.p, layer.feed_forward.dropout.p,
            layer.attention.attn_dropout) == (0.3, 0.2, 0.15, 0.05)
    codes, cond = torch.randint(V, (2, 8)), torch.tensor([0, 1])
    assert torch.equal(model(codes, cond)[0], model(codes, cond)[0])
    model.train()
    assert not torch.equal(model(codes, cond)[0], model(codes, cond)[0])


def test_class_dropout_takes_the_row_of_no_class():
    embedder = tiny(class_dropout_prob=0.25).cls_embedding
    assert embedder.embedding_table.num_embeddings == 4
    labels = torch.arange(4000) % 3
    prefix = embedder(labels, drop=True)
    dropped = (prefix[:, 0] == embedder.embedding_table.weight[3]).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(prefix[~dropped, 0], embedder.embedding_table.weight[labels[~dropped]])
    assert torch.equal(embedder(labels, drop=False)[:, 0], embedder.embedding_table.weight[labels])


def test_caption_dropout_replaces_whole_prefixes_by_the_saved_unconditional_features():
    model = tiny(model_type="t2i", class_dropout_prob=0.25)
    embedder = model.cls_embedding
    assert "cls_embedding.uncond_embedding" in model.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(model.named_parameters())
    prefix = embedder(torch.randn(1000, TEXT, CAPTION), drop=True)
    free = embedder.cap_proj(embedder.uncond_embedding)
    dropped = (prefix - free).abs().amax(-1) < 1e-6  # (B, TEXT)
    assert torch.equal(dropped.all(-1), dropped.any(-1))
    assert dropped.any(-1).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert GPT_models["GPT-S"](model_type="t2i", cls_token_num=120).cls_embedding.uncond_embedding.var().item() \
        == pytest.approx(1 / 2048, rel=0.05)


def test_captions_go_through_gelu_in_its_tanh_form():
    torch.manual_seed(0)
    layers, x = CaptionMLP(6, 8), 3 * torch.randn(20, 6)
    h = layers.fc1(x)
    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(layers(x), layers.fc2(gelu), atol=1e-6, rtol=0)


def test_the_unconditional_features_are_not_trained():
    model = tiny(model_type="t2i", class_dropout_prob=0.5).train()
    before = model.cls_embedding.uncond_embedding.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    codes = torch.randint(V, (4, 9))
    model(codes[:, :-1], condition(model, 4)[0], targets=codes)[1].backward()
    optimizer.step()
    assert torch.equal(model.cls_embedding.uncond_embedding, before)


def test_invalid_samples_carry_no_loss():
    model = tiny()
    codes, cond = torch.randint(V, (4, 9)), torch.tensor([0, 1, 2, 0])

    def loss(rows, valid=None):
        return model(codes[rows, :-1], cond[rows], targets=codes[rows], valid=valid)[1]

    torch.testing.assert_close(loss([0, 1, 2, 3], torch.tensor([1, 0, 1, 0])), loss([0, 2]))
    torch.testing.assert_close(loss([0, 1, 2, 3], torch.ones(4)), loss([0, 1, 2, 3]))
    assert loss([0, 1], torch.zeros(2)).item() == 0
    logits, none = model(codes[:, :-1], cond)
    assert none is None and logits.shape == (4, 9, V)
    torch.testing.assert_close(loss([0, 1, 2, 3]), F.cross_entropy(logits.flatten(0, 1), codes.flatten()))


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"model_type": "t2i"}], ids=str)
def test_gradient_reaches_every_parameter(options):
    model = tiny(**options).train()
    codes = torch.randint(V, (6, 9))
    model(codes[:, :-1], condition(model, 6)[0], targets=codes)[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_model_and_its_samples_can_be_trained_on_after_sampling():
    model = tiny()
    cond = torch.tensor([0, 1])
    with torch.inference_mode():
        model(torch.zeros(2, 1, dtype=torch.long), cond)
    codes = generate(model, cond, 9)
    model.train()(codes[:, :-1], cond, targets=codes)[1].backward()
    assert model.output.weight.grad is not None


@pytest.mark.parametrize(("options", "message"), [
    ({"dim": 50, "n_head": 4}, "not divisible by 4 heads"), ({"n_kv_head": 3}, "cannot share"),
    ({"block_size": 10, "grid": None}, "no square"), ({"cls_token_num": 2}, "one prefix token"),
    ({"model_type": "i2i"}, "expected c2i or t2i")])
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{"dim": 48, "n_head": 4, **options})


def test_factories_take_the_documented_keywords():
    model = GPT_models["GPT-S"](vocab_size=64, block_size=16, num_classes=5, cls_token_num=120, model_type="t2i",
                                resid_dropout_p=0.1, ffn_dropout_p=0.1, token_dropout_p=0.1, drop_path_rate=0.1,
                                class_dropout_prob=0.1, caption_dim=32)
    logits, loss = model(idx=torch.zeros(1, 15, dtype=torch.long), cond_idx=torch.randn(1, 120, 32),
                         targets=torch.zeros(1, 16, dtype=torch.long), mask=None, valid=None)
    assert logits.shape == (1, 16, 64) and loss.item() == pytest.approx(math.log(64))
