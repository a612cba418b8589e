"""A language model of a million parameters, made from scratch in a second: tests, notebooks and smoke recipes train it.

Its vocabulary is single characters, so any text in ``ALPHABET`` survives encoding and decoding unchanged. It has learnt nothing.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET = string.digits + string.ascii_letters + " +-*/=?:.,<>()\n"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def digits_model(folder: Path) -> None:
    """Save a random Llama (4 layers, width 128, fp32) and its character tokenizer as a Hugging Face folder.

    The weights are the same every time. A character outside ``ALPHABET`` becomes ``<unk>``.
    """
    import torch  # heavy, so not at the top: model.path is checked without it
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,  # like most small models: the embedding is also the head, and is sent to engines once
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _character_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [PAD, EOS, UNKNOWN, *ALPHABET]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")  # "." would skip the newline
    characters.decoder = decoders.Fuse()  # join without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
