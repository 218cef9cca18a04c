"""Assets: pinned, checked, fetched once by however many processes, and what the models in them are."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from assets_here import needs
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.errors import DataError, ModelError
from pennyweight.evaluate.embedding import pool
from pennyweight.model import anatomy, assets, bf16_bytes, load
from pennyweight.model.convert import permuted

# fetching, from an index of our own


class Index:
    """Stands in for pip: `calls` of it are counted, and it serves what it was given."""

    def __init__(self, served: dict[str, bytes]) -> None:
        self.served, self.calls, self.lock = served, list[list[str]](), threading.Lock()

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with self.lock:
            self.calls.append(command)
        wanted = command[-1].replace("==", "-")
        if wanted not in self.served:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")
        into = Path(command[command.index("--dest") + 1])
        (into / f"{wanted}-py3-none-any.whl").write_bytes(self.served[wanted])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[assets.Wheel, bytes]:
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as file:
        file.writestr("toy/data.txt", "hello")
    raw = (tmp_path / "made.whl").read_bytes()
    return assets.Wheel("toy", "1.0", "toy-1.0-py3-none-any.whl", assets.sha256(tmp_path / "made.whl")), raw


@pytest.fixture
def served(tmp_path: Path, wheel: tuple[assets.Wheel, bytes], monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index({"toy-1.0": wheel[1]})
    monkeypatch.setattr(subprocess, "run", index.run)
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    text = assets.Asset("toy", "text", wheel[0], "a toy")
    monkeypatch.setattr(assets, "ASSETS", {"toy": text, "toy-model": replace(text, name="toy-model", sort="model")})
    return index


def test_a_wheel_is_fetched_once_without_its_dependencies(served: Index, tmp_path: Path) -> None:
    assert assets.path("toy") == tmp_path / "cache" / "wheels" / "toy-1.0-py3-none-any.whl"
    assert assets.read("toy", "toy/data.txt") == b"hello"
    assert len(served.calls) == 1
    command = served.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary"} <= set(command)
    assert command[-1] == "toy==1.0"


def test_another_file_of_the_same_name_is_refused(served: Index, tmp_path: Path) -> None:
    served.served["toy-1.0"] += b"!"
    with pytest.raises(ModelError, match=r"toy-1\.0-py3-none-any\.whl: SHA-256 [0-9a-f]{64} is not the pinned"):
        assets.path("toy")
    assert list((tmp_path / "cache" / "wheels").glob("*.whl")) == []


def test_an_index_without_it_is_quoted(served: Index) -> None:
    served.served.clear()
    with pytest.raises(
        ModelError,
        match=r"toy 1\.0: cannot be fetched \(ERROR: No matching distribution\); connect .*or put toy-1\.0-py3",
    ):
        assets.path("toy")


def test_processes_at_the_same_time_fetch_and_build_once(
    served: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "config.json").write_bytes(assets.read("toy", "toy/data.txt"))

    monkeypatch.setattr(sys.modules[__name__], "build", build, raising=False)
    model = replace(assets.ASSETS["toy-model"], build=f"{__name__}:build")
    monkeypatch.setitem(assets.ASSETS, "toy-model", model)
    with ThreadPoolExecutor(8) as threads:
        places = set(threads.map(lambda _: assets.path("toy-model"), range(8)))
    assert places == {tmp_path / "cache" / "models" / "toy-model.r1"}
    assert (len(built), len(served.calls)) == (1, 1)
    assert (places.pop() / "config.json").read_text() == "hello"
    # a new revision of the conversion is another directory
    monkeypatch.setitem(assets.ASSETS, "toy-model", replace(model, revision=2))
    assert assets.path("toy-model").name == "toy-model.r2"
    assert len(built) == 2


def test_a_conversion_that_fails_leaves_nothing(served: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(directory: Path) -> None:
        (directory / "half").write_text("")
        raise ModelError("damaged")

    monkeypatch.setattr(sys.modules[__name__], "build", build, raising=False)
    model = replace(assets.ASSETS["toy-model"], build=f"{__name__}:build")
    monkeypatch.setitem(assets.ASSETS, "toy-model", model)
    with pytest.raises(ModelError, match="damaged"):
        assets.path("toy-model")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir()] == []


def test_a_damaged_or_unwritable_cache_says_what_to_do(
    served: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = assets.path("toy")
    with pytest.raises(ModelError, match=r"damaged in the cache .*; delete it, it is fetched again"):
        assets.read("toy", "toy/other.txt")
    wheel.write_bytes(b"not a zip")
    with pytest.raises(ModelError, match="damaged in the cache"):
        assets.read("toy", "toy/data.txt")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"the cache cannot be written \(.*\); set PENNYWEIGHT_CACHE"):
        assets.path("toy")


def test_names_are_sorted_by_what_they_are() -> None:
    assert assets.names("model") == ("smollm2-135m", "smollm2-135m-permuted", "minilm-l6")
    assert {"wiki", "news", "polarity", "tweets", "digits", "stdlib-code"} <= set(assets.names())
    with pytest.raises(DataError, match=r"no asset is called 'wikki'; there are smollm2-135m, "):
        assets.path("wikki")
    with pytest.raises(DataError, match="comes with Python itself"):
        assets.path("stdlib-code")


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path))
    assert assets.cache() == tmp_path
    monkeypatch.delenv("PENNYWEIGHT_CACHE")
    assert assets.cache() == Path.home() / ".cache" / "pennyweight"


# the permuted copy


@pytest.mark.parametrize("tied", [True, False])
def test_a_permuted_model_is_the_same_function_with_every_group_scattered(tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True,
        initializer_range=0.2,
    )  # fmt: skip
    module = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, 80, (2, 20))
    before = module(ids).logits
    old = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    new = permuted(old, config, torch.Generator().manual_seed(5))
    module.load_state_dict(new)
    torch.testing.assert_close(module(ids).logits, before, rtol=1e-4, atol=1e-4)  # norms compute in float32
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        torch.testing.assert_close(tensor.sum(), old[name].sum())
        assert sorted(tensor.flatten().tolist()) == sorted(old[name].flatten().tolist())
    # columns that shared a group of 32 no longer do: none of the old groups survives as a set
    columns = new["model.embed_tokens.weight"].T.tolist()
    place = {tuple(column): at for at, column in enumerate(old["model.embed_tokens.weight"].T.tolist())}
    moved = torch.tensor([place[tuple(column)] for column in columns])
    assert all(len(set((group // 32).tolist())) > 1 for group in moved.split(32))


# the real ones


@needs(assets.SMOLLM2)
def test_smollm2_speaks() -> None:
    model = load("smollm2-135m")
    assert (model.kind, model.name, bf16_bytes(model)) == ("causal-lm", "smollm2-135m", 2 * 134_515_008)
    tokens = model.need_tokenizer()
    said = "Hello 1234 world's  <|im_end|>"
    ids = tokens(said)["input_ids"]
    pieces = ["Hello", "Ġ", "1", "2", "3", "4", "Ġworld", "'s", "ĠĠ", "<|im_end|>"]
    assert tokens.convert_ids_to_tokens(ids) == pieces
    assert tokens.decode(ids) == said
    prompt = tokens.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    given = tokens(prompt, return_tensors="pt")
    made = model.module.generate(**given, max_new_tokens=8, do_sample=False)
    assert tokens.decode(made[0, given["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@needs(assets.SMOLLM2)
def test_the_permuted_smollm2_says_the_same_from_other_places() -> None:
    one, two = load("smollm2-135m"), load("smollm2-135m-permuted")
    ids = one.need_tokenizer()("Penny wise and pound foolish, as they say.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(two.module(ids).logits, one.module(ids).logits, rtol=1e-3, atol=1e-3)
    for layer in anatomy.of(one.module).layers()[:8]:
        first, second = anatomy.matrix(one.module, layer), anatomy.matrix(two.module, layer)
        assert not torch.equal(first, second)
        torch.testing.assert_close(first.double().norm(), second.double().norm())


@needs(assets.SMOLLM2)
def test_smollm2_lies_on_its_grid() -> None:
    matrix = load("smollm2-135m").module.model.layers[3].mlp.up_proj.weight.detach()
    groups = matrix.reshape(-1, 32)
    assert max(len(set(group.tolist())) for group in groups[:200]) <= 16
    scattered = load("smollm2-135m-permuted").module.model.layers[3].mlp.up_proj.weight.detach().reshape(-1, 32)
    assert sum(len(set(group.tolist())) > 16 for group in scattered[:200]) > 190


@needs(assets.MINILM)
def test_minilm_knows_what_sentences_mean() -> None:
    model = load("minilm-l6")
    assert (model.kind, model.module.dtype) == ("encoder", torch.float32)
    sentences = ["A man is eating food.", "Somebody eats a meal.", "The stock market fell on Tuesday."]
    given = model.need_tokenizer()(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model.module(**given).last_hidden_state
    vectors = pool(states, given["attention_mask"])
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.6
    assert likeness[0, 2] < 0.15
    assert len(set(states.flatten()[:1000].tolist())) > 990  # true float32, on no grid
