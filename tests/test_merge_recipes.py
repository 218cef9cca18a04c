"""Every merge as a recipe on the command line, against the same call in Python; adapters; recipes that are wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import llama, text_file, tokenizer
from transformers import LlamaForCausalLM

from pennyweight import data
from pennyweight.cli import main
from pennyweight.merge import (
    FORMULAS,
    OTA,
    Dare,
    Linear,
    Slerp,
    TaskArithmetic,
    Ties,
    fuse,
    importance_chunks,
    merge_experts,
    merge_tensors,
    read_moments,
    save_moments,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": False}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(module):
    return {name: one.detach().clone() for name, one in module.named_parameters()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, two models near it with second moments, and a text, in files."""
    home = tmp_path_factory.mktemp("merges")
    for n, name in enumerate(("base", "one", "two")):
        module = LlamaForCausalLM.from_pretrained(llama(home / name, **SMALL))
        with torch.no_grad():
            for place, parameter in enumerate(module.parameters() if n else ()):
                parameter.add_(draw(100 * n + place, *parameter.shape), alpha=0.05)
        module.save_pretrained(home / name)
        moments = {key: draw(len(key) + n, *one.shape).square() * 1e-9 for key, one in tensors(module).items()}
        save_moments(home / f"{name}-moments", moments)
    text_file(home)
    return home


def learned(base, one, two, seen):
    options = {"initial": 0.3, "epochs": 2, "batch": 2}
    first = merge_experts(base, [one, two], [seen, seen], **options)
    count = len(list(base.parameters()))
    chunks = importance_chunks(base, [one, two], first, budget=2 * count)
    return merge_experts(base, [one, two], [seen, seen], chunks=chunks, **options).tensors


BOTH, WEIGHED = "[one, two]", "[{model: one, weight: 0.7}, {model: two, weight: -0.2}]"
CURVED = "[{model: one, moments: one-moments}, {model: two, moments: two-moments}]"
# of each name: recipe, and the call in Python with the base, both models, their moments, and windows of the text
RECIPES = {
    "linear": (f"models: {WEIGHED}", lambda b, o, t, m, seen: merge_tensors(Linear(weights=(0.7, -0.2)), [o, t])),
    "slerp": (f"options: {{t: 0.25}}\nmodels: {BOTH}", lambda b, o, t, m, seen: merge_tensors(Slerp(t=0.25), [o, t])),
    "task_arithmetic": (
        f"options: {{scale: 0.4}}\nbase: base\nmodels: {WEIGHED}",
        lambda b, o, t, m, seen: merge_tensors(TaskArithmetic(scale=0.4, weights=(0.7, -0.2)), [o, t], b),
    ),
    "ties": (
        f"options: {{density: 0.3, scale: 0.8}}\nbase: base\nmodels: {BOTH}",
        lambda b, o, t, m, seen: merge_tensors(Ties(density=0.3, scale=0.8), [o, t], b),
    ),
    "dare": (
        f"options: {{density: 0.3, sign: ties, seed: 5}}\nbase: base\nmodels: {BOTH}",
        lambda b, o, t, m, seen: merge_tensors(Dare(density=0.3, sign="ties", seed=5), [o, t], b),
    ),
    "ota": (
        f"options: {{power: 1.0, density: 0.4}}\nbase: base\nmodels: {CURVED}",
        lambda b, o, t, m, seen: merge_tensors(OTA(moments=m, power=1.0, density=0.4), [o, t], b),
    ),
    "transport": (
        f"options: {{text: text.txt, windows: 4, length: 24, alpha: 0.3}}\nmodels: {BOTH}",
        lambda b, o, t, m, seen: tensors(fuse(o, t, seen, alpha=0.3)),
    ),
    "expert": (
        "options: {texts: [text.txt, text.txt], samples: 4, length: 24, initial: 0.3, epochs: 2, batch: 2, chunks: 2}\n"
        f"base: base\nmodels: {BOTH}",
        lambda b, o, t, m, seen: learned(b, o, t, seen),
    ),
}


