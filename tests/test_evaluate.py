"""Quality, one value a sample, against plain computations that share no code with it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from pennyweight.errors import DataError, ModelError, ShapeError
from pennyweight.evaluate import logits as chunked
from pennyweight.evaluate.accuracy import correct, predictions
from pennyweight.evaluate.agreement import agreement
from pennyweight.evaluate.embedding import cosines, embed, embed_windows, pool
from pennyweight.evaluate.perplexity import perplexity, token_losses
from pennyweight.model import anatomy
from pennyweight.weights import LowRank

VOCABULARY = 101


def llama(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **options))


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4))


def capped():
    # a soft cap behind the head, low enough to bend every logit
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, final_logit_softcapping=0.5, sliding_window=8, query_pre_attn_scalar=4,
        )
    )  # fmt: skip


def mixture():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


class Plain(nn.Module):
    """A language model that no library knows and whose head has no name: a bag of the tokens so far."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return self.mix(self.dropout(self.table(tokens).cumsum(1)))


MODELS = [llama, tied_llama, gpt2, capped, mixture, Plain]


def make(build, seed=0):
    torch.manual_seed(seed)
    module = build().eval()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.mul_(5)  # logits that differ, as those of a trained model do
    return module


@pytest.fixture
def windows():
    return torch.randint(0, VOCABULARY, (5, 13), generator=torch.Generator().manual_seed(1))


def whole_logits(module, windows):
    with torch.no_grad():
        output = module(windows)
    return (output if isinstance(output, torch.Tensor) else output.logits).double()


