"""quantize.efficientqat and quantize.l4q against autograd of what the papers write, and against their parts by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import families
import pytest
import torch
import toys
from problems import problem
from torch import Tensor, nn

from pennyweight.apply import apply
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.fit import fit
from pennyweight.lever import make
from pennyweight.levers.quantize.efficientqat import EfficientQAT, block_ap, tune_scales
from pennyweight.levers.quantize.l4q import L4Q
from pennyweight.levers.quantize.rtn import RTN
from pennyweight.model import anatomy, load
from pennyweight.model.model import Model
from pennyweight.repair import with_factors
from pennyweight.solvers.end_to_end import loss_towards, mean_loss
from pennyweight.solvers.fake_quant import affine, flushed, in_groups, learned_step, out_of_groups, stepped
from pennyweight.solvers.rounding import GridOptions
from pennyweight.solvers.trained import Merged, Rescaled, Rounded, rescalable
from pennyweight.solvers.two_streams import two_streams
from pennyweight.statistics import NO_STATISTICS
from pennyweight.weights import Dense, LowRank, Quantized, Sum, stored_bytes
from pennyweight.work import Work


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(out: Tensor, leaves: list[Tensor], seed: int = 9) -> list[Tensor]:
    """Of a random weighting of ``out``."""
    return list(torch.autograd.grad((out * draw(*out.shape, seed=seed, dtype=out.dtype)).sum(), leaves))


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one - other).detach().norm()) <= tolerance * float(other.detach().norm()) + tolerance


def through(rounded: Tensor, x: Tensor) -> Tensor:
    return (rounded - x).detach() + x


def llama(**options: object) -> Model:
    return Model(families.build("llama", **options), None, "llama", kind="causal-lm")


def ids(count: int, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(3, families.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def work(model: Model, windows: Tensor | dict[str, Tensor] | None, seed: int = 0) -> Work:
    return Work(model=model, windows=windows, maps=model.anatomy.layers(), seed=seed)


def quantized(module: nn.Module) -> list[Quantized]:
    return [part for part in module.modules() if isinstance(part, Quantized)]


# --- rounding that can be trained through


@pytest.mark.parametrize("bits", [2, 4])
def test_affine_has_the_values_and_gradients_of_the_official_expression(bits):
    x, scale = draw(6, 3, 8), 0.4 + 0.3 * draw(6, 3, 1, seed=1).abs()
    zero = 2**bits * (draw(6, 3, 1, seed=2).abs() - 0.2)  # fractions, some below the codes and some above
    leaves = [tensor.requires_grad_() for tensor in (x, scale, zero)]
    highest = 2**bits - 1
    whole = through(through(zero.round(), zero).clamp(0, highest), through(zero.round(), zero))
    code = through((x / scale).round(), x / scale) + whole
    wanted = (code.clamp(0, highest) - whole) * scale
    found = affine(x, scale, zero, bits)
    assert torch.equal(found, wanted)
    assert bool(((code < 0) | (code > highest)).any())
    same(gradients(found, leaves), gradients(wanted, leaves), 1e-12)


@pytest.mark.parametrize("offsets", [False, True])
def test_stepped_has_the_values_and_gradients_of_the_explicit_expression(offsets):
    x, step = draw(5, 4, 16), 0.3 + 0.1 * draw(5, 4, 1, seed=1).abs()
    offset = 0.2 * draw(5, 4, 1, seed=2)
    leaves = [tensor.requires_grad_() for tensor in ((x, step, offset) if offsets else (x, step))]
    level = ((x - offset if offsets else x) / step).clamp(-4, 3)
    wanted = through(level.round(), level) * step + (offset if offsets else 0)
    found = stepped(x, step, offset if offsets else None, -4, 3)
    same([found], [wanted], 1e-12)
    same(gradients(found, leaves), gradients(wanted, leaves), 1e-12)


def test_on_the_end_of_the_range_an_entry_is_inside_for_l4q_and_outside_for_lsq():
    x, step = torch.tensor([[-2.0, 1.5]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    of_x, of_step = torch.autograd.grad(stepped(x, step, None, -4, 3).sum(), [x, step])
    assert (of_x.tolist(), of_step.item()) == ([[1.0, 1.0]], 0.0)
    of_x, of_step = torch.autograd.grad(learned_step(x, step, 3).sum(), [x, step])
    assert of_x.tolist() == [[0.0, 0.0]]
    assert of_step.item() == pytest.approx((-4 + 3) / math.sqrt(2 * 3))


def test_without_an_adapter_steps_learn_as_lsq_has_it():
    matrix = draw(6, 32, dtype=torch.float32)
    layer = Merged(matrix, bits=3, group_size=8, up=torch.zeros(6, 0), down=torch.zeros(0, 32), factor=1.0)
    with torch.no_grad():
        layer.step.mul_(0.7).copy_(layer.step.half().float())  # some entries are clamped
    step = layer.step.detach()[..., None].requires_grad_()
    wanted = out_of_groups(learned_step(in_groups(matrix, 8), step, 3), 32)
    found = layer.dense()
    assert torch.equal(found, wanted)
    (of_step,) = gradients(wanted, [step])
    same(gradients(found, [layer.step]), [of_step[..., 0] * math.sqrt(8 * 3)], 1e-6)


def merged(rows: int = 10, columns: int = 20, rank: int = 3, bits: int = 3, group_size: int | None = 8) -> Merged:
    """With an adapter, steps and offsets that are under way: some entries are clamped."""
    layer = Merged(
        draw(rows, columns, dtype=torch.float32), bits=bits, group_size=group_size, factor=1.5,
        up=0.3 * draw(rows, rank, seed=1, dtype=torch.float32), down=draw(rank, columns, seed=2, dtype=torch.float32),
    )  # fmt: skip
    with torch.no_grad():
        layer.step.mul_(0.6)
        assert layer.offset is not None
        layer.offset.copy_(0.1 * draw(*layer.offset.shape, seed=3))
    return layer


def test_the_flushed_backward_gives_what_the_paper_writes():
    layer, x = merged(columns=24), draw(2, 7, 24, seed=5, dtype=torch.float32).requires_grad_()
    assert layer.offset is not None
    leaves = [x, layer.up, layer.down, layer.step, layer.offset]
    y = layer(x)
    # by hand, in float64, from the stored steps and offsets (section 3.2)
    step = layer.step.detach().half().double().repeat_interleave(8, 1)
    offset = (layer.offset.detach() + layer.low * layer.step.detach().half().float()).half().double()
    offset = offset.repeat_interleave(8, 1) - layer.low * step
    level = (layer.matrix.double() + 1.5 * (layer.up @ layer.down).detach().double() - offset) / step
    inside = (level >= -4) & (level <= 3)
    rounded = level.clamp(-4, 3).round()
    made = rounded * step + offset
    out = draw(*y.shape, seed=9, dtype=torch.float32).double()
    of_matrix = out.flatten(0, 1).T @ x.detach().double().flatten(0, 1)  # the one gradient of the weight's shape
    slope = torch.where(inside, rounded - level, level.clamp(-4, 3))
    wanted = [
        out @ made,
        1.5 * (of_matrix * inside) @ layer.down.detach().double().T,
        1.5 * layer.up.detach().double().T @ (of_matrix * inside),
        (of_matrix * slope).view(10, 3, 8).sum(-1),
        (of_matrix * ~inside).view(10, 3, 8).sum(-1),
    ]
    assert 0.02 < float((~inside).double().mean()) < 0.5
    same([y.double()], [x.detach().double() @ made.T], 1e-5)
    same([found.double() for found in gradients(y, leaves)], wanted, 1e-5)
    same(gradients(layer(x), leaves), gradients(x @ layer.dense().T, leaves), 1e-5)


def test_flushing_is_plain_autograd_in_any_dtype_and_computes_in_that_of_autocast():
    x, a, b = (t.requires_grad_() for t in (draw(3, 5, 6), draw(4, 2, seed=1), draw(2, 6, seed=2)))

    def make(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other).sin()

    same(gradients(flushed(x, make, a, b), [x, a, b]), gradients(x @ make(a, b).T, [x, a, b]), 1e-12)
    frozen = a.detach()
    same(gradients(flushed(x, make, frozen, b), [b]), gradients(x @ make(frozen, b).T, [b]), 1e-12)
    same(gradients(flushed(x, make, frozen, b.detach()), [x]), gradients(x @ make(frozen, b.detach()).T, [x]), 1e-12)
    half = [t.detach().float().requires_grad_() for t in (x, a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        y = flushed(half[0], make, *half[1:])
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), half)
    wanted = torch.autograd.grad((x @ make(a, b).T).square().sum(), [x, a, b])
    assert [one.dtype for one in found] == [torch.float32] * 3
    same([one.double() for one in found], list(wanted), 0.02)


def test_training_a_merged_adapter_keeps_no_tensor_of_the_weights_shape():
    """The memory of a step: tensors saved for the backward, gradients, and the optimizer's state."""
    matrix, x = draw(64, 96, dtype=torch.float32), draw(4, 96, seed=1, dtype=torch.float32).requires_grad_()

    def state(layer: nn.Module) -> tuple[int, list[tuple[int, ...]]]:
        seen: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor
            return tensor

        trained = [p for p in layer.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = layer(x).square().sum()
        own = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
        loss.backward()
        adam.step()
        found = [tensor for pointer, tensor in seen.items() if pointer not in own]
        found += [p.grad for p in trained] + [
            t for s in adam.state.values() for t in s.values() if isinstance(t, Tensor)
        ]
        return sum(t.nbytes for t in found), [tuple(t.shape) for t in found if t.numel() >= matrix.numel()]

    up, down = torch.zeros(64, 4), draw(4, 96, seed=2, dtype=torch.float32)
    ours, large = state(Merged(matrix, bits=4, group_size=32, up=up, down=down, factor=2.0))
    whole, many = state(Rounded(matrix, GridOptions(4, 32).fit(matrix)))
    assert large == []
    assert len(many) >= 4  # what is saved, the gradient, and both moments
    assert ours < 0.2 * whole
    assert ours < 1.5 * state(_Adapted(matrix, up, down))[0] + 6 * 4 * 2 * 64 * 3  # LoRA's, and steps and offsets


class _Adapted(nn.Module):
    """Plain LoRA, for its memory."""

    def __init__(self, matrix: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T + x @ self.down.T @ self.up.T


# --- what stands for a weight while it is trained


@pytest.mark.parametrize("group_size", [None, 8, 7])
def test_a_rounded_weight_freezes_to_exactly_what_it_computed_with(group_size):
    matrix = draw(9, 20, dtype=torch.float32)
    layer = Rounded(matrix, GridOptions(3, group_size).fit(matrix))
    start = layer.frozen()
    nearest = Quantized.nearest(matrix, bits=3, group_size=group_size)
    assert start.state_dict().keys() == nearest.state_dict().keys()
    assert all(torch.equal(tensor, nearest.state_dict()[name]) for name, tensor in start.state_dict().items())
    with torch.no_grad():
        for number, parameter in enumerate((layer.matrix, layer.scale, layer.zero)):
            parameter.add_(0.1 * draw(*parameter.shape, seed=number).float())
    frozen = layer.frozen()
    assert torch.equal(frozen.dense(), layer.dense())
    assert not torch.equal(frozen.codes(), start.codes())
    assert frozen.cost() == layer.cost() == start.cost()
    x = draw(3, 20, seed=4, dtype=torch.float32)
    same([layer(x), layer.T(draw(3, 9).float())], [x @ frozen.dense().T, draw(3, 9).float() @ frozen.dense()], 1e-6)


@pytest.mark.parametrize("group_size", [None, 8, 7])
def test_a_merged_weight_freezes_to_what_it_computed_with(group_size):
    layer = merged(group_size=group_size)
    frozen = layer.frozen()
    assert frozen.zero_kind == "float"
    same([frozen.dense()], [layer.dense()], 1e-6)
    assert layer.offset is not None
    with torch.no_grad():
        layer.offset.zero_()
    plain = layer.frozen()
    assert plain.zero_kind == "none"
    same([plain.dense()], [layer.dense()], 1e-7)
    assert frozen.cost().bytes == plain.cost().bytes + 2 * layer.step.numel()


SYMMETRIC = {"symmetric": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2}, {"bits": 8}, {"bits": 3, "zero_kind": "float"}, {"bits": 4, **SYMMETRIC},
        {"bits": 4, **SYMMETRIC, "format": "e2m1"}, {"bits": 8, **SYMMETRIC, "format": "e4m3"},
    ],
)  # fmt: skip
def test_rescaled_codes_start_as_they_are_and_learn_their_scales_alone(settings):
    weight = Quantized.nearest(draw(6, 22, dtype=torch.float32), group_size=8, **settings)
    layer = Rescaled(weight)
    same([layer.dense()], [weight.dense()], 1e-6)
    x = draw(5, 22, seed=1, dtype=torch.float32)
    (found,) = gradients(layer(x), [layer.factor])
    (wanted,) = gradients(weight(x), [weight.scale.matrix])
    same([found], [wanted.float() * weight.scale.dense().detach().float()], 2e-3)  # the oracle's gradient is float16
    assert [name for name, _ in layer.named_parameters()] == ["factor"]
    assert layer.factor.numel() == 6 * 3
    factor = 1 + 0.2 * draw(6, 3, seed=2, dtype=torch.float32)
    with torch.no_grad():
        layer.factor.copy_(factor)
    after = layer.frozen()
    assert torch.equal(after.packed, weight.packed)
    assert after.cost() == weight.cost()
    same([after.dense()], [layer.dense()], 2e-3)
    assert torch.equal(with_factors(weight, {"groups": factor}).dense(), after.dense())


