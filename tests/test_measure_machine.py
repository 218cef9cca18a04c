"""Time, memory, energy and the roofline: against fake clocks and files, and a real child process."""

import gc
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from pennyweight.errors import ModelError, OptionError, PennyweightError
from pennyweight.measure import decoding, energy, latency, memory, roofline
from pennyweight.measure.stats import Interval


class Clock:
    """Time that passes only when something says how much it took."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def task(self, *seconds):
        """A job whose runs take ``seconds``, over and over."""
        calls = []

        def run():
            self.now += seconds[len(calls) % len(seconds)]
            calls.append(self.now)

        run.calls = calls
        return run


# --- latency


def test_a_timing_is_the_median_after_the_warm_up():
    clock = Clock()
    task = clock.task(100.0, 100.0, 1.0, 2.0, 9.0, 2.0, 3.0)
    found = latency.time(task, repeats=5, warmup=2, clock=clock)
    assert len(task.calls) == 7
    assert found.runs == (1.0, 2.0, 9.0, 2.0, 3.0)
    assert (found.seconds.value, found.milliseconds) == (2.0, 2000.0)
    assert 1.0 <= found.seconds.low <= 2.0 <= found.seconds.high <= 9.0
    assert found.threads == torch.get_num_threads()


def test_a_rate_turns_the_interval_round():
    found = latency.rate(Interval(2.0, 1.0, 4.0, 0.95, 0.2, 9, "percentile bootstrap"), 8)
    assert (found.low, found.value, found.high) == (2.0, 4.0, 8.0)
    assert found.standard_error == pytest.approx(0.4)


def test_two_things_are_timed_in_turns_with_the_lead_changing():
    clock, seen = Clock(), []
    a, b = clock.task(1.0), clock.task(2.0)
    found = latency.compare(
        lambda: (seen.append("a"), a()), lambda: (seen.append("b"), b()), repeats=4, warmup=1, clock=clock
    )
    assert found.ratio.value == 2.0
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab" + "ba"


def test_drift_does_not_reach_the_ratio():
    # everything gets ten times slower while it runs: apart, that would be all one saw
    clock, turn = Clock(), iter(range(1000))

    def drifting(seconds):
        def run():
            clock.now += seconds * (1 + 0.5 * next(turn))

        return run

    found = latency.compare(drifting(1.0), drifting(1.2), repeats=20, warmup=0, clock=clock)
    assert found.ratio.value == pytest.approx(1.2, rel=0.1)
    assert found.ratio.low <= 1.2 <= found.ratio.high
    assert found.first.seconds.high > 2 * found.first.seconds.low


def test_equal_things_have_ratio_one():
    clock = Clock()
    found = latency.compare(clock.task(3.0), clock.task(3.0), clock=clock)
    assert (found.ratio.low, found.ratio.value, found.ratio.high) == (1.0, 1.0, 1.0)


def test_the_collector_rests_meanwhile_and_comes_back():
    seen = []
    latency.time(lambda: seen.append(gc.isenabled()), repeats=2, warmup=0)
    assert seen == [False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(("repeats", "warmup"), [(1, 0), (0, 0), (3, -1)])
def test_too_few_rounds_are_refused(repeats, warmup):
    with pytest.raises(OptionError, match="at least 2 repeats"):
        latency.time(lambda: None, repeats=repeats, warmup=warmup)


# --- decoding


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_positions=64, n_embd=16, n_layer=2, n_head=4, tie_word_embeddings=False)
    )


def opt():  # counts its positions in the attention mask
    return OPTForCausalLM(
        OPTConfig(vocab_size=101, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=16, max_position_embeddings=64, tie_word_embeddings=False)
    )  # fmt: skip


def gemma():  # a window shorter than the text
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=4, sliding_window=4, query_pre_attn_scalar=4,
                     tie_word_embeddings=False)
    )  # fmt: skip


def make(build):
    torch.manual_seed(0)
    module = build().eval()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.mul_(4)
    return module


@pytest.mark.parametrize("build", [llama, gpt2, opt, gemma], ids=lambda build: build.__name__)
def test_greedy_decoding_is_that_of_the_library(build):
    module, prompt = make(build), torch.tensor([5, 9, 3, 7, 2])
    ids = prompt[None]
    for _ in range(10):  # without any cache
        with torch.no_grad():
            ids = torch.cat([ids, module(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found = decoding.greedy(module, prompt, tokens=10)
    assert found.ids.tolist() == ids[0, 5:].tolist()
    assert len(set(found.ids.tolist())) > 1


def test_no_token_ends_the_text():
    module = make(llama)
    expected = decoding.greedy(module, torch.tensor([5, 9]), tokens=6).ids
    module.generation_config.eos_token_id = int(expected[0])
    assert torch.equal(decoding.greedy(module, torch.tensor([5, 9]), tokens=6).ids, expected)


class Paced(nn.Module):
    """A model whose every call takes the time its clock is told, by the tokens in it."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        self.clock.now += self.seconds * (1 if past_key_values is None else 10)
        logits = nn.functional.one_hot(input_ids, 11).float()
        return type("Output", (), {"logits": logits, "past_key_values": "something"})()


