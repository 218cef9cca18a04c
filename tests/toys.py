"""Toy models that are whole: weights, configuration and tokenizer in a directory, and text to go with them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pennyweight.job import Settings

#: Little enough text that a fit of a toy takes seconds.
QUICK = Settings(length=48, statistics=6, gradients=4, check=4, heldout=6)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0], pad_token=letters[0])


def llama(directory: Path, **options: object) -> Path:
    """A Llama with two blocks and sharp opinions, in ``directory``."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2,
    } | options  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(directory)  # type: ignore[arg-type]
    tokenizer().save_pretrained(directory)
    return directory


def bert(directory: Path) -> Path:
    """A BERT encoder with two blocks, in ``directory``."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def documents(count: int = 24, words: int = 900) -> list[str]:
    """Made-up text in which some words are common and most are rare."""
    g = random.Random(0)
    vocabulary = ["".join(g.choice("etaoinshrdlu") for _ in range(g.randint(2, 8))) for _ in range(200)]
    weights = [1 / (1 + rank) for rank in range(200)]
    return [" ".join(g.choices(vocabulary, weights, k=words)) for _ in range(count)]


def text_file(directory: Path) -> Path:
    """The documents in a file, a blank line between them."""
    path = directory / "text.txt"
    path.write_text("\n\n".join(documents()), encoding="utf-8")
    return path
