"""The training loop: what a plain loop gives, whatever it is cut into, stopped at or spread over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_processes
from torch import nn
from torch.nn import functional

from pennyweight.errors import DataError, ModelError, OptionError, OutputError, ShapeError
from pennyweight.evaluate.perplexity import token_losses
from pennyweight.levers.prune.gradual import GradualPruning
from pennyweight.model import anatomy, safetensors_file
from pennyweight.train import Samples, Trainer, byte_windows, next_token_loss, two_stage
from pennyweight.train.optim import SGDP, AdamP
from pennyweight.train.schedules import constant, power, wsd
from pennyweight.train.sparsity_schedules import CubicSchedule
from pennyweight.zoo.gpt import GPT, GPTConfig

WINDOWS = torch.randint(0, 64, (40, 17), generator=torch.Generator().manual_seed(1))


def gpt(seed=0, dropout=0.0, dtype=torch.float32):
    config = GPTConfig(width=16, depth=2, num_heads=2, vocabulary=64, context=32, dropout=dropout)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trainer(module, optimizer=None, **options):
    optimizer = optimizer or torch.optim.AdamW(module.parameters(), lr=3e-3)
    return Trainer(module, optimizer, options.pop("stream", Samples(WINDOWS)), **{"batch": 8, **options})


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- one step after another


def test_it_is_the_plain_loop_to_the_last_bit():
    plain, ours = gpt(), gpt()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3)
    losses = []
    for step in range(7):  # 40 windows: into the second epoch
        (ids,) = Samples(WINDOWS).take(8 * step, 8)
        loss = functional.cross_entropy(plain(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert trainer(ours, clip=0.5).run(7) == losses
    assert_same(state(ours), state(plain))


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 20])
def test_accumulation_changes_nothing_but_rounding(micro_batch):
    whole, parts = gpt(dtype=torch.float64), gpt(dtype=torch.float64)

    def loss(module, batch):  # in double: the loop's own rounds logits to float32
        return functional.cross_entropy(module(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    one = trainer(whole, torch.optim.SGD(whole.parameters(), lr=0.1), loss=loss).run(3)
    other = trainer(parts, torch.optim.SGD(parts.parameters(), lr=0.1), loss=loss, micro_batch=micro_batch).run(3)
    assert one == pytest.approx(other, rel=1e-6)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(tensor, state(parts)[name], rtol=1e-11, atol=1e-13)


def test_rates_follow_the_schedule_in_steps_and_in_tokens():
    for schedule, unit in (
        (wsd(10, 4, 0.2, "linear", peak=0.5), 1),
        (power(8, eta_max=0.01, warmup_tokens=500), 8 * 17),
    ):
        module = gpt()
        groups = [{"params": list(module.blocks.parameters()), "lr_scale": 0.25}, {"params": [module.norm.weight]}]
        run = trainer(module, torch.optim.SGD(groups, lr=9.0), schedule=schedule)
        for step in range(1, 11):
            run.run(step)
            rates = [group["lr"] for group in run.optimizer.param_groups]
            assert rates == [0.25 * schedule(step * unit), schedule(step * unit)]
        assert (run.steps, run.samples, run.tokens) == (10, 80, 80 * 17)


def test_it_learns():
    text = torch.arange(17).repeat(16, 1) + torch.arange(16)[:, None]
    module = gpt()
    losses = trainer(module, torch.optim.AdamW(module.parameters(), lr=1e-2), stream=Samples(text)).run(60)
    assert losses[0] == pytest.approx(4.16, abs=0.5)
    assert losses[-1] < 0.3
    assert token_losses(module, text).mean() < 0.3


def test_autocast_runs_products_in_bfloat16_and_keeps_weights_in_float32():
    seen, modules = [], [gpt(), gpt()]
    for module, dtype in zip(modules, (None, torch.bfloat16), strict=True):
        module.blocks[0].mlp.up_proj.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        trainer(module, dtype=dtype).run(2)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    for name, tensor in state(modules[1]).items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, state(modules[0])[name], rtol=0, atol=0.02)
    assert trainer(gpt(), dtype="auto").dtype in (None, torch.bfloat16)


def test_callbacks_run_after_each_step_and_pruning_plugs_in():
    module = gpt()
    layer = module.blocks[0].mlp.up_proj
    pruning = GradualPruning([layer], CubicSchedule(final=0.8, start=2, end=8, every=3))
    run, seen = trainer(module, callbacks=[pruning]), []
    for step in range(1, 11):
        run.run(step)
        seen.append(float((layer.weight == 0).float().mean()))
    assert seen == pytest.approx(
        [pruning.schedule.sparsity(step) for step in range(1, 11)], abs=1 / layer.weight.numel()
    )
    pruning.finish()
    assert int((layer.weight == 0).sum()) == round(0.8 * layer.weight.numel())


def test_reports_and_checkpoints_on_the_way(tmp_path):
    seen = []
    module = gpt()
    run = trainer(module)
    losses = run.run(5, save_to=tmp_path / "c", every=2, report=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(losses, 1))
    assert json.loads((tmp_path / "c" / "state.json").read_text())["steps"] == 5
    assert run.run(5) == []


# --- stopping and going on


@pytest.mark.parametrize("cut", [1, 5, 6])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=3e-3),
        lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: AdamP(p, lr=3e-3),
        lambda p: SGDP(p, lr=0.1, momentum=0.9),
    ],
    ids=["adamw", "fused", "sgd", "adamp", "sgdp"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, make, cut):
    def fresh():
        module = gpt(dropout=0.2)  # so that random numbers count
        pruning = GradualPruning([module.blocks[1].mlp.up_proj], CubicSchedule(final=0.6, start=1, end=7, every=2))
        schedule = wsd(9, 2, 0.3, peak=3e-3)
        return module, trainer(module, make(module.parameters()), micro_batch=3, schedule=schedule, callbacks=[pruning])

    torch.manual_seed(7)
    module, run = fresh()
    losses = run.run(cut)
    run.save(tmp_path / "c")
    losses += run.run(9)
    torch.manual_seed(99)
    again, other = fresh()
    other.resume(tmp_path / "c")
    assert other.run(9) == losses[cut:]
    assert_same(state(again), state(module))
    assert other.samples == run.samples
    groups = [{**group, "params": None} for one in (run, other) for group in one.optimizer.param_groups]
    assert groups[0] == groups[1]  # tuples too


def test_a_decay_branches_off_a_stable_run(tmp_path):
    stable = constant(2, peak=3e-3)
    module = gpt()
    run = trainer(module, schedule=stable)
    run.run(9)
    run.save(tmp_path / "c")
    branch = gpt(seed=1)
    other = trainer(branch, schedule=stable.decayed(9, 3, "linear"))
    other.resume(tmp_path / "c")
    other.run(12)
    whole = gpt()
    trainer(whole, schedule=wsd(12, 2, 0.25, "linear", peak=3e-3)).run(12)
    assert_same(state(branch), state(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    module = gpt()
    run = trainer(module)
    run.run(2)
    run.save(tmp_path / "c")
    kept = state(module)
    wider = GPT(GPTConfig(width=32, depth=2, num_heads=2, vocabulary=64, context=32))
    with pytest.raises(
        ModelError, match=r"holds torch\.float32 \(16, 16\) for blocks\.0\.\S+, and the model has .* \(32, 32\)"
    ):
        trainer(wider).resume(tmp_path / "c")
    deeper = GPT(GPTConfig(width=16, depth=3, num_heads=2, vocabulary=64, context=32))
    with pytest.raises(ModelError, match=r"holds nothing for blocks\.2"):
        trainer(deeper).resume(tmp_path / "c")
    half = torch.optim.AdamW(list(gpt().parameters())[:3])
    with pytest.raises(ModelError, match="another optimizer"):
        trainer(gpt(), half).resume(tmp_path / "c")
    with pytest.raises(ModelError, match="holds 0 callbacks, and there are 1"):
        trainer(gpt(), callbacks=[run]).resume(tmp_path / "c")
    with pytest.raises(ModelError, match="no checkpoint there"):
        run.resume(tmp_path)
    assert_same(state(module), kept)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = trainer(gpt())
    run.run(1)
    run.save(tmp_path / "c")
    plain, tensors = tmp_path / "c" / "state.json", tmp_path / "c" / "state.safetensors"
    raw = tensors.read_bytes()
    tensors.write_bytes(raw[:-3])
    with pytest.raises(ModelError, match="truncated"):
        run.resume(tmp_path / "c")
    tensors.write_bytes(raw)
    found = json.loads(plain.read_text())
    plain.write_text(json.dumps(found | {"processes": 2}))
    with pytest.raises(ModelError, match="of 2 processes, and 1 here"):
        run.resume(tmp_path / "c")
    run.resume(tmp_path / "c", exact=False)
    for broken in ("", "[]", "{}", json.dumps(found | {"steps": "one"}), json.dumps(found | {"format": 2})):
        plain.write_text(broken)
        with pytest.raises(ModelError, match=r"cannot be read as a checkpoint|format 2"):
            run.resume(tmp_path / "c")


def test_a_checkpoint_never_takes_the_place_of_other_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    run = trainer(gpt())
    with pytest.raises(OutputError, match=r"holds model\.safetensors"):
        run.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_a_state_that_cannot_be_kept_is_named(tmp_path):
    class Strange:
        def step(self): ...

        def state_dict(self):
            return {"when": {"now": object()}}

        def load_state_dict(self, state): ...

    with pytest.raises(OptionError, match=r"callbacks\.0\.when\.now is a object"):
        trainer(gpt(), callbacks=[Strange()]).save(tmp_path / "c")
    assert not (tmp_path / "c").exists()


# --- what goes wrong


def test_a_loss_that_is_not_finite_stops_before_the_step():
    module = gpt()

    def loss(module, batch):
        return next_token_loss(module, batch) / (float("inf") if run.steps < 2 else 0)

    run = trainer(module, loss=loss)
    run.run(2)
    kept = state(module)
    with pytest.raises(ModelError, match="loss of step 3 is inf"):
        run.run(5)
    assert_same(state(module), kept)
    assert run.steps == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "a batch of 0"),
        ({"micro_batch": 0}, "micro_batch = 0"),
        ({"clip": 0.0}, "clip = 0.0"),
        ({"dtype": torch.float16}, "float16 needs its loss scaled"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(OptionError, match=words):
        trainer(gpt(), **options)


def test_a_loss_for_each_sample_is_refused():
    with pytest.raises(ShapeError, match=r"shape \(8,\); return its mean"):
        trainer(gpt(), loss=lambda module, batch: module(batch[0]).mean((1, 2))).run(1)


# --- samples


def test_samples_visit_every_row_once_an_epoch_in_a_new_order():
    rows, labels = torch.arange(10), torch.arange(10) * 3
    samples = Samples(rows, labels)
    whole, with_labels = samples.take(0, 30)
    assert torch.equal(with_labels, whole * 3)
    epochs = whole.view(3, 10)
    assert torch.equal(epochs.sort(1).values, rows.expand(3, 10))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    for start, count in ((0, 1), (7, 9), (29, 1), (3, 25)):
        assert torch.equal(Samples(rows, labels).take(start, count)[0], whole[start : start + count])
    assert not torch.equal(Samples(rows, seed=1).take(0, 10)[0], epochs[0])
    assert torch.equal(Samples(rows, seed=None).take(5, 10)[0], torch.tensor([5, 6, 7, 8, 9, 0, 1, 2, 3, 4]))
    with pytest.raises(OptionError, match="seed -1"):
        Samples(rows, seed=-1)
    for wrong in ((), (torch.zeros(0, 2),), (rows, rows[:3]), (torch.tensor(3),)):
        with pytest.raises(DataError, match="same number of rows"):
            Samples(*wrong)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_two_stages_skip_and_repeat_nothing(share):
    stable, late = Samples(torch.arange(1000), seed=None), Samples(torch.arange(1000) + 5000, seed=None)
    stream = two_stage(stable, late, switch=37, share=share)
    (whole,) = stream.take(0, 200)
    assert torch.equal(whole[:37], torch.arange(37))
    mixed = whole[37:] >= 5000
    assert abs(int(mixed.sum()) - share * 163) < 1
    assert torch.equal(whole[37:][mixed], 5000 + torch.arange(int(mixed.sum())))
    assert torch.equal(whole[whole < 5000], torch.arange(200 - int(mixed.sum())))
    pieces = [stream.take(start, 8)[0] for start in range(0, 200, 8)]
    assert torch.equal(torch.cat(pieces), whole)
    with pytest.raises(OptionError, match="share 0"):
        two_stage(stable, late, switch=37, share=0)


def test_byte_windows_are_the_bytes_of_their_part():
    texts = ["one é", "two", "three", "four", "five", "six"]
    assert bytes(byte_windows(texts, part="heldout", length=5).flatten().tolist()) == b"three\n\nsix"[:10]
    assert bytes(byte_windows(texts, part="calibration", length=4)[0].tolist()) == b"one "
    drawn = byte_windows(texts, part="calibration", length=4, count=3)
    assert drawn.shape == (3, 4)
    assert drawn.dtype == torch.int64
    with pytest.raises(DataError, match="enough for 2 windows of 5, and 3 were asked for"):
        byte_windows(texts, part="heldout", length=5, count=3)
    with pytest.raises(DataError, match="enough for 0 windows"):
        byte_windows(texts, part="heldout", length=500)


# --- the model


def test_the_gpt_is_causal_and_known_to_the_anatomy():
    module = gpt().eval()
    ids = WINDOWS[:2].clone()
    with torch.no_grad():
        before = module(ids)
        ids[:, 9] += 1
        ids %= 64
        after = module(ids)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])
    found = anatomy.of(module)
    assert found.tied
    assert not found.unknown
    roles = [one.role for one in found.maps() if one.block == 0]
    attention = [f"attention.{name}" for name in ("query", "key", "value", "output")]
    assert roles == [*attention, "ffn.up", "ffn.down"]
    with pytest.raises(DataError, match="context is 32"):
        module(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(OptionError, match="multiple of twice the heads"):
        GPTConfig(width=6, num_heads=2)


def test_the_gpt_sees_distances_and_not_places():
    module = gpt(dtype=torch.float64).eval()
    pattern = WINDOWS[:1, :6]
    with torch.no_grad():
        # scores depend on the distance alone, so a window that repeats itself attends alike from both copies' views
        query = torch.randn(1, 1, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        from pennyweight.zoo.positions import rotated

        turned = rotated(query[:, :, :1].expand(1, 1, 20, 8), module.cosine[:20].double(), module.sine[:20].double())
        scores = turned[0, 0] @ turned[0, 0].T
    for distance in range(1, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-6)
    assert module(pattern).shape == (1, 6, 64)


# --- several processes


def together(out, *words):
    """Two gloo processes of `train_processes`: the whole weights they ended with, and the losses."""
    script = Path(train_processes.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(out), *words], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "resumed").exists()
    found = out / "final.safetensors"
    tensors = {
        name: safetensors_file.read_tensor(found, entry)
        for name, entry in safetensors_file.read_header(found).entries.items()
    }
    return tensors, tensors.pop("losses").tolist()


def same_as_alone(module, losses, tensors, found):
    assert found == pytest.approx(losses, rel=1e-12)
    alone = state(module)
    assert alone.keys() == tensors.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-10, atol=1e-12)


def test_two_processes_train_as_one_does(tmp_path):
    tensors, found = together(tmp_path)
    module = train_processes.network()
    same_as_alone(module, train_processes.trainer(module).run(8), tensors, found)
    assert 0 < float(tensors["0.parametrizations.weight.0.mask"].float().mean()) < 1


def test_two_processes_that_share_the_weights_train_as_one_does(tmp_path):
    tensors, found = together(tmp_path, "sharded")
    module = train_processes.network()
    losses = train_processes.trainer(module, pruned=False).run(8)
    same_as_alone(module, losses, tensors, found)
    # one process alone goes on from what the two saved
    alone = train_processes.trainer(train_processes.network(), pruned=False)
    with pytest.raises(ModelError, match="the checkpoint of 2 processes, and 1 here"):
        alone.resume(tmp_path / "checkpoint")
    alone.resume(tmp_path / "checkpoint", exact=False)
    later = alone.run(8)
    same_as_alone(module, losses[5:], state(alone.module), later)
