import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snail import AttentionBlock, Block, CausalConv1d, DenseBlock, Stack, TCBlock

C = 3  # channels of the sequences below
LENGTHS = [1, 2, 6, 26, 101]
BLOCKS: dict[str, Callable[[], Block]] = {
    "conv_kernel_1": lambda: CausalConv1d(C, 4, kernel_size=1),
    "conv_dilation_4": lambda: CausalConv1d(C, 4, dilation=4),
    "conv_kernel_3": lambda: CausalConv1d(C, 4, kernel_size=3, dilation=2),
    "dense": lambda: DenseBlock(C, 1, 2),
    "dense_dilation_4": lambda: DenseBlock(C, 4, 2),
    "tc_of_no_layer": lambda: TCBlock(C, 1, 2),
    "tc_6": lambda: TCBlock(C, 6, 2),
    "tc_26": lambda: TCBlock(C, 26, 2),
    "tc_26_as_printed": lambda: TCBlock(C, 26, 2, dilation_start=2),
    "attention": lambda: AttentionBlock(C, 5, 2),
    "attention_of_one_size": lambda: AttentionBlock(C, 4, 4),
    "stack": lambda: Stack(
        nn.LayerNorm(C), AttentionBlock(C, 4, 2), TCBlock(5, 6, 2), AttentionBlock(11, 3, 4), nn.Linear(15, 2)
    ),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(name: str) -> Block:
    return BLOCKS[name]().double()


def sequence(t: int, b: int = 2, c: int = C) -> Tensor:
    return torch.randn(b, t, c, dtype=torch.float64)


def perturb_from(x: Tensor, t: int) -> Tensor:
    """The sequences ``x`` with every step from ``t`` on changed."""
    changed = x.clone()
    changed[:, t:] += 3 * torch.randn_like(changed[:, t:])
    return changed


def read_in_pieces(block: Block, x: Tensor, sizes: Sequence[int]) -> Tensor:
    state, outputs = None, []
    for piece in x.split(list(sizes), dim=1):
        y, state = block.step(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def gradients(y: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a fixed random weighting of ``y``."""
    weighting = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad((y * weighting).sum(), wanted, materialize_grads=True)


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from tensors_in(part)


def offsets_seen(block: Block, length: int) -> set[int]:
    """How many steps back the inputs lie that the last output depends on, by gradient."""
    x = sequence(length, b=1).requires_grad_()
    (gradient,) = gradients(block(x)[:, -1], x)
    return set(gradient[0].abs().sum(dim=-1).flip(0).nonzero().flatten().tolist())


# Causality


def assert_ignores_the_future(block: Block, t: int) -> None:
    x = sequence(t)
    y = block(x)
    assert y.shape == (2, t, block.out_channels)
    for start in range(t):
        changed = block(perturb_from(x, start))
        assert torch.equal(changed[:, :start], y[:, :start])
        assert not torch.equal(changed[:, start], y[:, start])


@pytest.mark.parametrize("t", LENGTHS)
@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_causal_conv_ignores_future(kernel_size: int, dilation: int, t: int) -> None:
    assert_ignores_the_future(CausalConv1d(C, 4, kernel_size=kernel_size, dilation=dilation).double(), t)


@pytest.mark.parametrize("t", LENGTHS)
@every_block
def test_every_block_ignores_future(name: str, t: int) -> None:
    assert_ignores_the_future(build(name), t)


@every_block
def test_every_block_keeps_the_sequences_of_a_batch_apart(name: str) -> None:
    block, x = build(name), sequence(9)
    other = x.clone()
    other[1] += 1
    assert torch.equal(block(other)[0], block(x)[0])


# Reach


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 5, 6, 21, 26, 64, 65, 101])
def test_tcblock_sees_every_past_step(seq_len: int) -> None:
    block = TCBlock(C, seq_len, 2).double()
    assert offsets_seen(block, seq_len) == set(range(seq_len))


@pytest.mark.parametrize(("seq_len", "reached"), [(6, 3), (26, 13), (21, 11), (101, 51)])
def test_tcblock_as_printed_sees_even_offsets_only(seq_len: int, reached: int) -> None:
    block = TCBlock(C, seq_len, 2, dilation_start=2).double()
    seen = offsets_seen(block, seq_len)
    assert len(seen) == reached
    assert seen == set(range(0, seq_len, 2))


@pytest.mark.parametrize("seq_len", [1, 2, 6, 21, 26, 101])
@pytest.mark.parametrize("dilation_start", [1, 2, 3])
def test_tcblock_receptive_field_matches_gradient(seq_len: int, dilation_start: int) -> None:
    block = TCBlock(C, seq_len, 2, dilation_start=dilation_start).double()
    layers = math.ceil(math.log2(seq_len))
    seen = offsets_seen(block, block.receptive_field + 9)
    assert seen == set(range(0, dilation_start * 2**layers, dilation_start))
    assert block.receptive_field == max(seen) + 1


@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
def test_causal_conv_receptive_field_matches_gradient(kernel_size: int, dilation: int) -> None:
    block = CausalConv1d(C, 4, kernel_size=kernel_size, dilation=dilation).double()
    seen = offsets_seen(block, block.receptive_field + 9)
    assert seen == {tap * dilation for tap in range(kernel_size)}
    assert block.receptive_field == max(seen) + 1


@pytest.mark.parametrize("dilation", [1, 2, 5])
def test_dense_block_receptive_field_matches_gradient(dilation: int) -> None:
    block = DenseBlock(C, dilation, 2).double()
    assert offsets_seen(block, 20) == {0, dilation}
    assert block.receptive_field == dilation + 1


def test_attention_sees_every_step_of_any_length() -> None:
    assert offsets_seen(AttentionBlock(C, 5, 2).double(), 101) == set(range(101))


@pytest.mark.parametrize("sizes", [(41,), (1,) * 41, (30, 4, 1, 6)])
@pytest.mark.parametrize("dilation_start", [1, 2])
@pytest.mark.parametrize("seq_len", [1, 6, 11])
def test_tcblock_sees_the_last_steps_of_a_longer_sequence(
    seq_len: int, dilation_start: int, sizes: tuple[int, ...]
) -> None:
    block, x = TCBlock(C, seq_len, 2, dilation_start=dilation_start).double(), sequence(41)
    field = block.receptive_field
    assert field < 41
    last = read_in_pieces(block, x, sizes)[:, -1]
    torch.testing.assert_close(last, block(x[:, -field:])[:, -1], rtol=1e-12, atol=1e-14)
    out_of_view, in_view = x.clone(), x.clone()
    out_of_view[:, :-field] += 1
    in_view[:, -field] += 1
    assert torch.equal(read_in_pieces(block, out_of_view, sizes)[:, -1], last)
    assert not torch.equal(read_in_pieces(block, in_view, sizes)[:, -1], last)


# Reading in pieces


@pytest.mark.parametrize("sizes", [(26,), (1,) * 26, (1, 25), (25, 1), (13, 13), (2, 1, 7, 1, 1, 14)])
@every_block
def test_every_block_reads_pieces_as_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    block, x = build(name), sequence(26).requires_grad_()
    whole, pieces = block(x), read_in_pieces(block, x, sizes)
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-13)
    for part, of_whole in zip(
        gradients(pieces, x, *block.parameters()), gradients(whole, x, *block.parameters()), strict=True
    ):
        torch.testing.assert_close(part, of_whole, rtol=1e-10, atol=1e-12)


@every_block
def test_every_block_leaves_what_it_reads_as_it_was(name: str) -> None:
    block, x, more = build(name), sequence(5), sequence(3)
    _, state = block.step(x)
    before = [tensor.clone() for tensor in tensors_in(state)], x.clone(), more.clone()
    first, _ = block.step(more, state)
    second, _ = block.step(more, state)
    assert torch.equal(first, second)
    assert all(map(torch.equal, tensors_in(state), before[0]))
    assert torch.equal(x, before[1])
    assert torch.equal(more, before[2])


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith(("conv", "dense", "tc"))])
def test_convolution_state_does_not_grow(name: str) -> None:
    block = build(name)
    _, after_one = block.step(sequence(1))
    _, after_many = block.step(sequence(101))
    assert [s.shape for s in tensors_in(after_one)] == [s.shape for s in tensors_in(after_many)]


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith(("conv", "dense", "tc"))])
def test_convolution_state_does_not_grow_step_by_step(name: str) -> None:
    block, state, held = build(name), None, set()
    for step in sequence(60).split(1, dim=1):
        _, state = block.step(step, state)
        held.add(sum(tensor.numel() for tensor in tensors_in(state)))
    assert len(held) == 1


def test_a_step_of_a_convolution_copies_nothing_of_its_past() -> None:
    conv, state = CausalConv1d(C, 3, dilation=8).double(), None
    for step in sequence(20).split(1, dim=1):
        before = state
        _, state = conv.step(step, state)
    assert before is not None and state is not None
    assert len(state) == conv.receptive_field - 1
    assert [kept.data_ptr() for kept in state[:-1]] == [kept.data_ptr() for kept in before[1:]]


# Branching


def read_one_by_one(block: Block, x: Tensor, items: Tensor) -> Tensor:
    """The answer to each item as the last step of a sequence of its own."""
    answers = [block(torch.cat([x, item], dim=1))[:, -1:] for item in items.split(1, dim=1)]
    return torch.cat(answers, dim=1)


@pytest.mark.parametrize("t", [1, 2, 6, 26])
@every_block
def test_every_block_branches_as_separate_sequences(name: str, t: int) -> None:
    block, x, items = build(name), sequence(t).requires_grad_(), sequence(4).requires_grad_()
    _, state = block.step(x)
    branched, separate = block.branch(items, state), read_one_by_one(block, x, items)
    assert branched.shape == (2, 4, block.out_channels)
    torch.testing.assert_close(branched, separate, rtol=1e-11, atol=1e-13)
    wanted = (x, items, *block.parameters())
    for ours, theirs in zip(gradients(branched, *wanted), gradients(separate, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@every_block
def test_every_block_branches_behind_pieces(name: str) -> None:
    block, x, items = build(name), sequence(12), sequence(3)
    state = None
    for piece in x.split([1, 1, 7, 3], dim=1):
        _, state = block.step(piece, state)
    torch.testing.assert_close(block.branch(items, state), read_one_by_one(block, x, items), rtol=1e-11, atol=1e-13)


@every_block
def test_every_block_keeps_its_state_when_it_branches(name: str) -> None:
    block, x, items = build(name), sequence(6), sequence(4)
    _, state = block.step(x)
    before = [tensor.clone() for tensor in tensors_in(state)]
    expected, _ = block.step(items, state)
    block.branch(items, state)
    assert all(map(torch.equal, tensors_in(state), before))
    assert torch.equal(block.step(items, state)[0], expected)


@every_block
def test_every_block_keeps_siblings_apart(name: str) -> None:
    block, x, items = build(name), sequence(6), sequence(4)
    _, state = block.step(x)
    y = block.branch(items, state)
    changed = items.clone()
    changed[:, 1] += 3
    y_changed = block.branch(changed, state)
    assert torch.equal(y_changed[:, [0, 2, 3]], y[:, [0, 2, 3]])
    assert not torch.equal(y_changed[:, 1], y[:, 1])
    torch.testing.assert_close(block.branch(items[:, :1], state), y[:, :1], rtol=1e-12, atol=1e-14)


# What each block computes


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "expected"),
    [(1, 3, [1, 2, 3, 4, 5]), (2, 1, [1, 3, 5, 7, 9]), (2, 2, [1, 2, 4, 6, 8]), (3, 2, [1, 2, 4, 6, 9])],
)
def test_causal_conv_of_ones_sums_the_steps_in_view(kernel_size: int, dilation: int, expected: list[float]) -> None:
    block = CausalConv1d(1, 1, kernel_size=kernel_size, dilation=dilation)
    for parameter in block.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(block.bias)
    assert block(torch.arange(1.0, 6.0).view(1, 5, 1)).flatten().tolist() == expected


def torch_conv(x: Tensor, taps: Tensor, bias: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """torch's own convolution, zeros put in front; ``taps`` ``(kernel_size * out, in)``, the oldest tap first."""
    weight = taps.unflatten(0, (kernel_size, -1)).permute(1, 2, 0)  # (out, in, kernel_size)
    padded = F.pad(x.transpose(1, 2), ((kernel_size - 1) * dilation, 0))
    return F.conv1d(padded, weight, bias, dilation=dilation).transpose(1, 2)


@pytest.mark.parametrize("t", [1, 2, 6, 26])
@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel_size", [1, 2, 3])
def test_causal_conv_matches_torch(kernel_size: int, dilation: int, t: int) -> None:
    block, x = CausalConv1d(C, 4, kernel_size=kernel_size, dilation=dilation).double(), sequence(t)
    expected = torch_conv(x, block.taps.weight, block.bias, kernel_size, dilation)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [1, 2, 6, 26])
@pytest.mark.parametrize("dilation", [1, 2, 8])
def test_dense_block_matches_reference_with_two_convolutions(dilation: int, t: int) -> None:
    filters = 5
    block, x = DenseBlock(C, dilation, filters).double(), sequence(t)
    taps = block.conv.taps.weight.unflatten(0, (2, -1))  # (oldest and newest, 2 * filters, in)
    bias_f, bias_g = block.conv.bias.chunk(2)
    taps_f, taps_g = taps[:, :filters].flatten(0, 1), taps[:, filters:].flatten(0, 1)
    f = torch_conv(x, taps_f, bias_f, 2, dilation)
    g = torch_conv(x, taps_g, bias_g, 2, dilation)
    expected = torch.cat([x, torch.tanh(f) * torch.sigmoid(g)], dim=-1)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-14)


def test_dense_block_gates_have_their_own_weights() -> None:
    block, x = DenseBlock(C, 1, 4).double(), sequence(6)
    before = block(x)[..., C:]
    with torch.no_grad():
        block.conv.bias[4:] += 100  # opens every gate and must leave the filter as it was
        after = block(x)[..., C:]
        open_filter = torch.atanh(after)
        expected = torch_conv(x, block.conv.taps.weight, block.conv.bias, 2, 1)[..., :4]
    torch.testing.assert_close(open_filter, expected)
    assert not torch.allclose(before, after)


def test_tcblock_chains_dense_blocks_whose_dilations_double() -> None:
    block, x = TCBlock(C, 26, 2).double(), sequence(26)
    expected = x
    for dense, dilation in zip(block.blocks, [1, 2, 4, 8, 16], strict=True):
        copy = DenseBlock(expected.shape[-1], dilation, 2).double()
        copy.load_state_dict(dense.state_dict())
        expected = copy(expected)
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", ["dense", "dense_dilation_4", "tc_6", "tc_26", "attention"])
def test_dense_block_concats_input(name: str) -> None:
    block, x, items = build(name), sequence(6), sequence(3)
    y, state = block.step(x)
    assert torch.equal(y[..., :C], x)
    assert torch.equal(block.branch(items, state)[..., :C], items)
    assert block.out_channels > C


def attention_by_hand(block: AttentionBlock, x: Tensor) -> Tensor:
    """Each step's read, one pair of steps at a time; ``x`` is one sequence ``(t, c)``."""
    sizes = [block.key_size, block.key_size, block.value_size]
    weights, biases = block.project.weight.split(sizes), block.project.bias.split(sizes)
    query, key, value = (x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
    reads = []
    for t in range(len(x)):
        logits = [(query[t] * key[s]).sum().item() / math.sqrt(block.key_size) for s in range(t + 1)]
        total = sum(math.exp(logit) for logit in logits)
        reads.append(sum(math.exp(logits[s]) / total * value[s] for s in range(t + 1)))
    return torch.cat([x, torch.stack(reads)], dim=-1)


@pytest.mark.parametrize("t", [1, 2, 6, 26])
def test_attention_matches_reference_loop(t: int) -> None:
    block, x = AttentionBlock(C, 5, 4).double(), 2 * sequence(t)
    y = block(x)
    for episode in range(2):
        torch.testing.assert_close(y[episode], attention_by_hand(block, x[episode]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("t", LENGTHS)
def test_attention_matches_sdpa(t: int) -> None:
    block, x = AttentionBlock(C, 5, 4).double(), 2 * sequence(t)
    query, key, value = block.project(x).split([5, 5, 4], dim=-1)
    read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(block(x), torch.cat([x, read], dim=-1), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("t", LENGTHS)
def test_attention_rows_sum_to_one(t: int, scale: float) -> None:
    weights = AttentionBlock(C, 5, 2).double().weights(scale * sequence(t))
    assert weights.shape == (2, t, t)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, t, dtype=torch.float64))
    assert (weights.triu(1) == 0).all()
    assert (weights >= 0).all()


def test_attention_weights_are_those_of_the_read() -> None:
    block, x = AttentionBlock(C, 5, 2).double(), sequence(26)
    value = block.project(x)[..., -2:]
    torch.testing.assert_close(block(x)[..., C:], block.weights(x) @ value)


def test_attention_attends_to_itself() -> None:
    block, x = AttentionBlock(C, 5, 2).double(), sequence(6)
    weights = block.weights(x)
    assert (weights.diagonal(dim1=1, dim2=2) > 0).all()
    assert (weights[:, 0, 0] == 1).all()
    torch.testing.assert_close(block(x[:, :1])[..., C:], block.project(x[:, :1])[..., -2:])


@pytest.mark.parametrize("name", ["conv_kernel_3", "dense", "tc_6", "attention", "attention_of_one_size"])
def test_every_block_has_a_second_derivative(name: str) -> None:
    block, x = build(name), sequence(3, b=1).requires_grad_()
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


@pytest.mark.parametrize("value_size", [2, 4])  # torch fuses attention where key and value are equally wide
def test_attention_backpropagates_through_a_gradient_step(value_size: int) -> None:
    block, x = AttentionBlock(C, 4, value_size), torch.randn(2, 6, C)
    parameters = dict(block.named_parameters())
    grads = torch.autograd.grad(block(x).square().sum(), list(parameters.values()), create_graph=True)
    adapted = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    torch.func.functional_call(block, adapted, (x,)).square().sum().backward()
    for parameter in parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "tc_of_no_layer"])
def test_every_parameter_receives_gradient(name: str) -> None:
    block, x = build(name), sequence(64)
    for parameter, gradient in zip(block.parameters(), gradients(block(x), *block.parameters()), strict=True):
        assert gradient.flatten(1 if parameter.ndim > 1 else 0).any(dim=-1).all()


# Sizes and types


@every_block
def test_out_channels_property_matches_output(name: str) -> None:
    block, x = build(name), sequence(6)
    y, state = block.step(x)
    assert y.shape == (2, 6, block.out_channels)
    assert block.branch(x, state).shape == (2, 6, block.out_channels)


@pytest.mark.parametrize(
    ("block", "channels"),
    [
        (CausalConv1d(3, 4), 4),
        (DenseBlock(3, 2, 5), 3 + 5),
        (TCBlock(3, 1, 5), 3),
        (TCBlock(3, 2, 5), 3 + 1 * 5),
        (TCBlock(3, 6, 5), 3 + 3 * 5),
        (TCBlock(3, 21, 5), 3 + 5 * 5),
        (TCBlock(3, 26, 5, dilation_start=2), 3 + 5 * 5),
        (TCBlock(3, 64, 5), 3 + 6 * 5),
        (TCBlock(3, 65, 5), 3 + 7 * 5),
        (TCBlock(3, 101, 5), 3 + 7 * 5),
        (AttentionBlock(3, 4, 5), 3 + 5),
        (Stack(AttentionBlock(3, 4, 5), nn.Linear(8, 2)), 2),
        (Stack(AttentionBlock(3, 4, 5), nn.LayerNorm(8), nn.ReLU()), 8),
        (Stack(nn.ReLU(), in_channels=3), 3),
        (Stack(in_channels=3), 3),
    ],
)
def test_out_channels_follow_the_paper(block: Block, channels: int) -> None:
    assert block.out_channels == channels
    assert block(torch.zeros(1, 2, 3)).shape == (1, 2, channels)


@every_block
def test_every_block_runs_under_bfloat16_autocast(name: str) -> None:
    block = build(name).float()
    x, items = torch.randn(2, 9, C, requires_grad=True), torch.randn(2, 4, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = block.step(x[:, :5])
        rest, state = block.step(x[:, 5:], state)
        branched = block.branch(items, state)
        (y.float().square().sum() + rest.float().square().sum() + branched.float().square().sum()).backward()
    torch.testing.assert_close(torch.cat([y, rest], dim=1).float(), block(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(branched.float(), read_one_by_one(block, x, items), rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_block
def test_every_block_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    block, x = build(name).to(dtype), sequence(6).to(dtype)
    y, state = block.step(x)
    assert y.dtype == dtype
    assert block.branch(x, state).dtype == dtype
    assert block(y[..., :C] if y.shape[-1] >= C else x).dtype == dtype


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("in_channels", lambda size: CausalConv1d(size, 4)),
        ("out_channels", lambda size: CausalConv1d(3, size)),
        ("kernel_size", lambda size: CausalConv1d(3, 4, kernel_size=size)),
        ("dilation", lambda size: CausalConv1d(3, 4, dilation=size)),
        ("in_channels", lambda size: DenseBlock(size, 1, 4)),
        ("dilation", lambda size: DenseBlock(3, size, 4)),
        ("filters", lambda size: DenseBlock(3, 1, size)),
        ("in_channels", lambda size: TCBlock(size, 6, 4)),
        ("seq_len", lambda size: TCBlock(3, size, 4)),
        ("filters", lambda size: TCBlock(3, 6, size)),
        ("dilation_start", lambda size: TCBlock(3, 6, 4, dilation_start=size)),
        ("in_channels", lambda size: AttentionBlock(size, 4, 4)),
        ("key_size", lambda size: AttentionBlock(3, size, 4)),
        ("value_size", lambda size: AttentionBlock(3, 4, size)),
    ],
)
def test_every_block_refuses_sizes_below_one(argument: str, make: Callable[[int], Block], size: int) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} is {size}; it must be at least 1$"):
        make(size)


@pytest.mark.parametrize("blocks", [[], [nn.ReLU()], [nn.LayerNorm(3), nn.ReLU()]])
def test_stack_refuses_modules_of_unknown_width(blocks: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=rf"none of the {len(blocks)} modules tells its width; give in_channels"):
        Stack(*blocks)


def test_stack_refuses_a_state_of_another_length() -> None:
    _, state = Stack(DenseBlock(C, 1, 2), DenseBlock(C + 2, 2, 2)).step(torch.zeros(1, 2, C))
    with pytest.raises(ValueError, match=r"longer|shorter"):
        Stack(DenseBlock(C, 1, 2)).branch(torch.zeros(1, 2, C), state)


# -- attention over long sequences, a few rows at a time -------------------------------------------------------------


def attention_pair(rows: int) -> tuple[AttentionBlock, AttentionBlock]:
    """The same attention, once reading ``rows`` steps at a time and once all."""
    torch.manual_seed(0)
    few, whole = AttentionBlock(3, 4, 5).double(), AttentionBlock(3, 4, 5).double()
    whole.load_state_dict(few.state_dict())
    few.rows, whole.rows = rows, 10**9
    return few, whole


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("before", [0, 3])
def test_attention_by_rows_is_attention(rows: int, before: int) -> None:
    few, whole = attention_pair(rows)
    x = torch.randn(2, before + 13, 3, dtype=torch.float64)
    outputs, gradients, seconds = [], [], []
    for block in (few, whole):
        own = x.clone().requires_grad_()
        state = block.step(own[:, :before])[1] if before else None
        y = block.step(own[:, before:], state)[0]
        outputs.append(y)
        inputs = [own, *block.parameters()]
        gradients.append(torch.autograd.grad(y.square().sum(), inputs, create_graph=True))
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in gradients[-1]), inputs))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-9, atol=1e-9)


def kept_for_backward(block: AttentionBlock, steps: int) -> int:
    """Numbers that are kept from the forward pass for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, steps, 3, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    assert y.requires_grad
    return sum(kept.values())


def test_memory_of_attention_by_rows_grows_with_the_length_not_with_its_square() -> None:
    few, whole = attention_pair(rows=16)
    lengths = (256, 512)
    linear, square = ([kept_for_backward(block, steps) for steps in lengths] for block in (few, whole))
    assert linear[1] < 2.2 * linear[0]
    assert square[1] > 3 * square[0]
    assert 4 * linear[1] < square[1]


def test_rows_are_read_at_a_time_only_where_there_are_more() -> None:
    block = AttentionBlock(3, 4, 5)
    assert block.rows == 1024
    block.rows = 8
    x = torch.randn(2, 20, 3)
    _, state = block.step(x[:, :12])
    calls: list[int] = []
    attend = block._attend
    block._attend = lambda query, key: (calls.append(query.shape[1]), attend(query, key))[1]  # type: ignore
    block.step(x[:, 12:], state)
    assert calls == [8]
    calls.clear()
    block(x)
    assert calls == [8, 8, 4]
