"""Recovery of shrunk models: the loss without logits against the plain one, what is trained, and the lever."""

from __future__ import annotations

import pytest
import torch
from families import build, inputs
from torch.nn import functional

from pennyweight.errors import ModelError, OptionError
from pennyweight.evaluate.agreement import agreement
from pennyweight.lever import make
from pennyweight.model.loading import of_module
from pennyweight.solvers.recovery import Divergence, recover, states_of
from pennyweight.surgery import remove_blocks
from pennyweight.work import Work


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_the_divergence_and_its_gradient_are_those_of_whole_logits(rows):
    head, wanted = draw(40, 6), draw(rows, 6, seed=1)
    one, other = (draw(rows, 6, seed=2).requires_grad_() for _ in range(2))
    p, q = (wanted @ head.T).log_softmax(-1), (one @ head.T).log_softmax(-1)
    plain = functional.kl_div(q, p, reduction="batchmean", log_target=True)
    found = Divergence.apply(other, wanted, head)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    (3 * plain).backward()
    (3 * found).backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7)
    assert float(Divergence.apply(wanted, wanted, head)) == pytest.approx(0, abs=1e-6)


def shortened():
    module = build("llama", num_hidden_layers=4).eval()
    with torch.no_grad():  # blocks that do enough to be missed
        for name, one in module.named_parameters():
            if "layers" in name and one.ndim > 1:
                one.mul_(8)
    windows = torch.randint(0, module.config.vocab_size, (12, 16), generator=torch.Generator().manual_seed(0))
    states = states_of(module, windows)
    student = build("llama", num_hidden_layers=4).eval()
    student.load_state_dict(module.state_dict())
    remove_blocks(student, [1], inputs("llama"))
    return module, student, windows, states


def test_a_shortened_model_comes_nearer_and_its_embedding_stays():
    original, student, windows, states = shortened()
    table = student.get_input_embeddings().weight.detach().clone()
    before = float(agreement(original, student, windows).kl.mean())
    recover(student, windows, states, steps=60, batch=6, rate=3e-3)
    assert float(agreement(original, student, windows).kl.mean()) < 0.5 * before
    assert torch.equal(student.get_input_embeddings().weight, table)
    assert torch.equal(student.get_output_embeddings().weight, original.get_output_embeddings().weight)
    assert all(one.requires_grad and one.grad is None for one in student.parameters())
    assert not student.training


def test_the_same_seed_recovers_to_the_same_bits():
    ends = []
    for _ in range(2):
        _, student, windows, states = shortened()
        recover(student, windows, states, steps=3, batch=4, seed=5)
        ends.append(torch.cat([one.detach().flatten() for one in student.parameters()]))
    assert torch.equal(*ends)


def test_states_of_another_model_and_models_without_a_head_are_refused():
    _, student, windows, states = shortened()
    with pytest.raises(OptionError, match=r"recovery: states \(12, 16, 8\).* whose head is as wide"):
        recover(student, windows, states[..., :8], steps=1)
    with pytest.raises(ModelError, match="has no plain matrix as its head"):
        states_of(build("vit"), windows)


def test_the_lever_needs_to_know_the_original():
    original, student, windows, _ = shortened()
    model = of_module(student)
    lever = make("prune.recover", {"steps": 40, "batch": 6, "rate": 3e-3})
    with pytest.raises(OptionError, match="run it as a step of a recipe"):
        lever.change(model, Work(model=model, windows=windows, maps=model.anatomy.layers()))
    before = float(agreement(original, student, windows).kl.mean())
    work = Work(model=model, windows=windows, maps=model.anatomy.layers(), original=of_module(original))
    lever.change(model, work)
    assert float(agreement(original, student, windows).kl.mean()) < 0.6 * before
