"""Row 36, QMoE: ternary weights of wide layers take less than one bit, and making errors good pays at any width."""

from __future__ import annotations

import copy
from functools import cache

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from pennyweight.calibrate import collect
from pennyweight.claims import Outcome, claim, tiny
from pennyweight.claims.assets import Assets
from pennyweight.levers.quantize.entropy import Entropy
from pennyweight.levers.quantize.qmoe import QMoE
from pennyweight.model import anatomy
from pennyweight.model.experts import split_experts
from pennyweight.model.loading import of_module
from pennyweight.statistics import Statistics
from pennyweight.train.schedules import wsd
from pennyweight.weights import Dense, DictionaryCoded, EntropyCoded, rebuild, structure
from pennyweight.weights.entropy import scale_bytes

_STEPS = 300
_HEADLINE = "SwitchTransformer-c2048: 3.2 TB to less than 160 GB, 0.8 bits a parameter (abstract)"


@cache
def _moments(assets: Assets) -> tuple[dict[str, Statistics], dict[str, Statistics]]:
    """Of MiniLM on calibration and on held-out text."""
    minilm = assets.minilm()
    seen = minilm.windows("wiki", part="calibration", length=128, count=24)
    fresh = minilm.windows("wiki", part="heldout", length=128, count=8, seed=1)
    return collect(minilm.model, seen), collect(minilm.model, fresh)


@claim(row=36, pace="quick", headline=_HEADLINE)
def the_dictionary_code_is_lossless_and_under_one_bit(assets: Assets) -> Outcome:
    """Stored bits a weight of MiniLM's ffn.down (1536 inputs), values of rows and counts of words included."""
    minilm = assets.minilm()
    seen, _ = _moments(assets)
    bits, zeros, lossless = [], [], True
    for one, matrix in zip(minilm.maps("ffn.down"), minilm.matrices("ffn.down"), strict=True):
        found = QMoE().solve(Dense(matrix), seen[one.name])
        assert isinstance(found, DictionaryCoded)
        codes, (rows, columns) = found.codes(), found.shape
        again = rebuild(structure(found), found.state_dict())
        plain = torch.where(codes == 0, 0, torch.where(codes == 1, found.levels[:, :1], found.levels[:, 1:])).float()
        lossless &= torch.equal(again.dense(), plain)
        unit = scale_bytes(torch.ones(rows)), scale_bytes(torch.ones(columns))
        rival = EntropyCoded.encode(codes.long(), *unit, step=1.0).cost().bytes + found.levels.nbytes
        packed = rows * -(-columns // 5) + found.levels.nbytes  # five symbols a byte
        bits.append([8 * size / matrix.numel() for size in (found.cost().bytes, packed, rival)])
        zeros.append(float((codes == 0).float().mean()))
    method, baseline, control = torch.tensor(bits).mean(0).tolist()
    return Outcome(
        method=method,
        baseline=baseline,
        unit="stored bits a ternary weight, mean over maps",
        holds=lossless and method < 1 and baseline / method >= 1.27,
        control=("the same symbols range-coded", control),
        notes=f"{100 * sum(zeros) / len(zeros):.3g} % zeros; {baseline / method:.3g} times under five symbols a byte",
    )


@claim(row=36, pace="quick", headline=_HEADLINE)
def ternary_gptq_beats_ternary_rounding_on_heldout_text(assets: Assets) -> Outcome:
    """The same three values a row in all maps of MiniLM, with and without making errors good."""
    minilm = assets.minilm()
    seen, fresh = _moments(assets)
    rows = []
    for one, matrix in list(zip(minilm.maps("encoder"), minilm.matrices("encoder"), strict=True))[::2]:
        weight, judge = Dense(matrix), fresh[one.name].second_moment
        unseen = Statistics(second_moment=torch.eye(matrix.shape[1]))
        method = QMoE().solve(weight, seen[one.name])
        rate = 8 * method.cost().bytes / matrix.numel()
        rivals = (
            QMoE().solve(weight, unseen),
            Entropy(bits=rate).solve(weight, seen[one.name]),
            QMoE(bits=2).solve(weight, seen[one.name]),
        )
        rows.append([found.error(matrix, judge) for found in (method, *rivals)])
    errors = torch.tensor(rows)
    method_error, baseline, control, wide = errors.mean(0).tolist()
    return Outcome(
        method=method_error,
        baseline=baseline,
        unit="relative error of a map's outputs, held-out text, mean over maps",
        holds=bool((errors[:, 0] < errors[:, 1]).all()) and method_error < 0.9 * baseline and wide < method_error,
        control=("integers of any size range-coded to the same bytes", control),
        notes=f"2-bit GPTQ: {wide:.4g}",
    )


@claim(row=36, pace="quick", headline=_HEADLINE)
def in_a_mixture_trained_here_making_errors_good_keeps_more_of_the_loss(assets: Assets) -> Outcome:
    """All experts of a byte-level mixture ternary or 2-bit, with and without error feedback; held-out loss."""
    with tiny.one_thread():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=48, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
            max_position_embeddings=tiny.LENGTH,
        )  # fmt: skip
        module = MixtralForCausalLM(config)
        split_experts(module)
        tiny.trainer(module, wsd(total=_STEPS, warmup=10, peak=4e-3), batch=32).run(_STEPS)
        model = of_module(module)
        experts = [one for one in model.anatomy.layers() if one.role.startswith("moe.experts")]
        seen = collect(model, tiny.text()[0][:256], dtype=torch.float32)
        weights = {one.name: Dense(anatomy.matrix(module, one).clone()) for one in experts}
        unseen = {shape: Statistics(second_moment=torch.eye(shape[1])) for shape in {one.shape for one in experts}}

        def losses(bits: float, *, feedback: bool) -> torch.Tensor:
            changed = copy.deepcopy(module)
            for shape in unseen:
                batch = [one for one in experts if one.shape == shape]  # all experts of a shape at once
                known = [seen[one.name] if feedback else unseen[shape] for one in batch]
                for one, weight in zip(
                    batch, QMoE(bits=bits).solve_experts([weights[one.name] for one in batch], known), strict=True
                ):
                    anatomy.replace(changed, one.path, weight)
            return tiny.held_out_losses(changed).mean(1) - start

        start = tiny.held_out_losses(module).mean(1)
        ternary, plain, wide = losses(1.5, feedback=True), losses(1.5, feedback=False), losses(2, feedback=True)
    gain = plain - ternary  # by window: both read the same text
    sure = float(gain.mean() - 3 * gain.std() / len(gain) ** 0.5) > 0
    method, baseline, control = (float(part.mean()) for part in (ternary, plain, wide))
    return Outcome(
        method=method,
        baseline=baseline,
        unit="nats a byte lost on held-out text",
        holds=sure and control < method,
        control=("2-bit experts, which take more bytes", control),
        notes=f"{len(experts)} expert matrices; held-out loss before: {float(start.mean()):.3g} nats a byte",
    )
