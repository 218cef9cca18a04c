"""Memorization told by one pass, against decoding token by token."""

import pytest
import torch

from pennyweight import eval as short
from pennyweight import evaluate
from pennyweight.errors import DataError, OptionError
from pennyweight.evaluate import memorisation
from pennyweight.model.model import Model
from pennyweight.zoo.gpt import GPT, GPTConfig


def taught(ids, steps=60):
    module = GPT(
        GPTConfig(width=32, depth=1, num_heads=2, vocabulary=16, context=12),
        generator=torch.Generator().manual_seed(0),
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def decoded(module, prompts, gen):
    with torch.no_grad():
        for _ in range(gen):
            prompts = torch.cat([prompts, module(prompts)[:, -1:].argmax(-1)], 1)
    return prompts[:, -gen:]


def test_one_pass_tells_what_decoding_gives_back():
    ids = torch.randint(0, 16, (40, 12), generator=torch.Generator().manual_seed(1))
    module = taught(ids[:20])
    found = memorisation(module, ids, prompt=5, gen=7, batch=3)
    said = decoded(module, ids[:, :5], 7)
    assert torch.equal(found.matches, (said == ids[:, 5:]).all(1))
    first_wrong = [next((t for t in range(7) if said[w, t] != ids[w, 5 + t]), 7) for w in range(40)]
    assert found.leading.tolist() == first_wrong
    assert found.exact_match == float(found) == pytest.approx((said == ids[:, 5:]).all(1).float().mean())
    assert found.matches[:20].any()  # seen
    assert not found.matches[20:].any()  # never seen


def test_a_model_that_copies_gives_everything_back():
    class Next(torch.nn.Module):
        """Counts up."""

        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(9, 9, bias=False)
            self.lm_head.weight.data = torch.eye(9).roll(1, 0)

        def forward(self, input_ids):
            return self.lm_head(torch.nn.functional.one_hot(input_ids, 9).float())

    rows = torch.arange(9).repeat(3, 1)
    assert memorisation(Next(), rows, 4, 5).exact_match == 1
    rows[1, 7] = 0  # two tokens from the end
    assert memorisation(Next(), rows, 4, 5).leading.tolist() == [5, 3, 5]
    assert memorisation(Next(), rows, 4, 3).exact_match == 1  # what lies behind does not count


def test_bad_input():
    module, ids = taught(torch.zeros(1, 12, dtype=torch.long), 0), torch.zeros(2, 9, dtype=torch.long)
    with pytest.raises(OptionError, match="gen = 0; give at least 1 token"):
        memorisation(module, ids, 5, 0)
    with pytest.raises(DataError, match=r"shape \(2, 9\); 5 tokens of prompt and 5 of continuation take rows of 10"):
        memorisation(module, ids, 5, 5)
    with pytest.raises(DataError, match="a list of texts and a loaded model"):
        memorisation(module, ["some text"], 5, 5)
    assert short.memorisation is evaluate.memorisation is evaluate.memorization


def test_texts_too_short_are_left_out():
    def tokens(texts, **_):
        return {"input_ids": [[ord(letter) - ord("a") for letter in text] for text in texts]}

    module = taught(torch.arange(10).repeat(2, 1))
    model = Model(module=module, tokenizer=tokens, name="toy", kind="causal-lm")
    found = memorisation(model, ["abcdefghij", "abc", "abcdebbbbbbb"], 5, 4)
    assert found.leading.tolist() == [4, 0]
    with pytest.raises(DataError, match="the longest of 2 texts has 3 tokens; 9 are needed"):
        memorisation(model, ["abc", "ab"], 5, 4)
