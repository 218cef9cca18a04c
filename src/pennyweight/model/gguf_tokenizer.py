"""The tokenizer in a GGUF file, rebuilt as a ``transformers`` fast tokenizer.

Two kinds: byte-level BPE with merges ("gpt2"), whose way of splitting text is known by name, and SentencePiece BPE
("llama"), whose merges follow from the scores. Any other kind is refused: a tokenizer that is nearly right spoils every
figure measured with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pennyweight.errors import ModelError
from pennyweight.model.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # token types of the specification
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_SPLITTING: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split_by(_LLAMA3),
    "qwen2": lambda: _split_by(_QWEN2),
}


def tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describes.

    Raises:
        ModelError: none is there, or of a kind that cannot be rebuilt exactly.
    """
    tokens = _list(file, "tokens", str)
    kinds = _list(file, "token_type", int) if "tokenizer.ggml.token_type" in file.metadata else [1] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens)} tokens, {len(set(tokens))} different, {len(kinds)} token types")
    model = file.metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer model {model!r}; read are gpt2 and llama")
    try:
        rebuilt = _byte_level(file, tokens) if model == "gpt2" else _sentencepiece(file, tokens)
        rebuilt.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
        )
        rebuilt.add_tokens(
            [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
        )
        special = _special_tokens(file, tokens)
        # files without the flag: SentencePiece vocabularies begin a text with one, byte-level ones do not
        if file.metadata.get("tokenizer.ggml.add_bos_token", model == "llama") and "bos_token" in special:
            rebuilt.post_processor = _begin_with(special["bos_token"], tokens)
    except ModelError:
        raise
    except Exception as error:  # the Rust side raises the bare class
        raise ModelError(f"{file.path}: its merges do not fit its vocabulary ({error})") from error
    length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    chat = file.metadata.get("tokenizer.chat_template")
    make: Any = PreTrainedTokenizerFast  # untyped
    found: PreTrainedTokenizerFast = make(
        tokenizer_object=rebuilt,
        clean_up_tokenization_spaces=False,
        model_max_length=length if isinstance(length, int) else 10**9,
        **special,
        **({"chat_template": chat} if isinstance(chat, str) else {}),
    )
    return found


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    splitting = file.metadata.get("tokenizer.ggml.pre")
    if splitting not in _SPLITTING:
        raise ModelError(f"{file.path}: pre-tokenizer {splitting!r}; read are {', '.join(_SPLITTING)}")
    merges: list[Any] = [tuple(merge.split(" ", 1)) for merge in _list(file, "merges", str)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting == "llama-bpe"))
    made.pre_tokenizer = _SPLITTING[splitting]()
    if splitting == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """BPE whose next merge is always the pair that makes the token of the highest score."""
    scores = _list(file, "scores", float)
    if len(scores) != len(tokens):
        raise ModelError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens")
    known = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[float, int, tuple[str, str]]] = []
    for token, index in known.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                pairs.append((-scores[index], index, (left, right)))
    pairs.sort(key=lambda pair: pair[:2])
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
    made = Tokenizer(
        BPE(
            known,
            [pair for _, _, pair in pairs],
            unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        steps.append(decoders.Strip(" ", 1, 0))
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence(steps)
    return made


def _begin_with(first: str, tokens: list[str]) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{first}:0 $A:0",
        pair=f"{first}:0 $A:0 {first}:1 $B:1",
        special_tokens=[(first, tokens.index(first))],
    )


def _special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, key in keys.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            found[name] = tokens[index]
    return found


def _list(file: GgufFile, key: str, kind: type) -> list[Any]:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
        raise ModelError(f"{file.path}: its tokenizer has no list of {key}; nothing can be rebuilt without it")
    return value