def test_scales_that_are_shared_or_quantized_in_turn_are_left_to_factors_of_outputs():
    matrix = draw(6, 16, dtype=torch.float32)
    assert not rescalable(Quantized.nearest(matrix, bits=4, per_tensor=True))
    assert not rescalable(RTN(bits=4, group_size=4, scale_bits=8).solve(Dense(matrix), NO_STATISTICS))
    assert not rescalable(Dense(matrix))
    assert rescalable(Quantized.nearest(matrix, bits=4))


def test_the_start_of_l4q_clamps_neither_tail():
    matrix, _ = problem(12, 40)
    matrix[3] = 0
    layer = L4Q(bits=3, group_size=16, rank=0).layer(matrix, torch.Generator())
    steps, dense = layer.step.detach(), layer.dense().detach()
    for row in range(12):
        for group in range(3):
            part = matrix[row, 16 * group : 16 * group + 16]
            step = max(abs(float(part.min()) / -4), abs(float(part.max()) / 3)) or 1.0
            assert float(steps[row, group]) == pytest.approx(step, rel=1e-6)
            held = dense[row, 16 * group : 16 * group + 16]
            assert float((held - part).abs().max()) <= 0.502 * step + 4e-3 * step  # float16 moves the ends a little
    assert not dense[3].any()