def test_speed_is_tokens_by_the_second():
    clock = Clock()
    found = decoding.speed(Paced(clock, 0.5), torch.arange(8), tokens=5, repeats=3, clock=clock)
    assert found.prefill.value == pytest.approx(16.0)  # 8 tokens in half a second
    assert found.decode.value == pytest.approx(0.2)  # five seconds each
    assert found.threads == torch.get_num_threads()


def test_two_models_are_compared_in_turns():
    clock = Clock()
    prefill, decode = decoding.compare(
        Paced(clock, 1.0), Paced(clock, 0.5), torch.arange(8), tokens=3, repeats=2, clock=clock
    )
    assert (prefill.ratio.value, decode.ratio.value) == pytest.approx((0.5, 0.5))
    assert decode.first.seconds.value == pytest.approx(10.0)


def test_what_cannot_decode_is_named():
    class Forgetful(Paced):
        def forward(self, input_ids, past_key_values=None):
            return super().forward(input_ids).logits

    for module, words in ((nn.Identity(), "no cache to decode"), (Forgetful(Clock(), 1.0), "hands no cache back")):
        with pytest.raises(ModelError, match=words):
            decoding.greedy(module, torch.tensor([1]))
    with pytest.raises(OptionError, match="at least 2"):
        decoding.greedy(make(llama), torch.tensor([1]), tokens=1)
    with pytest.raises(OptionError, match="at least 2"):
        decoding.greedy(make(llama), torch.tensor([[1]]))


# --- memory


