"""The roofline of whole models (row 227): the published tool's figures, closed forms, profiles, and tuning."""

import json
import math

import pytest
import torch
from families import build
from transformers import GPT2Config, LlamaConfig, MixtralConfig, ViTConfig

from pennyweight.cli import main
from pennyweight.errors import DataError, ModelError, OptionError
from pennyweight.measure import calls, devices, operations, roofline, tune
from pennyweight.measure.devices import Device, Timed
from pennyweight.measure.operations import Pass, Widths
from pennyweight.plan.pretraining import DEVICES
from pennyweight.weights import CompactLinear, Quantized


@pytest.fixture(scope="module")
def llama2():
    """Llama-2-7B by its configuration alone."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    return operations.skeleton(operations.bare(config))


def by_role(found):
    totals = {}
    for row in found.rows:
        totals.setdefault(row.operation.role, []).append(row.operation)
    return totals


# --- the published tool


@pytest.mark.parametrize(
    ("stage", "batch", "precision", "flops", "moved", "milliseconds"),
    [  # hahnyuan/LLM-Viewer on Llama-2-7B, an A6000, 2048 tokens
        ("decode", 1, "w16a16kv16", 1.4170e10, 1.4313e10, 18.637),
        ("prefill", 1, "w16a16kv16", 2.8751e13, 6.5861e10, 226.88),
        ("decode", 1, "w4a16kv16", 1.4170e10, 4.4025e9, 5.7325),
        ("decode", 32, "w16a16kv16", None, None, 62.995),
    ],
)
def test_it_counts_as_the_published_tool_does(llama2, stage, batch, precision, flops, moved, milliseconds):
    found = roofline.roofline(
        llama2, device="nvidia-a6000", stage=stage, batch=batch, context=2048, precision=precision, compat=True
    )
    if flops:
        assert found.flops == pytest.approx(flops, rel=5e-5)
        assert found.moved == pytest.approx(moved, rel=5e-5)
    assert 1e3 * found.bound_seconds == pytest.approx(milliseconds, rel=5e-5)
    assert found.seconds is None  # a data sheet predicts nothing


def test_a_prompt_is_bound_by_computing_and_a_token_by_memory(llama2):
    prompt, token = (
        by_role(roofline.roofline(llama2, device="a6000", stage=stage, context=2048))["attention.query"][0]
        for stage in ("prefill", "decode")
    )
    assert prompt.flops == 2 * 2048 * 4096**2  # 69 G in the paper's table
    assert prompt.intensity == pytest.approx(1024, rel=1e-3)
    assert token.moved == pytest.approx(34e6, rel=0.02)
    assert token.intensity == pytest.approx(0.9995, abs=1e-4)


# --- closed forms


def test_every_count_of_a_small_decoder():
    module = build("llama")
    c = module.config
    d, f, h, v, blocks = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.vocab_size, c.num_hidden_layers
    kv = c.num_key_value_heads * (d // h)
    found = by_role(roofline.roofline(module, device="h100", stage="prefill", batch=3, context=10))
    tokens, pairs = 30, 55  # 10 queries of each sequence see 1 to 10 keys
    for role, m, n in (("attention.query", d, d), ("attention.key", kv, d), ("ffn.up", f, d), ("ffn.down", d, f)):
        assert [one.flops for one in found[role]] == [2 * m * n * tokens] * blocks
        assert [one.weight for one in found[role]] == [4 * m * n] * blocks
        assert [one.read for one in found[role]] == [4 * n * tokens] * blocks
    assert [(one.written, one.cache_written) for one in found["attention.value"]] == [(0, 4 * kv * tokens)] * blocks
    assert found["head"][0].flops == 2 * d * v * 3  # the newest token of each sequence is scored
    scores = found["attention.scores"][0]
    assert (scores.flops, scores.read, scores.cache_read) == (2 * d * pairs * 3, 4 * d * tokens, 4 * kv * tokens)
    assert scores.written == 4 * h * pairs * 3
    assert found["attention.softmax"][0].flops == 5 * h * pairs * 3
    assert len(found["norm"]) == 2 * blocks + 1
    assert found["norm"][0].flops == 7 * d * tokens
    assert found["ffn.gating"][0].moved == 3 * 4 * f * tokens
    assert found["residual"][0].moved == 3 * 4 * d * tokens


def test_fewer_bits_take_that_share_of_the_bytes_and_the_byte_roof_needs_all_three(llama2):
    wide, narrow = (
        by_role(roofline.roofline(llama2, device="a6000", precision=bits)) for bits in ("w16a16kv16", "w4a16kv8")
    )
    assert narrow["ffn.up"][0].weight == wide["ffn.up"][0].weight / 4
    assert narrow["ffn.up"][0].read == wide["ffn.up"][0].read
    assert narrow["attention.scores"][0].cache_read == wide["attention.scores"][0].cache_read / 2
    kinds = [roofline.roofline(llama2, device="a6000", precision=bits).precision for bits in ("w8a16", "w8a8", "int8")]
    assert kinds == ["fp16", "int8", "int8"]
    memory = roofline.roofline(llama2, device="a6000", context=100, batch=2, precision="w4a16kv8")
    assert memory.weight_bytes == 6738415616 / 2
    assert memory.cache_bytes == 2 * 100 * 32 * 2 * 4096


def test_fused_attention_reads_keys_once_a_block_of_queries(llama2):
    device = devices.find("a6000")
    fused = by_role(roofline.roofline(llama2, device=device, stage="prefill", context=1000, fused=True))
    (one, *_), vectors = fused["attention.fused"], 2 * 4096 * 1000
    again = math.ceil(1000 / min(math.ceil(device.buffer_bytes / (2 * 128)), 128))
    assert (one.read, one.written, one.cache_read) == (vectors, vectors, 2 * again * vectors)
    assert "attention.softmax" not in fused


def test_a_compact_weight_is_read_as_it_is_stored():
    module = build("llama")
    layer = module.model.layers[0].mlp.up_proj
    weight = Quantized.nearest(layer.weight.detach(), bits=4, group_size=16)
    module.model.layers[0].mlp.up_proj = CompactLinear(weight)
    found = by_role(roofline.roofline(module, device="a6000"))["ffn.up"]
    assert found[0].weight == weight.cost().bytes
    assert found[1].weight == layer.weight.nbytes


def test_experts_are_read_as_often_as_some_token_chooses_them():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    module = operations.skeleton(operations.bare(config))
    for batch in (1, 4):
        found = by_role(roofline.roofline(module, device="h100", batch=batch))
        read = sum(one.weight for role, ones in found.items() if role.startswith("moe.experts") for one in ones)
        assert read == pytest.approx(2 * 8 * (1 - 0.75**batch) * 3 * 32 * 64 * 2)


def test_a_window_bounds_what_is_seen():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    part = operations.Attention(0, 128.0, 4, False)
    found = operations.skeleton(operations.bare(config))
    changed = operations.Skeleton(**{**vars(found), "costs": _with_window(found.costs, part)})
    scores = [one for one in operations.operations(changed, Pass("prefill", context=10)) if one.role.endswith("scores")]
    assert scores[0].flops == 2 * 32 * sum(min(i, 4) for i in range(1, 11))
    scores = [one for one in operations.operations(changed, Pass("decode", context=10)) if one.role.endswith("scores")]
    assert scores[0].flops == 2 * 32 * 4


def _with_window(costs, part):
    return type(costs)(**{**vars(costs), "attention": (part,)})


def test_images_are_counted_by_their_patches():
    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    found = by_role(roofline.roofline(operations.bare(config), device="a100", stage="prefill", batch=2))
    assert found["attention.query"][0].rows == 2 * 5
    assert found["attention.scores"][0].flops == 2 * 2 * 32 * 25
    with pytest.raises(ModelError, match="keeps no cache"):
        roofline.roofline(operations.bare(config), device="a100")


def test_fused_queries_keys_and_values_leave_the_queries_outside_the_cache():
    config = GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)
    one = by_role(roofline.roofline(operations.bare(config), device="a100", batch=3))["attention.qkv"][0]
    assert (one.written, one.cache_written) == (2 * 3 * 32, 2 * 3 * 64)


# --- devices


def test_data_sheets_have_sources_and_one_name_each():
    names = [name for device in devices.published() for name in (device.name, *device.aliases)]
    assert len(set(names)) == len(names) >= 15
    assert all(device.source and not device.measured for device in devices.published())
    assert devices.find("A100").bytes_per_second == 2039e9
    # planning of training reads the same figures
    assert DEVICES["h100"] == devices.find("h100").peak("fp16") == 989e12


def test_a_wider_precision_stands_in_for_one_that_is_missing_and_none_for_a_narrower():
    device = Device(name="x", source="y", flops_per_second={"fp16": 2e12, "int8": 4e12}, bytes_per_second=1e12)
    assert (device.peak("fp8"), device.peak("int8"), device.peak("fp16")) == (2e12, 4e12, 2e12)
    with pytest.raises(OptionError, match="fp32 is wider"):
        device.peak("fp32")


def test_measured_products_are_interpolated_in_logarithms():
    timed = [Timed("fp16", rows, (tall, 10), 10 * tall * rows**0.5 * 1e-9) for rows in (1, 16) for tall in (10, 1000)]
    device = Device(name="x", source="y", flops_per_second={"fp16": 1e12}, bytes_per_second=1e12, products=tuple(timed))
    assert device.product_seconds("fp16", 4, (100, 50)) == pytest.approx(50 * 100 * 2e-9)
    assert device.product_seconds("fp16", 64, (10, 10)) == pytest.approx(10 * 10 * 64 * 0.25e-9)  # as at 16, by the row
    assert device.product_seconds("fp32", 4, (100, 50)) is None


def test_a_profile_survives_its_file(tmp_path):
    timed = (Timed("fp16", 4, (8, 6), 0.5),)
    device = Device(
        name="x", source="y", flops_per_second={"fp16": 1e12}, bytes_per_second=1e12, products=timed, aliases=("z",)
    )
    (tmp_path / "x.json").write_text(json.dumps(device.to_json()))
    assert devices.find(tmp_path / "x.json") == device


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ('{"name": "x"}', "no device profile"),
        ('{"name": "x", "source": "", "flops_per_second": {"fp3": 1}, "bytes_per_second": 1}', "known are fp32"),
        ('{"name": "x", "source": "", "flops_per_second": {"fp16": 0}, "bytes_per_second": 1}', "above 0"),
    ],
)
def test_a_bad_profile_is_said(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises((DataError, OptionError), match=said):
        devices.find(tmp_path / "x.json")


def test_bad_settings_are_said(llama2):
    with pytest.raises(OptionError, match="did you mean h100"):
        devices.find("h10")
    for options, said in (
        ({"precision": "w4x"}, "w4a16"),
        ({"precision": "w0"}, "above 0"),
        ({"batch": 0}, "at least 1"),
        ({"stage": "train"}, "prefill or decode"),
        ({"compat": True, "fused": True}, "leave out fused"),
    ):
        with pytest.raises(OptionError, match=said):
            roofline.roofline(llama2, device="a100", **options)
    assert roofline.widths("kv4") == Widths(None, None, 4)


# --- predicted times


def test_a_measured_device_adds_up_products_attention_calls_and_the_bytes_between():
    module = build("llama")
    timed = tuple(Timed("fp32", rows, (8, 8), 64 * rows * 1e-6) for rows in (1, 64))  # a microsecond a number and row
    device = Device(
        name="x", source="y", flops_per_second={"fp32": 1e30}, bytes_per_second=1e30, products=timed, threads=1,
        call_seconds=1e-3, plain_bytes_per_second=1e6,
        attention_flops_per_second={"fp32 decode": 1e9, "fp16 decode": 1, "fp32 prefill": 1},
    )  # fmt: skip
    found = roofline.roofline(module, device=device, batch=2, context=7)
    products = sum(row.operation.rows * math.prod(row.operation.shape) for row in found.rows if row.operation.rows)
    attended = sum(row.operation.flops for row in found.rows if row.operation.role == "attention.fused")
    counted = calls.decode(module)
    assert found.framework_seconds == pytest.approx(counted.count * 1e-3 + counted.moved(2, 14) * 1e-6)
    assert found.seconds == pytest.approx(products * 1e-6 + attended * 1e-9 + found.framework_seconds)
    assert found.bound_seconds < 1e-20


def test_calls_and_bytes_grow_as_counted_at_another_size():
    module = build("llama")
    ids = torch.zeros(1, 40, dtype=torch.long)
    with torch.no_grad():
        count, moved, _ = calls.counted(lambda: module(ids, use_cache=True, logits_to_keep=1))
    found = calls.prefill(module)
    assert found.count == count
    assert found.moved(40, 0) == pytest.approx(moved, rel=1e-9)


def test_plain_bytes_are_those_of_what_is_no_product_and_no_view():
    x, w = torch.ones(4, 8), torch.ones(8, 8)
    assert calls.counted(lambda: (x @ w).T)[1] == 0
    assert calls.counted(lambda: (x @ w).relu())[1] == 2 * 4 * 8 * 4


def test_this_machine_is_tuned_once_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_TALL", (16,))
    monkeypatch.setattr(tune, "_ROWS", (1, 4))
    monkeypatch.setattr(tune, "_STREAMED", 10**6)
    monkeypatch.setattr(tune, "_ROUNDS", 1)
    monkeypatch.setattr(roofline, "_MEMORY", 2**20)
    monkeypatch.setattr(roofline, "_MATRIX", 64)
    roofline._measured.cache_clear()
    with pytest.raises(OptionError, match="pennyweight tune"):
        tune.find("here")
    found = tune.tune()
    roofline._measured.cache_clear()
    assert tune.find("here") == found
    assert found.threads == torch.get_num_threads()
    assert 1e-7 < found.call_seconds < 1e-3
    assert {timed.precision for timed in found.products} == {"fp32", "fp16"}
    predicted = roofline.roofline(build("llama"), device="here")
    assert predicted.seconds > predicted.framework_seconds > 0


# --- the command line


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    config.save_pretrained(tmp_path)
    words = ["measure", str(tmp_path), "--roofline", "--device", "h100", "--batch", "2", "--context", "9"]
    assert main([*words, "--precision", "w4a16", "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    assert "prefill, batch 2, context 9" in said
    assert "decode, batch 2, context 9" in said
    found = json.loads((tmp_path / "r.json").read_text())
    assert {one["setting"]["stage"] for one in found} == {"prefill", "decode"}
    assert found[0]["operations"][1]["role"] == "attention.query"
    assert main(["measure", str(tmp_path), "--roofline"]) == 2
    assert "--device" in capsys.readouterr().err
    assert main(["devices"]) == 0
    assert "a100-80gb" in capsys.readouterr().out