def test_with_levels_enough_it_is_a_plain_merged_adapter():
    matrix, up, down = draw(8, 12), draw(8, 2, seed=1).requires_grad_(), draw(2, 12, seed=2).requires_grad_()
    whole = matrix + 2 * up @ down
    step = whole.detach().abs().amax(1, keepdim=True) / (2**15 - 2)
    found = stepped(whole, step, None, -(2**15), 2**15 - 1)
    assert bool(((found - whole).abs() <= step).all())
    same(gradients(found, [up, down]), gradients(matrix + 2 * up @ down, [up, down]), 1e-9)


# --- two streams


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "t5", "vit"])
def test_a_block_meets_the_originals_outputs_and_the_changed_models_inputs(family):
    module = families.build(family)
    given = families.inputs(family)
    kinds = {"bert": "masked-lm", "t5": "seq2seq", "vit": "image-classifier"}
    model = Model(module, None, family, kind=kinds.get(family, "causal-lm"))
    blocks = model.anatomy.blocks
    original, changed = copy.deepcopy(module), copy.deepcopy(module)
    for block in blocks:  # what the change will be, made beforehand in a model of its own
        for found in (found for found in block.maps if found.kind != "embedding"):  # T5's positions
            held = changed.get_submodule(found.path).weight
            held.data = held.data * 0.5

    def outputs(of: nn.Module) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for block in blocks:
            hook = lambda _, __, out, path=block.path: seen.update({path: out if isinstance(out, Tensor) else out[0]})  # noqa: E731
            of.get_submodule(block.path).register_forward_hook(hook)
        with torch.no_grad():
            of(**given)
        return seen

    met = []

    def change(meeting) -> None:
        path = meeting.block.path
        same([meeting.targets], [outputs(original)[path]], 1e-5)
        for found in (found for found in meeting.block.maps if found.kind != "embedding"):
            held = module.get_submodule(found.path).weight
            held.data = held.data * 0.5
        everything = torch.arange(meeting.count)
        same([meeting.run(everything)], [outputs(changed)[path]], 1e-5)
        same([meeting.run(everything[1:])], [outputs(changed)[path][1:]], 1e-5)
        met.append(path)

    windows = given if family in ("t5", "bert") else next(iter(given.values()))
    two_streams(model, windows, change, blocks=blocks)
    assert met == [block.path for block in blocks]
    assert not any("forward" in vars(layer) for layer in module.modules())


