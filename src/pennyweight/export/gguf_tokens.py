"""A tokenizer as the metadata of a GGUF file; the inverse of `pennyweight.model.gguf_tokenizer`.

Byte-level BPE whose way of splitting text has a name there. What is written is read back and compared on text before
anything goes to disk: a tokenizer that is nearly right would spoil the model without a word.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from pennyweight.errors import ModelError
from pennyweight.model import gguf_tokenizer
from pennyweight.model.model import Model

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of the specification
_TEXTS = (
    "", " ", "the year 1984", "  two  spaces ", "tab\tand\nline\n\n\n", "we'll, I'M; don't \u201cquote\u201d",
    "gr\u00f6\u00dfe, na\u00efve e\u0301 \u65e5\u672c\u8a9e \U0001f642", "if x == 12345:\n    return y  # 3.14159\r\n",
    "https://a.b/c?d=e&f[0]=1/3", "\u00a0\u0660\u0661 \u00bd x\u00b2 \t \n  end ",
)  # fmt: skip


def metadata(model: Model, rows: int) -> dict[str, Any]:
    """The ``tokenizer.*`` metadata of ``model``, whose embedding has ``rows`` rows.

    Raises:
        ModelError: a tokenizer that they cannot say exactly.
    """
    given: Any = model.tokenizer
    if given is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    where, remedy = f"{model.name}: its tokenizer", "set model.tokenizer to None to write the weights alone"
    backend = getattr(given, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{where} is no fast one, which GGUF needs; {remedy}")
    state = json.loads(backend.to_str())
    bpe = state["model"]
    splitting = next((name for name in gguf_tokenizer._SPLITTING if _same(name, state)), None)
    if bpe["type"] != "BPE" or splitting is None:
        raise ModelError(
            f"{where} ({bpe['type']}) splits text in none of the ways that GGUF names and Pennyweight writes "
            f"({', '.join(gguf_tokenizer._SPLITTING)}); {remedy}"
        )
    names = {index: token for token, index in given.get_vocab().items()}
    if max(names) >= rows:
        raise ModelError(f"{where} has token {max(names)}, its embedding {rows} rows; {remedy}")
    added = given.added_tokens_decoder
    kinds = [
        (_CONTROL if added[i].special else _USER_DEFINED) if i in added else _NORMAL if i in names else _UNUSED
        for i in range(rows)
    ]
    first = given("a")["input_ids"][:1]
    said: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(rows)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]],
        "tokenizer.ggml.add_bos_token": given.bos_token_id is not None and first == [given.bos_token_id],
    }
    for key, name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        index = getattr(given, f"{name}_token_id")
        if index is not None:
            said[f"tokenizer.ggml.{key}_token_id"] = int(index)
    if isinstance(given.chat_template, str):
        said["tokenizer.chat_template"] = given.chat_template
    read: Any = SimpleNamespace(metadata=said, path=model.name)
    rebuilt = gguf_tokenizer.tokenizer(read)
    for text in (*_TEXTS, *(f"a {token.content} b{token.content}c" for token in added.values())):
        if rebuilt(text)["input_ids"] != given(text)["input_ids"]:
            raise ModelError(f"{where} cannot be said exactly in GGUF: {text!r} comes back otherwise; {remedy}")
    return said


def _same(splitting: str, state: dict[str, Any]) -> bool:
    """Whether the tokenizer with ``state`` works as the reader's of the kind ``splitting``."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = gguf_tokenizer._SPLITTING[splitting]()
    bpe, normal = state["model"], state["normalizer"]
    plain = not any(bpe.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return (
        plain
        and not bpe.get("byte_fallback")
        and bool(bpe.get("ignore_merges")) == (splitting == "llama-bpe")
        and (normal or {}).get("type") == ("NFC" if splitting == "qwen2" else None)
        and _bare(json.loads(made.to_str())["pre_tokenizer"]) == _bare(state["pre_tokenizer"])
    )


def _bare(state: Any) -> Any:
    """``state`` without what says nothing about ids."""
    if isinstance(state, dict):
        return {key: _bare(value) for key, value in state.items() if key != "trim_offsets"}
    return [_bare(item) for item in state] if isinstance(state, list) else state
