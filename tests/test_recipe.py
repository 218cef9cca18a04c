"""Recipes: what is written is read back equal, patterns select exactly what they say, and mistakes are named."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pennyweight import lever as registry
from pennyweight.errors import OutputError, RecipeError, UserError
from pennyweight.lever import ANY, at_least, between, lever, option
from pennyweight.recipe import Recipe, Step, shorten


@pytest.fixture(autouse=True, scope="module")
def _levers_of_this_test() -> Iterator[None]:
    registry.load_rooms()  # a module imported later would register once, and be forgotten below
    kept = dict(registry._REGISTRY)

    @lever("trial.round", reach="weight", row=118)
    @dataclass(frozen=True, kw_only=True)
    class Round:
        """Round."""

        bits: int = option(4, between(2, 8), "bits")
        group_size: int | None = option(128, at_least(1), "group")
        pattern: tuple[int, ...] = option((), ANY, "kept of each")

    @lever("trial.merge", reach="model")
    @dataclass(frozen=True, kw_only=True)
    class Merge:
        """Merge."""

        weight: float = option(0.5, between(0, 1), "share of the first")

    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(kept)


@dataclass(frozen=True)
class Map:
    name: str
    role: str


MAPS = [
    Map(f"model.layers.{block}.{part}", role)
    for block in range(12)
    for part, role in {
        "self_attn.q_proj": "attention.query",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
    }.items()
] + [Map("model.embed_tokens", "embedding")]

TEXT = """\
pennyweight: 1
steps:
- trial.round: {bits: 3, pattern: [2, 4]}
  where: role:ffn.*
- trial.round: {}
  where: ['model.layers.{0,10-11}.*', '!*.down_proj']