def test_every_merge_has_a_recipe_here():
    assert RECIPES.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_on_the_command_line_gives_what_the_call_in_python_gives(name, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)  # a text is looked for where the command runs, models where the recipe lies
    text, call = RECIPES[name]
    recipe = home / f"{name}.yaml"
    recipe.write_text(f"pennyweight: 1\nmerge: {name}\n{text}\n")
    assert main(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 0
    modules = [LlamaForCausalLM.from_pretrained(home / place).eval() for place in ("base", "one", "two")]
    given = modules if name in ("transport", "expert") else [tensors(one) for one in modules]
    moments = tuple(read_moments(home / f"{place}-moments") for place in ("one", "two"))
    seen = data.windows("text.txt", tokenizer(), part="calibration", length=24, count=4)
    wanted = call(*given, moments, seen)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert f"{len(wanted)} tensors merged" in capsys.readouterr().out
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(one, wanted[key]) for key, one in again.named_parameters())
    assert not torch.equal(wanted["lm_head.weight"], tensors(modules[2])["lm_head.weight"])


def adapter(place, base, seed, rank=3, alpha=6.0, **config):
    """A LoRA adapter of the attention of ``base`` written by hand, and the tensors that it makes."""
    place.mkdir()
    factors, made = {}, dict(base)
    for n, key in enumerate(key for key in base if key.endswith(("q_proj.weight", "v_proj.weight"))):
        down, up = draw(seed + n, rank, base[key].shape[1]), draw(seed + 50 + n, base[key].shape[0], rank)
        stem = "base_model.model." + key.removesuffix(".weight")
        factors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        made[key] = base[key] + alpha / rank * up @ down
    save_file(factors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"} | config
    (place / "adapter_config.json").write_text(json.dumps(config))
    return made


ADAPTED = "[{model: base, adapter: first, weight: 0.6}, {model: base, adapter: second, weight: 0.3}, {model: one}]"


@pytest.mark.parametrize(
    ("merge", "formula"),
    [
        ("linear", Linear(weights=(0.6, 0.3, 1.0))),
        ("task_arithmetic\nbase: base", TaskArithmetic(weights=(0.6, 0.3, 1.0))),
        ("ties\nbase: base\noptions: {density: 0.4}", Ties(density=0.4, weights=(0.6, 0.3, 1.0))),
        ("dare\nbase: base\noptions: {density: 0.4}", Dare(density=0.4, weights=(0.6, 0.3, 1.0))),
    ],
)
def test_adapters_of_one_base_merge_as_the_models_they_make(merge, formula, home, tmp_path):
    base = load_file(home / "base" / "model.safetensors")
    for name in ("base", "one"):
        (tmp_path / name).symlink_to(home / name)
    models = [adapter(tmp_path / name, base, 200 * n, rank=2 + n) for n, name in enumerate(("first", "second"))]
    (tmp_path / "r.yaml").write_text(f"pennyweight: 1\nmerge: {merge}\nmodels: {ADAPTED}\n")
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = merge_tensors(formula, [*models, load_file(home / "one" / "model.safetensors")], base)
    for key, one in wanted.items():
        # products are made in stretches: their sums may be in another order
        torch.testing.assert_close(found[key], one, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers the old way
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 8, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}},
    ],
    ids=["plain", "rank-stabilized", "ranks by layer"],
)
def test_an_adapter_that_peft_saved_merges_to_the_bits_of_its_own_merge(options, home, tmp_path):
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    module = LlamaForCausalLM.from_pretrained(home / "base")
    torch.manual_seed(0)  # peft draws its factors from the global generator
    made = peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **options))
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "lora_B" in name:  # zero at the start
                one.copy_(draw(len(name), *one.shape))
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").symlink_to(home / "base")
    (tmp_path / "r.yaml").write_text("pennyweight: 1\nmerge: linear\nmodels: [{model: base, adapter: adapter}]\n")
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 0
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), tensors(made.merge_and_unload())
    before = load_file(home / "base" / "model.safetensors")
    assert sum(not torch.equal(wanted[key], before[key]) for key in wanted) == 3 * 2
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


