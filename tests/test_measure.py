"""The verb, its figures, and what is written of them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import pennyweight
from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.perplexity import perplexity, token_losses
from pennyweight.measure import Figure, Measurement, measure, measurement, roofline
from pennyweight.measure.cost import cost
from pennyweight.measure.figures import FIGURES, SCHEMA
from pennyweight.measure.stats import Interval, paired_ratio
from pennyweight.model.loading import load

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(seed=0):
    torch.manual_seed(seed)
    module = LlamaForCausalLM(LlamaConfig(vocab_size=101, max_position_embeddings=64, **SIZES))
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.mul_(4)
    return module.eval()


def bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(vocab_size=101, max_position_embeddings=64, **SIZES)).eval()


def near(module, amount=0.02):
    """The same model with a little noise on its weights."""
    twin = type(module)(module.config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for to, tensor in zip(twin.parameters(), module.parameters(), strict=True):
            to.copy_(tensor * (1 + amount * torch.randn(tensor.shape, generator=generator)))
    return twin


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A small machine, so that its roofs are found fast."""
    monkeypatch.setattr(measurement, "_PROMPT", 8)
    monkeypatch.setattr(measurement, "_WRITTEN", 4)
    machine = roofline.Machine(1e11, 1e10, 2, "float32")
    monkeypatch.setattr(roofline, "this_machine", lambda dtype: machine)


@pytest.fixture
def windows():
    return torch.randint(0, 101, (6, 20), generator=torch.Generator().manual_seed(1))


def test_a_language_model_is_weighed_scored_and_timed(windows):
    module = llama()
    found, costs, losses = measure(module, windows), cost(module), token_losses(module, windows)
    assert found.kind == "causal-lm"
    assert found["bytes"].value == costs.bytes
    assert found["params_total"].value == sum(tensor.numel() for tensor in module.parameters())
    assert found["kv_bytes"].value == costs.kv_bytes(20)
    assert found["attention_flops"].value == costs.attention_flops(20)
    assert found["perplexity"].value == pytest.approx(perplexity(losses), rel=1e-6)
    assert found["loss"].value in found["loss"].interval
    assert found["perplexity"].interval.high == pytest.approx(math.exp(found["loss"].interval.high))
    assert found.samples["loss"] == pytest.approx(losses.double().mean(1).tolist())
    assert min(found["prefill"].value, found["decode"].value) > 0  # tiny models tell nothing of which is faster
    flops = costs.flops_per_token + costs.attention_flops(10)
    moved = costs.bytes_read_per_token + costs.kv_bytes(10)
    assert found["decode_bound"].value == pytest.approx(1 / max(flops / 1e11, moved / 1e10))
    assert found["energy"].value == pytest.approx(2.3e-12 * flops + 160e-12 * moved)
    assert found.conditions["windows"] == 6
    assert found.conditions["model_sha256"] == load(module).fingerprint
    assert "peak_memory" not in found.figures


def test_a_reference_adds_what_is_paired(windows):
    original = llama()
    other = near(original)
    found = measure(other, windows, reference=original, timed=False)
    expected = paired_ratio(token_losses(original, windows), token_losses(other, windows))
    assert found["perplexity_ratio"].value == pytest.approx(expected.value, rel=1e-5)
    assert found["perplexity_ratio"].interval.low == pytest.approx(expected.low, rel=1e-4)
    assert 0 < found["kl"].value < 1
    assert 0.5 < found["agreement"].value < 1
    same = measure(original, windows, reference=original, timed=False)
    assert (same["perplexity_ratio"].value, same["agreement"].value, same["kl"].value) == (1.0, 1.0, 0.0)


def test_an_encoder_is_compared_by_cosine(windows):
    original = bert()
    found = measure(near(original), windows, reference=original)
    assert 0.9 < found["cosine"].value < 1
    assert found["cosine"].value in found["cosine"].interval
    assert found["latency"].note.startswith("20 token(s)")
    alone = measure(original, windows, timed=False)
    assert "cosine" not in alone.figures
    assert not alone.samples


def test_an_encoder_without_tokenizer_is_still_weighed_and_timed():
    found = measure(bert())
    assert found["latency"].note.startswith("8 token(s)")
    with pytest.raises(DataError, match="tokenizer"):
        measure(bert(), reference=bert())


def test_other_kinds_are_weighed_and_timed():
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).eval()
    found = measure(vit)
    assert found["flops"].note.startswith("per image 8x8")
    assert found["latency"].unit == "s"
    plain = measure(nn.Linear(3, 4))
    assert {"latency", "flops"}.isdisjoint(plain.figures)
    assert plain["params"].value == 16


def test_one_window_has_no_interval(windows):
    original = llama()
    found = measure(near(original), windows[:1], reference=original, timed=False)
    assert found["loss"].interval is None
    assert found["loss"].note == "one window"
    assert found["perplexity"].value == pytest.approx(math.exp(found["loss"].value))
    assert "perplexity_ratio" not in found.figures


def test_without_data_there_is_no_quality():
    found = measure(llama(), None)
    assert "loss" not in found.figures
    assert found["decode"].value > 0