HOLD = """
import os
bytearray(b"1") * 120_000_000  # what an import needs for a moment is no part of what the function takes
def hold(megabytes, then=None):
    if then == "raise":
        raise KeyError("as asked")
    if then == "die":
        os.kill(os.getpid(), 9)
    held = bytearray(b"1") * (megabytes * 10**6)
    return len(held) // 10**6
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """A function of a module that imports next to nothing, as the child must import it too."""
    (tmp_path / "holding.py").write_text(HOLD)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("holding").hold
    del sys.modules["holding"]


def test_peak_of_a_function_is_what_it_holds(hold):
    small, large = memory.peak(hold, 1), memory.peak(hold, 150)
    assert (small.result, large.result) == (1, 150)
    assert large.added_bytes == pytest.approx(150e6, rel=0.1)
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert small.added_bytes < 20e6
    assert large.base_bytes > 5e6
    assert large.bytes == large.base_bytes + large.added_bytes


def test_peak_of_a_command_is_its_own_not_ours():
    held = np.ones(300 * 10**6, dtype=np.uint8)  # what wait4 would blame on a child forked from here
    script = "x = bytearray(b'1') * 80_000_000; print(len(x))"
    found = memory.peak([sys.executable, "-I", "-S", "-c", script])
    assert found.result == "80000000\n"
    assert 80e6 < found.bytes < 120e6
    assert found.base_bytes is None
    assert found.added_bytes is None
    assert memory.peak([sys.executable, "-I", "-S", "-c", ""]).bytes < 40e6
    assert held.nbytes == 300e6


def test_what_happens_to_the_child_is_told(hold):
    with pytest.raises(KeyError, match="as asked"):
        memory.peak(hold, 1, then="raise")
    with pytest.raises(PennyweightError, match="killed by signal 9"):
        memory.peak(hold, 1, then="die")
    with pytest.raises(PennyweightError, match=r"ended with code 3: sorry"):
        memory.peak([sys.executable, "-c", "import sys; sys.exit(print('sorry', file=sys.stderr) or 3)"])
    with pytest.raises(OptionError, match="cannot be sent"):
        memory.peak(lambda: None)
    with pytest.raises(OptionError, match="cannot be started"):
        memory.peak(["/no/such/command"])
    with pytest.raises(OptionError, match="one list"):
        memory.peak(["true"], 1)


# --- energy


@pytest.fixture
def powercap(tmp_path):
    def counter(folder, name, start, top=1000):
        (tmp_path / folder).mkdir()
        for file, text in (("name", name), ("energy_uj", start), ("max_energy_range_uj", top)):
            (tmp_path / folder / file).write_text(f"{text}\n")

    counter("intel-rapl:0", "package-0", 100)
    counter("intel-rapl:0:0", "core", 50)  # inside the package
    counter("intel-rapl:0:1", "dram", 990)
    counter("intel-rapl:1", "psys", 7)  # all of the machine
    counter("intel-rapl-mmio:0", "package-0", 100)  # the package again
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_counters_are_added_and_start_over(powercap):
    def work():
        (powercap / "intel-rapl:0/energy_uj").write_text("400\n")
        (powercap / "intel-rapl:0:0/energy_uj").write_text("300\n")
        (powercap / "intel-rapl:0:1/energy_uj").write_text("40\n")  # past 1000

    found = energy.measure(work, root=powercap)
    assert found.joules == pytest.approx((300 + 50) * 1e-6)
    assert found.source == "RAPL: dram + package-0"
    assert found.seconds > 0


def test_without_counters_there_is_no_measured_energy(powercap, tmp_path):
    for path in powercap.glob("*/energy_uj"):
        path.unlink()
    ran = []
    assert energy.measure(lambda: ran.append(1), root=powercap) is None
    assert energy.measure(lambda: ran.append(1), root=tmp_path / "nothing") is None
    assert not ran


def test_the_model_of_energy_is_its_constants():
    assert energy.model(1e12, 0).joules == pytest.approx(2.3)
    assert energy.model(0, 1e9).joules == pytest.approx(0.16)
    own = energy.Assumptions(joules_per_flop=1e-11, joules_per_byte=2e-11, idle_watts=3)
    found = energy.model(1e11, 1e11, seconds=2, assumptions=own)
    assert found.joules == pytest.approx(1 + 2 + 6)
    assert found.source == "model: 10 pJ a FLOP, 20 pJ a byte, 3 W idle"
    with pytest.raises(OptionError, match="seconds"):
        energy.model(1, 1, assumptions=own)


# --- roofline


def test_the_lower_roof_bounds():
    machine = roofline.Machine(1e11, 1e10, 2, "float32")
    assert machine.balance == 10
    assert roofline.bound(2e11, 1e10, machine) == roofline.Bound(2.0, "compute", 20.0)
    assert roofline.bound(1e10, 4e10, machine) == roofline.Bound(4.0, "memory", 0.25)
    assert roofline.bound(1e10, 0, machine).intensity == float("inf")


def test_this_machine_is_measured_once(monkeypatch):
    monkeypatch.setattr(roofline, "_MATRIX", 64)
    monkeypatch.setattr(roofline, "_MEMORY", 2**20)
    roofline._measured.cache_clear()
    found = roofline.this_machine()
    assert found.flops_per_second > 1e7
    assert found.bytes_per_second > 1e7
    assert (found.threads, found.dtype) == (torch.get_num_threads(), "float32")
    assert roofline.this_machine() is found
    assert roofline.this_machine(torch.bfloat16).dtype == "bfloat16"
    roofline._measured.cache_clear()


def test_statistics_need_no_torch():
    script = "import sys, pennyweight.measure.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