- trial.merge: {weight: 0.25}
"""


def test_a_recipe_is_read_and_written_back_the_same():
    recipe = Recipe.parse(TEXT)
    assert [step.name for step in recipe.steps] == ["trial.round", "trial.round", "trial.merge"]
    assert recipe.steps[0].lever.pattern == (2, 4)
    assert recipe.steps[1].lever.bits == 4
    assert recipe.text() == TEXT
    assert Recipe.parse(recipe.text(comment="two\nlines")) == recipe


@pytest.mark.parametrize("pattern", ["2:4", "'2:4'", "1:16"])
def test_a_pattern_of_zeros_needs_no_quotes(pattern):
    read = Recipe.parse(f"pennyweight: 1\nsteps:\n- prune.magnitude: {{pattern: {pattern}}}\n")
    assert read.steps[0].lever.pattern == pattern.strip("'")
    assert Recipe.parse(read.text()) == read
    with pytest.raises(RecipeError, match="1:2:3"):
        Recipe.parse("pennyweight: 1\nsteps:\n- prune.magnitude: {pattern: 1:2:3.5}\n")


def test_each_step_selects_by_name_role_range_and_exception():
    first, second, third = (list(maps) for _, maps in Recipe.parse(TEXT).selected(MAPS))
    assert [one.name for one in first] == [one.name for one in MAPS if one.role.startswith("ffn")]
    assert [one.name for one in second] == [
        f"model.layers.{block}.{part}" for block in (0, 10, 11) for part in ("self_attn.q_proj", "mlp.up_proj")
    ]
    assert third == MAPS


def test_brackets_stand_for_themselves_and_stars_may_be_anywhere():
    expert = Map("h.1.experts[3]#up", "moe.experts[3].up")
    chosen = registry.make("trial.round")
    assert Step(chosen, ("h.*.experts[3]#up",)).selects(expert)
    assert not Step(chosen, ("h.1.experts[13]#up",)).selects(expert)
    assert not Step(chosen, ("h.1.experts3#up",)).selects(expert)
    assert Step(chosen, ("role:moe.experts[{2-4}].?p",)).selects(expert)
    assert not Step(chosen, ("role:*gate",)).selects(expert)


def test_the_hash_is_of_what_is_done_not_of_the_spelling():
    spelt = TEXT.replace("trial.round: {}", "trial.round: {bits: 4, group_size: 128}").replace(
        "{bits: 3, ", "{ bits: 3,   "
    )
    assert Recipe.parse("# a comment\n" + spelt).sha256 == Recipe.parse(TEXT).sha256
    different = [TEXT.replace("bits: 3", "bits: 2"), TEXT.replace("10-11", "9-11"), TEXT.replace("weight: 0.25", "")]
    swapped = Recipe(tuple(reversed(Recipe.parse(TEXT).steps))).sha256
    assert len({Recipe.parse(text).sha256 for text in (TEXT, *different)} | {swapped}) == 5


def test_a_plan_of_one_lever_a_matrix_is_written_compactly_and_means_the_same():
    made = [registry.make("trial.round", {"bits": bits}) for bits in (3, 4)]
    chosen = {one.name: made[(n // 3) % 4 == 0] for n, one in enumerate(MAPS)}
    chosen["model.embed_tokens"] = None
    recipe = Recipe.of(chosen)
    assert len(recipe.steps) == 2
    assert len(recipe.text().splitlines()) <= 8
    got = {}
    for step, maps in Recipe.parse(recipe.text()).selected(MAPS):
        got |= {one.name: step.lever for one in maps}
    assert got == {name: one for name, one in chosen.items() if one is not None}
    with pytest.raises(RecipeError, match="no map gets a lever"):
        Recipe.of({"a": None})


TAILS = ["a", "b.up", "e[0]#g", "e[1]#g", "e[2]#g", "e[11]#g", "07.x", "7.x", "1", "2.3"]
UNIVERSE = [f"h.{n}.{tail}" for n in range(14) for tail in TAILS]
UNIVERSE += ["head", "0", "1", "2", "h.1x.b", "h.-1.b", "h.1.b"]
NAMES = st.lists(st.sampled_from(UNIVERSE), max_size=25) | st.sets(st.sampled_from(UNIVERSE), min_size=60)


@given(NAMES)
def test_shortened_names_select_exactly_those_names(names):
    step = Step(None, shorten(names))
    assert {name for name in UNIVERSE if step.selects(Map(name, ""))} == set(names)
    assert len(step.where) <= len(set(names))


def recipe_with(step: str) -> str:
    return f"pennyweight: 1\nsteps:\n- trial.merge: {{}}\n- {step}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"r\.yaml: not a recipe; it begins with `pennyweight: 1`"),
        ("- a\n- b", r"not a recipe"),
        ("pennyweight: 2\nsteps: []", r"recipe format 2 is unknown; this version reads 1"),
        ("pennyweight: true\nsteps: [a]", r"recipe format True is unknown"),
        ("pennyweight: 1", r"steps is empty; give a list"),
        ("pennyweight: 1\nsteps: []", r"steps is \[\]; give a list of at least one"),
        ("pennyweight: 1\nsteps: [x]\nmodel: y", r"unknown key 'model'"),
        ("pennyweight: 1\npennyweight: 1", r"r\.yaml line 2: not YAML \('pennyweight' is given twice\)"),
        ("pennyweight: 1\nsteps: &a [*a]", r"aliases have no place in a recipe"),
        ("pennyweight: 1\nsteps: {a: [}", r"r\.yaml line 2: not YAML"),
        ("pennyweight: !!python/object:os.system 1", r"not YAML \(could not determine a constructor"),
        ("pennyweight: 2024-13-45", r"not YAML \(month must be in 1..12"),
        ("[" * 5000, r"nested too deeply"),
        (recipe_with("x"), r"r\.yaml step 2: is 'x'; write `- lever: \{options\}`"),
        (recipe_with("{a: {}, b: {}}"), r"step 2: names 2 levers \(a, b\); give one a step"),
        (recipe_with("{where: a}"), r"names 0 levers \(none\)"),
        (recipe_with("trial.rond: {}"), r"r\.yaml step 2, no lever is called 'trial.rond'; did you mean trial.round"),
        (recipe_with("trial.round: 4"), r"step 2, trial.round: options are 4; write \{bits: 4\}"),
        (recipe_with("trial.round: {bits: 9}"), r"step 2, trial.round: bits = 9 is out of range; give between 2 and 8"),
        (recipe_with("trial.round: {bits: four}"), r"bits = 'four' is a str; give int, between 2 and 8"),
        (recipe_with("trial.round: {bit: 4}"), r"step 2, trial.round has no option 'bit'; did you mean bits\?"),
        (recipe_with("trial.round: {bits: 4}\n  where: []"), r"step 2, trial.round: where is \[\]; give a pattern"),
        (recipe_with("trial.round: {}\n  where: [3]"), r"where is \[3\]"),
        (recipe_with("trial.round: {}\n  where: '!a'"), r"where only takes away; begin with '\*'"),
        (recipe_with("trial.round: {}\n  where: 'a.{1-2'"), r"step 2, pattern 'a.\{1-2': a brace is not closed"),
        (recipe_with("trial.round: {}\n  where: 'a.{2-1}'"), r"the range 2-1 holds nothing"),
    ],
)
def test_a_mistake_is_named_in_one_line_with_its_place(text, words):
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.parse(text, source="r.yaml")
    assert "\n" not in str(caught.value)


def test_a_pattern_without_effect_is_an_error_that_offers_the_nearest():
    recipe = Recipe.parse(recipe_with("trial.round: {}\n  where: 'model.layers.99.mlp.up_proj'"), source="r.yaml")
    with pytest.raises(RecipeError, match=r"r.yaml step 2, trial.round: where .* selects none of the model's 37 maps; "
                                          r"near it are model.layers.9.mlp.up_proj"):  # fmt: skip
        recipe.selected(MAPS)
    recipe = Recipe.parse(recipe_with("trial.round: {}\n  where: ['*', '!role:ffn.dwn']"))
    with pytest.raises(RecipeError, match=r"near it are role:ffn.down"):
        recipe.selected(MAPS)


def test_files_are_written_read_and_refused_by_name(tmp_path):
    recipe = Recipe.parse(TEXT)
    recipe.write(tmp_path / "recipe.yaml", comment="from a test")
    assert (tmp_path / "recipe.yaml").read_text().startswith("# from a test\npennyweight: 1\n")
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(RecipeError, match=r"none.yaml: cannot be read \(No such file or directory\)"):
        Recipe.read(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.read(tmp_path / "binary")
    (tmp_path / "huge").write_bytes(b" " * 10_000_001)
    with pytest.raises(RecipeError, match="too many for a recipe"):
        Recipe.read(tmp_path / "huge")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file stands where a directory is needed"):
        recipe.write(tmp_path / "file" / "recipe.yaml")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["pennyweight", "steps", "where", "trial.round", "bits", "x"]) | LEAVES, inner
        )
    ),
    max_leaves=12,
)
WORDS = (
    "pennyweight: 1\n|steps:\n|- trial.round: |{bits: 4|}|\n|  where: |[|]|!!int |-|!!timestamp |!!set |!!omap |&a |*a"
)
PIECES = st.lists(
    st.sampled_from([*WORDS.split("|"), "? ", "|", "'", '"', "{0-", "<<: ", "= ", "\t", "0b", "1:2"]), max_size=12
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60) | PIECES.map("".join) | TREES.map(lambda tree: yaml.safe_dump(tree)) | TREES.map(
    lambda tree: yaml.safe_dump({"pennyweight": 1, "steps": [{"trial.round": {"bits": tree}, "where": tree}, tree]})
))  # fmt: skip
@example("pennyweight: !!int ''")
@example("pennyweight: !!timestamp x")
@example("? [a]\n: b")
@example("<<: 3")
def test_any_text_is_a_recipe_or_an_error_in_one_line(text):
    try:
        recipe = Recipe.parse(text)
    except UserError as error:
        message = str(error)
    else:
        message = ""
        assert Recipe.parse(recipe.text()) == recipe
    assert message.splitlines() in ([], [message])