def test_what_cannot_be_measured_is_named(windows):
    with pytest.raises(DataError, match="tokenizer"):
        measure(llama())
    with pytest.raises(ModelError, match="give its name or its path"):
        measure(llama(), windows, peak=True)
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.inf
    with pytest.raises(ModelError, match="window 0: the loss is nan"):
        measure(broken, windows, timed=False)


def test_a_hopeless_model_has_a_loss_but_no_perplexity(windows):
    hopeless = llama()
    with torch.no_grad():
        hopeless.lm_head.weight *= 1e4
    found = measure(hopeless, windows, timed=False)
    assert found["loss"].value > 35
    assert "perplexity" not in found.figures
    json.dumps(found.to_json(), allow_nan=False)


def test_a_directory_is_loaded_in_its_own_process_for_its_peak(tmp_path, windows):
    llama().save_pretrained(tmp_path / "tiny")
    found = measure(tmp_path / "tiny", windows, timed=False)
    assert found.model == "tiny"
    assert 50e6 < found["peak_memory"].value < 5e9
    assert "peak_memory" not in measure(tmp_path / "tiny", windows, timed=False, peak=False).figures


def test_the_package_is_called_like_its_verb(windows):
    assert pennyweight.measure(llama(), windows, timed=False)["bytes"] == measure(llama(), None, timed=False)["bytes"]


# --- what is written


def test_json_comes_back_the_same(windows):
    found = measure(llama(), windows, reference=near(llama()))
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Measurement.from_json(json.loads(text)) == found
    assert json.loads(text)["schema"] == SCHEMA
    assert set(found.figures) <= set(FIGURES)
    assert all(figure.unit == FIGURES[key][1] for key, figure in found.figures.items())


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    low=st.floats(allow_nan=False),
    high=st.floats(allow_nan=False),
    note=st.text(max_size=5),
)
@settings(deadline=None)
def test_any_figure_comes_back_the_same(value, low, high, note):
    low, high = min(low, high), max(low, high)
    if low == math.inf or high == -math.inf:
        return
    figure = Figure(value, "B", Interval(value, low, high, 0.95, 1.0, 3, "Student t"), note)
    assert Figure.from_json(json.loads(json.dumps(figure.to_json(), allow_nan=False))) == figure


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(found=JSON, key=st.sampled_from(["figures", "samples", "conditions", "model", "kind", "schema"]))
@settings(max_examples=200, deadline=None)
def test_damaged_measurements_are_refused_in_one_line(found, key):
    whole = Measurement("m", "module", {"bytes": Figure(1, "B")}, {"loss": (1.0,)}, {"a": 1}).to_json()
    figure = {**whole["figures"]["bytes"], "value": found}
    for damaged in (found, {**whole, key: found}, {**whole, "figures": {"bytes": figure}}):
        try:
            read = Measurement.from_json(damaged)
        except DataError as error:
            message = str(error)
        else:
            message = ""
            read.table()
            read.compare(read)
        assert "\n" not in message


def test_another_version_is_refused():
    with pytest.raises(DataError, match=r"measurement/2.*measure again"):
        Measurement.from_json({"schema": "pennyweight.measurement/2"})


def shown(table):
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_shows_units_and_intervals(windows):
    found = measure(llama(), windows)
    text = shown(found.table())
    assert "LlamaForCausalLM (causal-lm)" in text
    line = next(line for line in text.splitlines() if line.startswith("loss"))
    interval = found["loss"].interval
    assert f"{interval.low:.4g} nats/token to {interval.high:.4g} nats/token" in line
    assert "tokens/s" in text
    assert "FLOPs" in text


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(67_286_016, "B"), "67.3 MB"),
        (Figure(134_515_008, "parameters"), "135 M"),
        (Figure(2.7e8, "FLOPs"), "270 MFLOPs"),
        (Figure(0.0123, "s"), "12.3 ms"),
        (Figure(0.98765, "share"), "98.77 %"),
        (Figure(25.4312, ""), "25.43"),
        (Figure(17.44, "tokens/s"), "17.44 tokens/s"),
    ],
)
def test_figures_are_shown_as_people_read_them(figure, text):
    assert figure.show() == text
    assert figure.show_interval() == ""


def test_two_measurements_are_compared_in_pairs(windows):
    original, other = llama(), near(llama())
    before, after = (measure(module, windows, timed=False) for module in (original, other))
    found = before.compare(after)
    expected = paired_ratio(token_losses(original, windows), token_losses(other, windows))
    assert found.changes["perplexity"].paired.low == pytest.approx(expected.low, rel=1e-6)
    assert found.changes["loss"].paired.value == pytest.approx(math.log(expected.value), rel=1e-5)
    assert (found.changes["bytes"].ratio, found.changes["bytes"].paired) == (1.0, None)
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["changes"]["perplexity"]["paired"]["value"] == pytest.approx(expected.value, rel=1e-6)
    assert f"x {expected.value:.4g} (" in shown(found.table())


def test_different_windows_do_not_compare(windows):
    before = measure(llama(), windows, timed=False)
    after = measure(llama(), windows.flip(1), timed=False)
    with pytest.raises(DataError, match="different windows"):
        before.compare(after)
    weighed = measure(llama(), None, timed=False)
    assert set(weighed.compare(before).changes) == set(weighed.figures)
