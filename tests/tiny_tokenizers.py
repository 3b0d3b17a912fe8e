"""Small real tokenizers for tests: byte-level BPE with chat templates, and one that writes blanks as ▁."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
# Leaves the thoughts of earlier answers out, as several reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LINES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response: user assistant system what is two and three the answer is five",
    "How do I reset my PIN? Open Settings, choose Security and follow the steps.\n\nHello there. Be kind.\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


def chatml(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """ChatML, like SmolLM2 and Qwen: no BOS, <|im_end|> ends a turn."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().to_str()),
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def llama(template: str | None = LLAMA) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before every text by itself, and a template that writes it too."""
    backend = Tokenizer.from_str(byte_level().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def bare() -> PreTrainedTokenizerFast:
    """A base model's: no chat template, no BOS, <|endoftext|> ends a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().to_str()), eos_token="<|endoftext|>"
    )


@cache
def blank_prefix_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    alphabet = sorted(set("".join(LINES)) | set("▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 3, trainer)
    return tokenizer


def blank_prefix() -> PreTrainedTokenizerFast:
    """Like SentencePiece: puts a blank (▁) before every text it is given."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(blank_prefix_backend().to_str()),
        unk_token="<unk>",
        eos_token="</s>",
    )
