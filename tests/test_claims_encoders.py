"""The encoder that claims about merging share, against the model that its blocks are from."""

import torch
from families import build
from torch.func import functional_call

from pennyweight.claims.encoders import SHARPNESS, TASKS, Encoder
from pennyweight.claims.experts import parameters
from pennyweight.model import anatomy


def test_the_blocks_alone_give_the_embeddings_of_the_whole_model_padding_or_not():
    bert = build("bert").bert
    ids = torch.randint(3, 64, (5, 12), generator=torch.Generator().manual_seed(0))
    ids[1, 7:], ids[4, 3:] = 0, 0
    encoder = Encoder(bert).eval()
    seen = (ids != 0).long()
    with torch.no_grad():
        states = bert(input_ids=ids, attention_mask=seen).last_hidden_state
        wanted = torch.nn.functional.normalize((states * seen[..., None]).sum(1), dim=1)
        found = encoder(torch.nn.functional.pad(ids, (1, 0), value=-1))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        encoder.heads = [wanted[n : n + 2] for n in range(len(TASKS))]
        logits = encoder(torch.nn.functional.pad(ids, (1, 0), value=2))
    torch.testing.assert_close(logits, SHARPNESS * wanted @ wanted[2:4].T, rtol=1e-5, atol=1e-5)


def test_blocks_are_all_that_is_trained_and_merged():
    bert = build("bert").bert
    encoder = Encoder(bert)
    assert parameters(encoder).keys() == {
        name.removeprefix("encoder.").replace("layer.", "layers.", 1)
        for name, _ in bert.named_parameters()
        if name.startswith("encoder.")
    }
    assert [block.path for block in anatomy.of(encoder).blocks] == ["layers.0", "layers.1"]
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.pad(ids, (1, 0), value=-1)
    once = encoder.train()(rows)
    assert torch.equal(encoder(rows), once)  # no dropout
    once[:, 0].sum().backward()  # embeddings are of length 1, whatever the weights
    assert all(one.grad is not None for one in encoder.parameters())
    assert all(one.grad is None for one in bert.parameters())
    with torch.no_grad():
        zeros = {name: torch.zeros_like(one) for name, one in parameters(encoder).items()}
        assert not torch.equal(functional_call(encoder, zeros, (rows,)), once)
