"""Statistics and the walk against brute force: plain hooks, one gradient at a time, one whole forward a layer."""

import hypothesis
import pytest
import torch
from families import FAMILIES, VISION, build, inputs, run
from hypothesis import given
from hypothesis.strategies import integers, sampled_from
from torch.nn import functional

from pennyweight import calibrate
from pennyweight.calibrate.moments import Moments, rows_in
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.model import anatomy
from pennyweight.model.experts import split_experts
from pennyweight.model.loading import of_module
from pennyweight.statistics import Statistics
from pennyweight.weights import Dense, Quantized
from pennyweight.weights.layers import CompactLinear

ALL = frozenset({"second_moment", "absolute", "gradient"})


def double_llama(family="llama"):
    return of_module(build(family).double())


def tokens(count=6, length=12, seed=1):
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))


def given_to(family):
    found = inputs(family)
    return found["pixel_values"] if family.startswith("plain") else found


def relative(found, expected):
    expected = expected.double()
    return float((found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))


def inputs_of_layers(model, ids):
    """By path, the rows (R, N) every linear layer multiplies, seen by plain hooks on the model itself."""
    seen, hooks = {}, []
    for layer in model.anatomy.whole:
        if layer.kind != "embedding":
            module = model.module.get_submodule(layer.path)
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=layer.name, width=layer.shape[1]: seen.update(
                        {name: args[0].reshape(-1, width)}
                    )
                )
            )
    with torch.no_grad():
        model.module(ids)
    for hook in hooks:
        hook.remove()
    return seen


def shrunk(found, weight, statistics):
    """A new weight that tells which statistics it was made from."""
    h = statistics.second_moment
    return Dense((weight.dense() @ (torch.eye(len(h)) - 0.5 * h / h.diagonal().sum()).to(weight.dense())).detach())


# -- moments -----------------------------------------------------------------------------------------------------------