def whole_losses(module, windows):
    logits = whole_logits(module, windows)[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@pytest.mark.parametrize("numbers", [2**24, 3 * VOCABULARY, 1], ids=["whole", "chunks", "one at a time"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_losses_are_those_of_the_whole_logits(build, numbers, windows, monkeypatch):
    monkeypatch.setattr(chunked, "_NUMBERS", numbers)
    module = make(build)
    found = token_losses(module, windows, batch=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole_losses(module, windows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [llama, capped], ids=lambda build: build.__name__)
def test_no_whole_logits_are_ever_made(build, windows, monkeypatch):
    monkeypatch.setattr(chunked, "_NUMBERS", 3 * VOCABULARY)
    module = make(build)
    sizes = []
    module.lm_head.register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    token_losses(module, windows, batch=5)
    assert max(sizes) <= max(3 * VOCABULARY, 5 * VOCABULARY)  # a chunk, or one position of each window of the batch


def test_what_happens_behind_the_head_is_not_lost(windows):
    module = make(capped)
    bent = token_losses(module, windows)
    module.config.final_logit_softcapping = None
    assert (token_losses(module, windows) - bent).abs().max() > 0.1


def test_losses_do_not_depend_on_the_batch(windows):
    module = make(llama)
    one, many = (token_losses(module, windows, batch=batch) for batch in (1, 5))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_compact_layers_are_scored_like_the_matrices_they_stand_for(windows):
    module, twin = make(tied_llama), make(tied_llama)
    for found in anatomy.of(module).layers():
        weight = LowRank.nearest(anatomy.matrix(module, found), rank=min(found.shape) // 2)
        with torch.no_grad():
            anatomy.matrix(twin, found).copy_(weight.dense())
        anatomy.replace(module, found.path, weight)
    expected = token_losses(twin, windows)
    torch.testing.assert_close(token_losses(module, windows), expected, rtol=1e-4, atol=1e-4)
    assert (expected - token_losses(make(tied_llama), windows)).abs().max() > 0.1


def test_bfloat16_products_stay_near(windows):
    module = make(llama)
    exact, rounded = token_losses(module, windows), token_losses(module, windows, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in module.parameters())


def test_the_model_is_left_as_it_was(windows):
    module = make(Plain)
    expected = token_losses(module, windows)
    module.train()
    module.table.eval()
    hooks = [len(part._forward_pre_hooks) for part in module.modules()]
    torch.testing.assert_close(token_losses(module, windows), expected)  # no dropout
    assert (module.training, module.table.training, module.dropout.training) == (True, False, True)
    assert [len(part._forward_pre_hooks) for part in module.modules()] == hooks
    assert torch.is_grad_enabled()


def test_the_model_is_left_as_it_was_after_an_error(windows):
    module = make(llama).train()
    module.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError):
        token_losses(module, windows)
    assert module.training
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert torch.is_grad_enabled()


def test_progress_is_told(windows):
    seen = []
    token_losses(make(llama), windows, batch=2, report=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_perplexity_is_the_exponential_of_the_mean():
    losses = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert perplexity(losses) == pytest.approx(np.exp(3.0))
    assert perplexity(torch.full((1, 1), 800.0)) == float("inf")


@pytest.mark.parametrize("numbers", [2**24, 5 * VOCABULARY])
def test_agreement_is_that_of_the_whole_distributions(windows, numbers, monkeypatch):
    monkeypatch.setattr(chunked, "_NUMBERS", numbers)
    original, other = make(llama), make(capped, seed=1)
    found = agreement(original, other, windows, batch=2)
    p, q = (whole_logits(module, windows)[:, :-1].log_softmax(-1) for module in (original, other))
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.same, p.argmax(-1) == q.argmax(-1))
    assert found.kl.shape == (5, 12)
    torch.testing.assert_close(found.original_losses.double(), whole_losses(original, windows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.other_losses.double(), whole_losses(other, windows), rtol=1e-5, atol=1e-5)
    assert (found.kl > 0).all()


def test_a_model_without_a_head_compares_with_one_that_has_it(windows, monkeypatch):
    monkeypatch.setattr(chunked, "_NUMBERS", 5 * VOCABULARY)

    class Headless(Plain):
        def forward(self, tokens):
            return self.table(tokens).cumsum(1) @ self.mix.weight.T

    found = agreement(make(llama), make(Headless), windows, batch=2)
    p, q = (whole_logits(make(build), windows)[:, :-1].log_softmax(-1) for build in (llama, Headless))
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-4)


def test_a_model_agrees_with_itself(windows):
    module = make(llama)
    found = agreement(module, module, windows)
    assert found.same.all()
    assert found.kl.abs().max() == 0
    assert torch.is_grad_enabled()


def test_a_broken_window_is_named(windows):
    module = make(llama)
    windows[windows == 7] = 8
    windows[3, 4] = 7
    with torch.no_grad():
        module.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(ModelError, match=r"window 3: the loss is nan"):
        token_losses(module, windows, batch=2)
    with pytest.raises(ModelError, match=r"window 3: the divergence is nan"):
        agreement(make(llama), module, windows, batch=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "at least one window"),
        (torch.zeros(2, 1, dtype=torch.long), "2 tokens"),
        (torch.zeros(8, dtype=torch.long), "windows, tokens"),
        (torch.zeros(2, 8), "float32"),
        (torch.full((2, 8), VOCABULARY), r"0 to 100; use the tokenizer"),
        (torch.full((2, 8), -1), "token ids -1"),
    ],
)
def test_what_are_no_windows_is_named(given, words):
    with pytest.raises(DataError, match=words):
        token_losses(make(llama), given)


def test_what_is_no_language_model_is_named(windows):
    class Pooled(Plain):
        def forward(self, tokens):
            return super().forward(tokens).mean(1)

    with pytest.raises(ModelError, match=r"Pooled returns \(4, 101\) for token ids \(4, 13\)"):
        token_losses(make(Pooled), windows)


def test_vocabularies_must_be_equal(windows):
    torch.manual_seed(0)
    other = llama()
    other.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ModelError, match="101 and 104 do not"):
        agreement(make(llama), other, windows)


# --- sentence embeddings


class Letters:
    """A tokenizer of letters, padded to the right."""

    def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == (True, True, "pt")
        ids = [[1 + ord(letter) % 90 for letter in text][:max_length] for text in texts]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
            "offsets": torch.zeros(1),  # what the model does not take
        }