WRONG = {
    "steps: []": "r.yaml: not a merge; it begins with `pennyweight: 1`",
    "pennyweight: 1\nmerge: [": "r.yaml",
    "pennyweight: 1\nmerge: tise\nmodels: [one]": "no merge is called 'tise'; did you mean ties?",
    "pennyweight: 1\nmerge: ties\nbase: base\nmodels: [one]\noptions: {densty: 1}": "unknown key 'densty'",
    "pennyweight: 1\nmerge: ties\nbase: base\nmodels: [one]\noptions: {density: 2}": "density = 2 is out of range",
    "pennyweight: 1\nmerge: ties\nbase: base\nmodels: [one]\noptions: 3": "options is 3; give a mapping",
    "pennyweight: 1\nmerge: ties\nbase: base\nmodels: one": "give a list of directories",
    "pennyweight: 1\nmerge: ties\nbase: base\nmodels: [3]": "give a list of directories",
    "pennyweight: 1\nmerge: ties\nbase: base": "models names none",
    "pennyweight: 1\nmerge: linear\nmodels: 5": "models names none",
    "pennyweight: 1\nmerge: linear\nmodels: true": "models names none",
    "pennyweight: true\nmerge: linear\nmodels: [one]": "not a merge; it begins with",
    "pennyweight: 1\nmerge: ties\nmodels: [one, two]": "give base: the model all came from",
    "pennyweight: 1\nmerge: slerp\nmodels: [one]": "give two models and t",
    "pennyweight: 1\nmerge: linear\nmodels: [one, nowhere]": "nowhere",
    "pennyweight: 1\nmerge: linear\nbase: [base]\nmodels: [one]": "base is ['base']; give a directory",
    "pennyweight: 1\nmerge: linear\nmodels: [{model: one, adapter: nowhere}]": "give the directory that peft saved",
    "pennyweight: 1\nmerge: linear\nmodels: [{model: one, adapter: 3}]": "adapter is 3; give a directory",
    "pennyweight: 1\nmerge: linear\nmodels: [{model: base, adapter: other}]": "only plain LoRA can be merged",
    "pennyweight: 1\nmerge: linear\nmodels: [{model: base, adapter: empty}]": "empty",
    "pennyweight: 1\nmerge: linear\nmodels: [one, {model: two, weight: heavy}]": "give numbers",
    "pennyweight: 1\nmerge: linear\nmodels: [one]\ndtype: int4": "dtype 'int4'; give one of",
    "pennyweight: 1\nmerge: linear\nmodels: [one]\ndtype: [float32]": "dtype ['float32']; give one of",
    "pennyweight: 1\nmerge: linear\nmodels: [one]\nskip: [nothing*]": "selects none",
    "pennyweight: 1\nmerge: ota\nbase: base\nmodels: [one]": "0 sets of second moments for 1 models",
    "pennyweight: 1\nmerge: linear\nmodels: [{model: one, moments: one-moments}]": "takes no moments",
    "pennyweight: 1\nmerge: transport\nmodels: [one]": "give two models and no base",
    "pennyweight: 1\nmerge: transport\nmodels: [one, two]\noptions: {text: nowhere.txt}": "nowhere.txt",
    "pennyweight: 1\nmerge: expert\nbase: base\nmodels: [one]": "0 texts for 1 models",
    "pennyweight: 1\nmerge: expert\nbase: base\nmodels: [one]\noptions: {texts: text.txt}": "texts",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_ends_in_one_line_and_leaves_nothing(text, home, tmp_path, capsys):
    for place in Path(home).iterdir():
        (tmp_path / place.name).symlink_to(place)
    base = load_file(home / "base" / "model.safetensors")
    adapter(tmp_path / "other", base, 1, peft_type="IA3")
    adapter(tmp_path / "empty", base, 1)
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    before = {place.name for place in tmp_path.iterdir()}
    (tmp_path / "r.yaml").write_text(text + "\n")
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pennyweight: ")
    assert WRONG[text] in said
    assert said.count("\n") == 1
    assert {place.name for place in tmp_path.iterdir()} == before | {"r.yaml"}


def test_a_recipe_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    assert main(["merge", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "give the path of a merge recipe" in said
    assert said.count("\n") == 1