def test_a_block_that_runs_twice_or_never_is_refused():
    class Twice(nn.Module):
        def __init__(self, order: tuple[int, ...]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(families.PlainConv.Residual(4) for _ in range(2))
            self.order = order

        def forward(self, x: Tensor) -> Tensor:
            for index in self.order:
                x = self.blocks[index](x)
            return x

    for order, words in (((0, 0, 1), "more than once"), ((0,), "does not run this block")):
        model = Model(Twice(order), None, "twice", kind="module")
        with pytest.raises(ModelError, match=words):
            two_streams(model, torch.ones(2, 4, 3, 3), lambda meeting: None, blocks=model.anatomy.blocks)


# --- quantize.efficientqat


@pytest.mark.parametrize("options", [{}, {"bits": 3, "group_size": 10, "search": 8}, {"bits": 4, "group_size": None}])
def test_without_training_it_is_round_to_nearest_to_the_bit(options):
    model, plain = llama(), llama()
    EfficientQAT(epochs=0, steps=0, **options).change(model, work(model, None))
    rtn = RTN(**{"bits": 2, "group_size": 64} | options)
    inside = [found for found in plain.anatomy.layers() if found.block is not None]
    for found in inside:
        wanted = rtn.solve(Dense(anatomy.matrix(plain.module, found)), NO_STATISTICS).state_dict()
        held = model.module.get_submodule(found.path).weight.state_dict()
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert len(quantized(model.module)) == len(inside) == 14


def test_each_epoch_lowers_the_error_of_every_block_and_the_best_one_is_kept():
    model = llama()
    windows = ids(64)
    inside = [found for found in model.anatomy.layers() if found.block is not None]
    norms = {name: p.clone() for name, p in model.module.named_parameters() if "norm" in name}
    history = block_ap(
        model, windows, inside, GridOptions(2, 16), validation=8, epochs=3, batch=2, weight_rate=0.01, scale_rate=0.01,
        dtype=torch.float32,
    )  # fmt: skip
    assert list(history) == [block.path for block in model.anatomy.blocks]
    for errors in history.values():
        assert len(errors) == 4
        assert all(later < earlier for earlier, later in pairwise(errors))
        assert errors[-1] < 0.8 * errors[0]
    moved = {name for name, p in model.module.named_parameters() if "norm" in name and not torch.equal(p, norms[name])}
    assert moved == {name for name in norms if name.startswith("model.layers")}


def test_an_epoch_that_does_harm_is_thrown_away():
    model, plain = llama(), llama()
    EfficientQAT(epochs=1, steps=0, group_size=16, weight_rate=50.0, validation=2).change(model, work(model, ids(8)))
    EfficientQAT(epochs=0, steps=0, group_size=16).change(plain, work(plain, None))
    for one, other in zip(quantized(model.module), quantized(plain.module), strict=True):
        assert torch.equal(one.dense(), other.dense())


def test_both_phases_bring_the_model_nearer_to_the_original_at_the_same_bytes():
    teacher, windows, fresh = llama(), ids(48), ids(16, seed=2)
    loss = loss_towards("original", teacher, "test")
    found = []
    for options in ({"epochs": 0, "steps": 0}, {"epochs": 2, "steps": 0}, {"epochs": 2, "steps": 60}):
        model = llama()
        lever = EfficientQAT(
            bits=2, group_size=16, weight_rate=0.02, steps_rate=0.01, target="original", batch=4, **options
        )
        lever.change(model, work(model, windows))
        found.append((mean_loss(model.module, fresh, loss, batch=16), stored_bytes(model.module)))
        assert {type(held) for held in quantized(model.module)} == {Quantized}
        assert {held.zero_kind for held in quantized(model.module)} == {"integer"}
        assert not model.module.training
        assert all(p.requires_grad for p in model.module.parameters() if p.dtype == torch.float32)
    (rtn, first), (blocks, second), (both, third) = found
    assert first == second == third
    assert blocks < 0.9 * rtn
    assert both < 0.95 * blocks


def test_end_to_end_only_scales_move_one_a_group_and_harm_is_undone():
    model, windows = llama(), ids(24)
    EfficientQAT(epochs=0, steps=0, group_size=16).change(model, work(model, None))
    maps = [found for found in model.anatomy.layers() if found.block is not None]
    before = copy.deepcopy(model.module.state_dict())
    loss = loss_towards("original", llama(), "test")
    options = {"validation": 4, "batch": 4}
    start, end = tune_scales(model, windows, maps, loss, steps=20, rate=0.01, **options)
    assert end < start
    changed = {name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{found.path}.weight.scale.matrix" for found in maps}
    groups = sum(found.shape[0] * math.ceil(found.shape[1] / 16) for found in maps)
    assert sum(model.module.state_dict()[name].numel() for name in changed) == groups
    before = copy.deepcopy(model.module.state_dict())
    start, end = tune_scales(model, windows, maps, loss, steps=5, rate=3.0, **options)
    assert end > start
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


def test_layers_that_are_quantized_already_keep_their_codes():
    model = llama()
    for found in model.anatomy.layers():
        if found.block == 0:
            matrix = anatomy.matrix(model.module, found)
            anatomy.replace(model.module, found.path, Quantized.nearest(matrix, bits=3, group_size=8))
    kept = [held.packed.clone() for held in quantized(model.module)]
    scales = [held.scale.dense().clone() for held in quantized(model.module)]
    lever = EfficientQAT(bits=2, group_size=16, epochs=1, steps=10, steps_rate=0.01, target="original", validation=2)
    lever.change(model, work(model, ids(8)))
    held = quantized(model.module)
    assert [one.bits for one in held] == [3] * 7 + [2] * 7
    assert all(torch.equal(one.packed, other) for one, other in zip(held[:7], kept, strict=True))
    assert not any(torch.equal(one.scale.dense(), other) for one, other in zip(held[:7], scales, strict=True))
    with pytest.raises(OptionError, match=r"quantize.efficientqat: epochs = 2, and every layer .* give epochs = 0"):
        EfficientQAT().change(model, work(model, ids(8)))


def test_padding_does_not_count():
    module = families.build("bert")
    model = Model(module, None, "bert", kind="masked-lm")
    windows = {"input_ids": ids(6, 12), "attention_mask": torch.ones(6, 12, dtype=torch.int64)}
    windows["attention_mask"][:, 8:] = 0
    other = {**windows, "input_ids": windows["input_ids"].clone()}
    other["input_ids"][:, 8:] = 5
    inside = [found for found in model.anatomy.layers() if found.block is not None]
    options = {"validation": 2, "epochs": 1, "batch": 2, "weight_rate": 0.01, "scale_rate": 0.01}
    results = [
        block_ap(
            Model(copy.deepcopy(module), None, "bert", kind="masked-lm"), each, inside, GridOptions(2, 16), **options
        )
        for each in (windows, other)
    ]
    for path, errors in results[0].items():
        assert errors == pytest.approx(results[1][path], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert", "swin", "plain-conv"])
def test_any_model_with_blocks_is_trained(family):
    kinds = {"gpt2": "causal-lm", "bert": "masked-lm", "swin": "image-classifier", "plain-conv": "module"}
    model = Model(families.build(family), None, family, kind=kinds[family])
    windows = draw(6, 3, 16, 16).float() if family in families.VISION else ids(6)
    inside = [found for found in model.anatomy.layers() if found.block is not None]
    EfficientQAT(bits=3, group_size=16, epochs=1, steps=0, validation=2).change(model, work(model, windows))
    assert len(quantized(model.module)) == len(inside) > 0
    families.run(model.module, family)


# --- quantize.l4q


def test_l4q_leaves_plain_quantized_layers_that_fit_the_text_better():
    windows = ids(8)
    found = {}
    for name, options in {"start": {"steps": 0}, "steps": {"rank": 0}, "both": {}}.items():
        model = llama()
        lever = L4Q(bits=3, group_size=16, rate=0.01, **{"steps": 40, "batch": 8} | options)
        lever.change(model, work(model, windows))
        assert {type(held) for held in quantized(model.module)} == {Quantized}
        assert not any(isinstance(part, LowRank | Merged) for part in model.module.modules())
        found[name] = mean_loss(model.module, windows, loss_towards("text", model, "test"), batch=8)
    assert found["both"] < found["steps"] < found["start"]
    assert found["both"] < found["start"] - 0.3


def test_a_layer_that_learned_no_offset_stores_none():
    plain = llama()
    L4Q(bits=4, group_size=16, steps=5, offsets=False).change(plain, work(plain, ids(8)))
    assert {held.zero_kind for held in quantized(plain.module)} == {"none"}
    first = quantized(plain.module)[0]
    adapted = Sum(first, LowRank(torch.zeros(first.shape[0], 4).half(), torch.zeros(4, first.shape[1]).half()))
    assert first.cost().bytes < adapted.cost().bytes  # what QLoRA stores


@pytest.mark.parametrize("lever", [EfficientQAT(samples=8, validation=2, steps=4, epochs=1), L4Q(samples=8, steps=4)])
def test_the_seed_says_it_all(lever):
    first, again, other = (llama() for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        lever.change(model, work(model, ids(8), seed))
    states = [model.module.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


# --- recipes, files, errors


@pytest.mark.parametrize(
    "step",
    [
        "quantize.efficientqat: {bits: 3, group_size: 32, samples: 6, validation: 1, steps: 4}",
        "quantize.l4q: {bits: 4, group_size: 32, steps: 4}",
    ],
    ids=["efficientqat", "l4q"],
)
def test_recipes_run_them_and_files_bring_them_back(step, tmp_path: Path):
    model, text = toys.llama(tmp_path / "model"), toys.text_file(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"pennyweight: 1\nsteps:\n- {step}\n")
    fitted = apply(model, recipe, data=text, out=tmp_path / "out", settings=toys.QUICK)
    again = load(tmp_path / "out")
    probe = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(fitted.model.module(probe).logits, again.module(probe).logits)
    assert len(quantized(again.module)) == 14
    assert again.anatomy.embedding is not None


@pytest.mark.parametrize(
    ("name", "options", "kind", "windows", "error", "words"),
    [
        ("efficientqat", {}, "encoder", ids(9), OptionError, "steps = 0 trains blocks alone; .* is of kind encoder"),
        ("efficientqat", {}, "causal-lm", ids(8), DataError, "8 calibration windows, 8 of them to choose by"),
        ("efficientqat", {}, "causal-lm", None, DataError, "quantize.efficientqat: needs calibration data"),
        ("efficientqat", {"weight_rate": 0.0, "scale_rate": 0.0}, "causal-lm", ids(9), OptionError, "has no effect"),
        ("l4q", {}, "encoder", ids(9), OptionError, "quantize.l4q: trains causal language models .* of kind encoder"),
        ("l4q", {"rank": 40}, "causal-lm", ids(9), OptionError, "rank = 40 for a 32x32 matrix; give at most 32"),
        ("l4q", {"rank": 17}, "causal-lm", ids(9), OptionError, "rank = 17 for a 16x32 matrix; give at most 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_remedy(name, options, kind, windows, error, words):
    model = replace(llama(), kind=kind)
    before = {key: tensor.clone() for key, tensor in model.module.state_dict().items()}
    with pytest.raises(error, match=words):
        make(f"quantize.{name}", options).change(model, work(model, windows))
    assert all(
        torch.equal(model.module.state_dict()[key], tensor) for key, tensor in before.items()
    )  # nothing half-done


def test_other_dtypes_and_steps_without_blocks_are_refused():
    model = Model(families.build("llama").bfloat16(), None, "llama", kind="causal-lm")
    with pytest.raises(ModelError, match="llama is not in float32"):
        EfficientQAT(steps=0).change(model, work(model, ids(9)))
    for lever in (EfficientQAT(), L4Q()):
        outside = [found for found in llama().anatomy.layers() if found.block is None]
        with pytest.raises(OptionError, match="selects no linear layer of a block"):
            lever.change(model, replace(work(model, ids(9)), maps=tuple(outside)))


# --- repair


def test_repair_tunes_the_scales_of_groups_and_adds_no_byte(tmp_path: Path):
    model, text = toys.llama(tmp_path / "model"), toys.text_file(tmp_path)
    settings = replace(toys.QUICK, repair_steps=40)
    options = {"data": text, "budgets": ["36%"], "settings": settings, "levers": "quantize.rtn"}
    plain = fit(model, out=tmp_path / "plain", **options)
    mended = fit(model, out=tmp_path / "mended", time="60s", **options)
    assert "thrown away" not in mended.receipt.notes[0]
    first, second = (each.receipt.figures[0].ratio for each in (plain, mended))
    assert first is not None
    assert second is not None
    assert second.value - 1 < 0.8 * (first.value - 1)
    assert {type(held) for held in quantized(mended.model.module)} == {Quantized}
    held = [part for part in mended.model.module.modules() if rescalable(part)]
    assert len(held) == len(quantized(mended.model.module)) >= 14