SENTENCES = ["one", "a much longer sentence, the second", "two words", "x"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
        )
    ).eval()


def test_embeddings_are_masked_means_of_length_one(encoder):
    found = embed(encoder, Letters(), SENTENCES, batch=3)
    for sentence, vector in zip(SENTENCES, found, strict=True):
        tokens = Letters()([sentence], padding=True, truncation=True, max_length=99, return_tensors="pt")
        with torch.no_grad():
            mean = encoder(tokens["input_ids"]).last_hidden_state[0].mean(0)  # alone: nothing is padded
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_embeddings_come_in_the_order_asked_and_are_cut(encoder):
    whole = embed(encoder, Letters(), SENTENCES, batch=2)
    turned = embed(encoder, Letters(), SENTENCES[::-1], batch=4)
    torch.testing.assert_close(whole, turned.flip(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        embed(encoder, Letters(), SENTENCES, length=3)[1], embed(encoder, Letters(), [SENTENCES[1][:3]])[0]
    )


def test_embeddings_of_windows_are_those_of_sentences(encoder):
    windows = torch.randint(0, VOCABULARY, (5, 7), generator=torch.Generator().manual_seed(2))
    seen = []
    found = embed_windows(encoder, windows, batch=2, report=lambda done, of: seen.append((done, of)))
    with torch.no_grad():
        means = encoder(windows).last_hidden_state.mean(1)
    torch.testing.assert_close(found, nn.functional.normalize(means, dim=-1), rtol=1e-4, atol=1e-5)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_pooling_reads_nothing_of_the_padding():
    states = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    torch.testing.assert_close(pool(states, torch.tensor([[1, 1, 0]])), torch.tensor([[0.6, 0.8]]))
    with pytest.raises(ShapeError):
        pool(states, torch.tensor([[1, 1]]))


def test_cosines():
    found = cosines(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]).double())
    with pytest.raises(ShapeError, match="cosines"):
        cosines(torch.ones(2, 3), torch.ones(3, 3))


def test_a_broken_sentence_is_named(encoder):
    with pytest.raises(DataError, match="no sentences"):
        embed(encoder, Letters(), [])

    class Broken(nn.Module):
        def forward(self, input_ids):
            return torch.where(input_ids[..., None] == 1 + ord("x") % 90, torch.nan, torch.ones(*input_ids.shape, 4))

    with pytest.raises(ModelError, match="sentence 3:"):
        embed(Broken(), Letters(), SENTENCES)


# --- classifiers


def test_predictions_are_the_likeliest_classes():
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9)).train(), torch.randn(10, 6)
    expected = module[0](inputs).argmax(-1)
    assert torch.equal(predictions(module, inputs, batch=3), expected)
    labels = expected.clone()
    labels[2] = (labels[2] + 1) % 4
    assert correct(module, inputs, labels).tolist() == [index != 2 for index in range(10)]


def test_named_inputs_reach_the_model():
    class Two(nn.Module):
        def forward(self, left, right):
            return {"logits": left - right}

    inputs = {"left": torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "right": torch.tensor([[0.0, 0.0], [0.0, 2.0]])}
    assert predictions(Two(), inputs).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: predictions(nn.Identity(), torch.zeros(0, 3)), DataError, "samples"),
        (lambda: predictions(nn.Identity(), {}), DataError, "no samples"),
        (lambda: predictions(nn.Identity(), {"a": torch.zeros(1), "b": torch.zeros(2)}), DataError, r"\[1, 2\]"),
        (lambda: predictions(nn.Identity(), torch.zeros(2, 3, 4)), ModelError, "samples, K"),
        (lambda: predictions(nn.Identity(), torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])), ModelError, "sample 1"),
        (lambda: correct(nn.Identity(), torch.ones(2, 3), torch.zeros(3)), DataError, "2 samples"),
    ],
)
def test_bad_samples_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