@given(
    rows=integers(0, 40),
    width=sampled_from([1, 3, 191, 192, 193, 400]),
    cuts=integers(1, 3),
    dtype=sampled_from([torch.float32, torch.bfloat16]),
    seed=integers(0, 2**31),
)
@hypothesis.settings(max_examples=40)
def test_moments_are_those_of_all_rows(rows, width, cuts, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=g) + 3 * torch.randn(width, generator=g)).to(dtype)
    moments = Moments(width, {"second_moment", "absolute"}, x.device)
    for part in x.tensor_split(cuts):
        moments.add(part)
    found = moments.statistics("here")
    assert found.count == rows
    if rows == 0:  # unit moments: nothing is known
        assert torch.equal(found.second_moment, torch.eye(width))
        return
    exact = x.double()
    # float32 sums of products of the values as given: bfloat16 rows lose nothing more (a rounded sum: 2e-3)
    assert relative(found.second_moment, exact.T @ exact / rows) < 1e-6
    assert torch.equal(found.second_moment, found.second_moment.T)
    torch.testing.assert_close(found.absolute_mean.double(), exact.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.absolute_max.double(), exact.abs().amax(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_where_the_processor_could_round(dtype, generator):
    # large enough for bfloat16 products, which some processors take when they may: 2e-3 off for float32 rows
    x = torch.randn(4500, 400, generator=generator).to(dtype)
    moments = Moments(400, {"second_moment"}, x.device)
    moments.add(x)
    assert relative(moments.second_moment(), x.double().T @ x.double() / len(x)) < 1e-6


def test_long_sums_in_bfloat16_stay_positive_definite():
    # rows far from zero: rounding the sums to bfloat16 would swamp the small directions
    x = (torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    moments = Moments(64, {"second_moment"}, x.device)
    moments.add(x)
    exact = torch.linalg.eigvalsh(x.double().T @ x.double() / len(x))
    assert torch.linalg.eigvalsh(moments.second_moment().double())[0] > 0.9 * exact[0] > 0


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(4, 6, 3, padding=1),
        torch.nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2),
        torch.nn.Conv2d(4, 4, 3, padding="same", groups=4, padding_mode="reflect"),
        torch.nn.Conv2d(4, 6, 3, padding="valid"),
        torch.nn.Conv1d(4, 6, 3, padding=1, stride=2),
        torch.nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
    ],
    ids=str,
)
def test_a_convolution_multiplies_the_patches_it_says(layer, generator):
    found = anatomy.of(torch.nn.Sequential(layer)).whole[0]
    x = torch.randn(3, 4, *(9, 8)[: layer.weight.ndim - 2], generator=generator)
    rows = torch.cat(list(rows_in(found, layer, x)))  # (B * G * P, N), or (B, G, P) flat
    matrix = layer.weight.detach().flatten(1)
    y = functional.linear(rows, matrix).view(len(x), layer.groups, -1, len(matrix))
    mine = torch.stack([y[:, o * layer.groups // len(matrix), :, o] for o in range(len(matrix))], 1)
    expected = (layer(x) - layer.bias.view(-1, *(1,) * (x.ndim - 2))).flatten(2)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


# -- collect -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "falcon", "phi3"])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_moments_of_a_model_match_plain_hooks(family, batch):
    model, ids = double_llama(family), tokens()
    found = calibrate.collect(model, ids, needs={"second_moment", "absolute"}, batch=batch)
    for name, rows in inputs_of_layers(model, ids).items():
        assert found[name].count == len(rows)
        assert relative(found[name].second_moment, rows.T @ rows / len(rows)) < 1e-6, name
        assert relative(found[name].absolute_mean, rows.abs().mean(0)) < 1e-6, name
        assert relative(found[name].absolute_max, rows.abs().amax(0)) < 1e-6, name
    assert {layer.name for layer in model.anatomy.layers()} <= set(found)


def test_maps_of_one_input_share_one_tensor():
    found = calibrate.collect(of_module(build("llama")), tokens())
    block = "model.layers.1"
    query, key, value = (found[f"{block}.self_attn.{part}_proj"].second_moment for part in "qkv")
    assert query is key is value
    assert found[f"{block}.mlp.gate_proj"].second_moment is found[f"{block}.mlp.up_proj"].second_moment


def test_parts_of_fused_layers_have_entries():
    found = calibrate.collect(of_module(build("phi3")), tokens(), needs=ALL)
    whole = found["model.layers.0.self_attn.qkv_proj"]
    key = found["model.layers.0.self_attn.qkv_proj#attention.key"]
    assert key.second_moment is whole.second_moment
    assert torch.equal(key.gradient, whole.gradient[32:48])


def brute_force_gradients(model, ids, windows):
    """By name, the mean over tokens of the squared gradient of the summed loss: autograd on the model itself."""
    outs = {}
    hooks = [
        model.module.get_submodule(layer.path).register_forward_hook(
            lambda _, args, out, name=layer.name: outs.update({name: out})
        )
        for layer in model.anatomy.whole
    ]
    squares, tables = {}, {}
    for window in ids[:windows]:  # one at a time
        model.module.requires_grad_(True)
        logits = model.module(window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:], reduction="sum")
        names = list(outs)
        for name, g in zip(names, torch.autograd.grad(loss, [outs[n] for n in names], allow_unused=True), strict=True):
            if g is not None:
                squares[name] = squares.get(name, 0) + g.square().flatten(0, -2).sum(0)
                tables[name] = tables.get(name, 0) + g.flatten(0, -2).T @ g.flatten(0, -2)
    for hook in hooks:
        hook.remove()
    count = ids[:windows].numel()
    return {n: s / count for n, s in squares.items()}, {n: s / count for n, s in tables.items()}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3", "gemma2"])
def test_gradients_match_brute_force(family):
    model, ids = double_llama(family), tokens()
    found = calibrate.collect(model, ids, needs={"gradient"}, gradient_tokens=4 * 12 - 5)
    squares, tables = brute_force_gradients(model, ids, windows=4)
    for layer in model.anatomy.whole:
        name = layer.name
        if layer.kind == "embedding":
            shares = torch.bincount(ids[:4].flatten(), minlength=layer.shape[0]) / (4 * 12)
            if layer.role == "embedding":
                factor = 32**0.5 if family == "gemma2" else 1.0
                assert relative(found[name].gradient, shares) < 1e-6
                assert relative(found[name].second_moment, tables[name] * factor**2) < 1e-5, name
        elif layer.role == "head" and family != "gemma2":
            with torch.no_grad():
                p = model.module(ids[:4]).logits.softmax(-1)
            assert relative(found[name].gradient, (p - p.square()).flatten(0, 1).mean(0)) < 1e-5
        else:  # a capped head is differentiated like everything else
            assert relative(found[name].gradient, squares[name]) < 1e-5, name


def test_a_gradient_is_what_finite_differences_say():
    model, ids = double_llama(), tokens(1)
    name, feature = "model.layers.0.mlp.up_proj", 7
    nudge = torch.zeros(1, 12, 48, dtype=torch.float64)

    def loss():
        hook = model.module.get_submodule(name).register_forward_hook(lambda _, args, out: out + nudge)
        with torch.no_grad():
            logits = model.module(ids).logits[0]
        hook.remove()
        return functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")

    total = 0.0
    for token in range(12):
        nudge[0, token, feature] = 1e-2  # norms round to float32 whatever the model is in
        above = loss()
        nudge[0, token, feature] = -1e-2
        total += float((above - loss()) / 2e-2) ** 2
        nudge.zero_()
    found = calibrate.collect(model, ids, needs={"gradient"})
    assert float(found[name].gradient[feature]) == pytest.approx(total / 12, rel=5e-3)


def test_sampled_labels_are_seeded_and_differ_from_the_text():
    model, ids, name = of_module(build("llama")), tokens(), "model.layers.0.mlp.down_proj"
    draws = [
        calibrate.collect(model, ids, needs={"gradient"}, labels=labels, seed=seed)[name].gradient
        for labels, seed in (("sampled", 0), ("sampled", 0), ("sampled", 1), ("true", 0))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_a_loss_of_ones_own():
    model, ids = double_llama(), tokens(2)
    own = calibrate.collect(
        model, ids, needs={"gradient"},
        loss=lambda out, given: functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten(), reduction="sum"
        ),
    )  # fmt: skip
    usual = calibrate.collect(model, ids, needs={"gradient"})
    name = "model.layers.1.self_attn.o_proj"
    assert relative(own[name].gradient, usual[name].gradient) < 1e-6


def test_bfloat16_statistics_are_near_those_in_double():
    # a forward in 8-bit mantissas is off by 2^-9 an operation, some tens of them in a row, and moments are squares
    exact, ids = double_llama(), tokens()
    rough = of_module(build("llama"))
    wanted = calibrate.collect(exact, ids, needs=ALL)
    found = calibrate.collect(rough, ids, needs=ALL, dtype=torch.bfloat16)
    for name, statistics in wanted.items():
        if statistics.second_moment is not None:
            assert relative(found[name].second_moment, statistics.second_moment) < 0.04, name
        assert relative(found[name].gradient, statistics.gradient) < 0.08, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_seen_in_every_layer(family):
    module = build(family)
    split_experts(module)
    model = of_module(module)
    before = run(module, family)
    found = calibrate.collect(model, given_to(family), needs=ALL)
    for layer in model.anatomy.layers():
        statistics = found[layer.name]
        reached = statistics.count > 0
        assert reached or layer.role.startswith("moe.experts"), layer.name
        assert statistics.gradient.shape == layer.shape[:1]
        assert bool(statistics.gradient.any()) == reached, layer.name
        if layer.kind != "embedding":
            assert statistics.second_moment.shape == (layer.shape[1],) * 2
            assert statistics.absolute_max.shape == (layer.shape[1],)
    assert torch.equal(run(module, family), before)


def test_padding_does_not_count():
    model = of_module(build("bert").double())
    ids = tokens(4)
    padded = {"input_ids": torch.cat([ids, torch.full((4, 5), 2)], 1), "attention_mask": torch.ones(4, 17).long()}
    padded["attention_mask"][:, 12:] = 0
    for batch in (None, 3):
        found = calibrate.collect(model, padded, needs=ALL, batch=batch, labels="sampled")
        plain = calibrate.collect(model, ids, needs={"second_moment", "absolute"})
        for name, statistics in plain.items():
            if "position" not in name:  # positions are looked up once for all windows
                assert found[name].count == statistics.count == 48, name
            if statistics.second_moment is not None:
                assert relative(found[name].second_moment, statistics.second_moment) < 1e-6, name
                assert relative(found[name].absolute_max, statistics.absolute_max) < 1e-6, name


def test_padding_does_not_count_in_flattened_rows():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = anatomy.of(torch.nn.Sequential(torch.nn.Linear(2, 2))).whole[0]
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(torch.cat(list(rows_in(found, None, x, mask))), x[[0, 1, 3]])
    routed = x[:4]  # what an expert is sent has lost its place among the windows
    assert torch.equal(torch.cat(list(rows_in(found, None, routed, mask))), routed)


def test_an_expert_nobody_was_sent_to_has_unit_moments():
    module = build("mixtral")
    split_experts(module)
    found = calibrate.collect(of_module(module), tokens(1, 1))  # one token goes to two of four experts
    idle = [s for name, s in found.items() if ".experts." in name and s.count == 0]
    assert len(idle) == 2 * 2 * 3
    assert all(torch.equal(s.second_moment, torch.eye(len(s.second_moment))) for s in idle)


def test_a_compact_model_has_the_statistics_of_its_dense_self():
    compact, dense = of_module(build("llama-tied")), of_module(build("llama-tied"))
    for layer in compact.anatomy.layers():
        weight = Quantized.nearest(anatomy.matrix(compact.module, layer), bits=4, group_size=8)
        anatomy.replace(compact.module, layer.path, weight)
        with torch.no_grad():
            anatomy.matrix(dense.module, layer).copy_(weight.dense())
    found, wanted = (calibrate.collect(m, tokens(), needs=ALL, dtype=torch.float32) for m in (compact, dense))
    for name, statistics in wanted.items():
        assert relative(found[name].gradient, statistics.gradient) < 1e-4, name
        if statistics.second_moment is not None:
            assert relative(found[name].second_moment, statistics.second_moment) < 1e-4, name


# -- walk --------------------------------------------------------------------------------------------------------------


def groups_in_order(model):
    found = {}
    for layer in model.anatomy.layers():
        if layer.block is not None:
            found.setdefault(layer.input_group, []).append(layer)
    return found


def brute_force_walk(module, ids, by_block):
    """Layer by layer a whole forward of the model as it is by then, in double; or one for all layers of a block."""
    model = of_module(module)
    groups = list(groups_in_order(model).values())
    rows = {}
    for index, group in enumerate(groups):
        if not by_block or index == 0 or groups[index - 1][0].block != group[0].block:
            rows = inputs_of_layers(model, ids)
        for layer in group:
            x = rows[layer.name]
            matrix = anatomy.matrix(module, layer)
            new = shrunk(layer, Dense(matrix.clone()), Statistics(second_moment=x.T @ x / len(x)))
            with torch.no_grad():
                matrix.copy_(new.dense())
    return {layer.name: anatomy.matrix(module, layer) for group in groups for layer in group}


def shrunk_in_double(found, weight, statistics):
    return shrunk(found, weight, Statistics(second_moment=statistics.second_moment.double()))


@pytest.mark.parametrize(("batch", "passes"), [(None, 1), (4, 2), (1, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon"])
def test_a_layer_sees_what_was_fitted_before_it(family, batch, passes):
    expected = brute_force_walk(build(family).double(), tokens(), by_block=passes == 2)
    model, settled = double_llama(family), []
    inside = [layer.name for group in groups_in_order(model).values() for layer in group]
    found = calibrate.walk(
        model, tokens(), shrunk_in_double, only=inside, batch=batch, finished=lambda s: settled.append(s)
    )
    assert list(found) == inside
    assert [(s.name, s.passes) for s in settled] == [(block.path, passes) for block in model.anatomy.blocks]
    for name, matrix in expected.items():
        # moments are float32 sums; a layer that saw the unfitted outputs before it is off by more than 1e-2
        assert relative(found[name].dense(), matrix) < 1e-6, name


def test_walking_in_parallel_sees_the_unmodified_model():
    model, ids, seen = of_module(build("llama")), tokens(), {}

    def solve(found, weight, statistics):
        seen[found.name] = statistics
        return Dense(torch.zeros(found.shape))

    wanted = calibrate.collect(model, ids)
    calibrate.walk(model, ids, solve, sequential=False)
    for name, statistics in seen.items():
        if statistics.second_moment is not None:
            assert torch.equal(statistics.second_moment, wanted[name].second_moment), name
    assert not run(model.module, "llama").any()


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_putting_the_same_weights_back_changes_nothing(family, batch):
    module = build(family)
    split_experts(module)
    before = run(module, family)
    layers = of_module(module).anatomy.layers()
    found = calibrate.walk(
        of_module(module), given_to(family), lambda f, w, s: Dense(w.dense().detach().clone()), batch=batch
    )
    assert list(found) == [layer.name for layer in layers]
    torch.testing.assert_close(run(module, family), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", sorted(VISION | {"t5", "gemma3", "mixtral"}))
def test_a_few_windows_at_a_time_see_the_same(family):
    module = build(family)
    split_experts(module)
    whole, parts = (
        calibrate.collect(of_module(module), given_to(family), dtype=torch.float32, batch=batch) for batch in (None, 1)
    )
    for name, statistics in whole.items():
        if statistics.second_moment is None:  # a table of positions is asked once for all windows, or for each few
            assert relative(parts[name].gradient, statistics.gradient) < 1e-6, name
        else:
            assert parts[name].count == statistics.count, name
            assert relative(parts[name].second_moment, statistics.second_moment) < 1e-4, name


def test_blocks_are_cut_when_their_activations_do_not_fit():
    settled = []
    calibrate.walk(
        of_module(build("llama")), tokens(), lambda f, w, s: None, activation_bytes=50_000, finished=settled.append
    )
    assert {s.passes for s in settled if s.name.startswith("model.layers")} == {2}


def test_layers_of_one_input_are_solved_together():
    model, calls = of_module(build("llama")), []

    def solve_group(maps, weights, statistics):
        calls.append([found.name.rpartition(".")[2] for found in maps])
        assert len({id(s.second_moment) for s in statistics}) == 1
        return [Dense(w.dense().detach() * 2) for w in weights]

    calibrate.walk(model, tokens(), solve_group=solve_group)
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert calls == [["embed_tokens"], *block, *block, ["lm_head"]]
    assert isinstance(model.module.model.layers[0].mlp.up_proj, CompactLinear)


def test_a_tied_table_is_met_once_and_serves_twice():
    model, seen = of_module(build("llama-tied")), []

    def solve(found, weight, statistics):
        seen.append((found.name, statistics.count, statistics.gradient is not None))
        return Dense(weight.dense().detach() * 0.5)

    calibrate.walk(model, tokens(), solve)
    assert seen[0] == ("model.embed_tokens", 72, True)
    assert not any(name == "lm_head" for name, _, _ in seen)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


@pytest.mark.parametrize("batch", [None, 2])
def test_a_stopped_walk_goes_on_bit_identical(batch):
    def rounded(found, weight, statistics):
        scale = statistics.second_moment.diagonal().mean() if statistics.second_moment is not None else 1.0
        return Quantized.nearest(weight.dense() * (1 + 0.01 * scale), bits=4, group_size=8)

    whole = calibrate.walk(of_module(build("qwen3")), tokens(), rounded, batch=batch)
    journal = {}
    calibrate.walk(
        of_module(build("qwen3")),
        tokens(),
        rounded,
        batch=batch,
        finished=lambda s: journal.update({s.name: s.weights}),
    )
    for stop in range(len(journal) + 1):
        done, solved = dict(list(journal.items())[:stop]), []

        def again(found, weight, statistics, solved=solved):
            solved.append(found.name)
            return rounded(found, weight, statistics)

        model = of_module(build("qwen3"))
        resumed = calibrate.walk(model, tokens(), again, batch=batch, done=done)
        assert not set(solved) & {name for weights in done.values() for name in weights}
        assert list(resumed) == list(whole)
        for name, weight in whole.items():
            for key, tensor in weight.state_dict().items():
                assert torch.equal(resumed[name].state_dict()[key], tensor), (stop, name)


def test_a_walk_that_fails_leaves_the_model_alone():
    model, count = of_module(build("llama")), []
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}

    def solve(found, weight, statistics):
        count.append(found)
        if len(count) == 9:
            raise KeyboardInterrupt
        return Dense(torch.zeros(found.shape))

    with pytest.raises(KeyboardInterrupt):
        calibrate.walk(model, tokens(), solve)
    after = model.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_nothing_is_run_when_nothing_is_needed():
    model = of_module(build("llama"))
    model.module.forward = None  # calling it would fail
    found = calibrate.walk(model, None, lambda f, w, s: Dense(w.dense().detach()), needs=())
    assert len(found) == len(model.anatomy.layers())


def test_a_second_walk_is_given_what_the_first_put_in():
    model = of_module(build("llama"))
    first = calibrate.walk(model, tokens(), lambda f, w, s: Quantized.nearest(w.dense(), bits=4, group_size=8))
    given_weights = {}
    calibrate.walk(model, tokens(), lambda f, w, s: given_weights.update({f.name: w}))
    assert all(given_weights[name] is weight for name, weight in first.items())


def test_known_gradients_are_handed_over_and_missing_ones_found():
    model, ids, seen = of_module(build("llama")), tokens(), {}
    wanted = calibrate.collect(model, ids, needs={"gradient"})
    for known in (wanted, None):
        seen.clear()
        calibrate.walk(model, ids, lambda f, w, s: seen.update({f.name: s}), needs=ALL, known=known)
        for layer in model.anatomy.layers():
            assert torch.equal(seen[layer.name].gradient, wanted[layer.name].gradient), layer.name
            assert (seen[layer.name].second_moment is not None) or layer.kind == "embedding"
    assert torch.equal(seen["model.embed_tokens"].second_moment, wanted["model.embed_tokens"].second_moment)


def test_results_can_be_trained_and_progress_is_told():
    model, told = of_module(build("llama")), []
    found = calibrate.walk(
        model, tokens(), lambda f, w, s: Dense(w.dense().detach() * 2), report=lambda *now: told.append(now)
    )
    model.module(tokens()).logits.sum().backward()
    assert found["lm_head"].matrix.grad is not None
    assert told == [("calibrate", done, 4) for done in range(1, 5)]


def test_the_model_and_torch_are_left_as_they_were():
    model = of_module(build("llama").train())
    model.module.config.use_cache = True
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled()
    calibrate.collect(model, tokens(), needs=ALL)
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled()) == before
    assert model.module.config.use_cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())


# -- bad input ---------------------------------------------------------------------------------------------------------


def no_change(found, weight, statistics):
    return None


def test_bad_requests_say_what_is_wrong():
    model = of_module(build("llama"))
    with pytest.raises(OptionError, match="unknown statistic 'hessian'; there are absolute, gradient, second_moment"):
        calibrate.collect(model, tokens(), needs={"hessian"})
    with pytest.raises(OptionError, match="'lm_haed' is none of the 16 layers"):
        calibrate.walk(model, tokens(), no_change, only=["lm_haed"])
    with pytest.raises(OptionError, match="either solve or solve_group"):
        calibrate.walk(model, tokens())
    with pytest.raises(DataError, match="second_moment cannot be found without calibration windows"):
        calibrate.walk(model, None, no_change)
    with pytest.raises(DataError, match=r"calibration windows \(0, 12\); give at least one"):
        calibrate.collect(model, tokens(0))
    with pytest.raises(DataError, match="give input_ids and decoder_input_ids by name"):
        calibrate.collect(of_module(build("t5")), tokens())


def test_overflow_names_the_layer():
    module = build("llama")
    with torch.no_grad():
        module.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(DataError, match=r"model.layers.1.self_attn.q_proj: its inputs .* are NaN or infinite"):
        calibrate.collect(of_module(module), tokens())


def test_a_wrong_anatomy_is_found_out():
    model = of_module(build("llama"))
    maps = {found.name: found for found in model.anatomy.whole}
    for name, found in maps.items():
        if name.endswith("o_proj"):
            object.__setattr__(found, "input_group", name.replace("o_proj", "q_proj"))
    with pytest.raises(ModelError, match=r"o_proj: does not read what .*q_proj reads"):
        calibrate.collect(model, tokens(), dtype=torch.float32)
