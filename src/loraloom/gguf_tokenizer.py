"""The tokenizer of a GGUF file, as the `tokenizers` library has it.

A GGUF file holds the vocabulary and the merges, but of the rule that cuts text into words only a name
(`tokenizer.ggml.pre`). The wrong rule gives other token ids for the same text and no error, so a name that is
not in the table here is refused.

source  llama.cpp's src/llama-vocab.cpp (names and rules), checked against the models' own tokenizer.json
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import UserError
from .gguf_model import GgufFile

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = "digits"  # every digit alone, then GPT-2's rule
GPT2 = "gpt2"

# tokenizer.ggml.pre: the rule
RULES = {
    **dict.fromkeys(("gpt-2", "phi-2"), GPT2),
    **dict.fromkeys(("smollm", "refact", "command-r", "starcoder", "codeshell"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    "tekken": TEKKEN,
}
WHOLE_WORDS_FIRST = (LLAMA3, TEKKEN)  # a word that is a token is not merged from its parts
CONTROL, USER_DEFINED = 3, 4  # token types


def build_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its settings for transformers (special tokens, chat template, context length).

    raises  UserError if the kind of tokenizer or its word rule is unknown
    """
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{file.path} has no tokenizer", hint="give --tokenizer FOLDER of the original model")
    kind = file.fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = sentencepiece(file, tokens)
    else:
        raise UserError(
            f"{file.path}: its tokenizer is of the kind {kind!r}; we can rebuild gpt2 and llama",
            hint="give --tokenizer FOLDER of the original model",
        )
    add_whole_tokens(tokenizer, file, tokens)
    special = special_tokens(file, tokens)
    add_bos(tokenizer, file, special)
    settings: dict[str, Any] = dict(special)
    settings["model_max_length"] = file.need("context_length")
    settings["clean_up_tokenization_spaces"] = False
    if template := file.fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return tokenizer, settings


def byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE: GPT-2, Llama 3, Qwen, SmolLM."""
    name = file.fields.get("tokenizer.ggml.pre")
    if name not in RULES:
        said = f"the unknown word rule {name!r}" if name else "no word rule"
        raise UserError(
            f"{file.path}: its tokenizer names {said} (tokenizer.ggml.pre); a guess could change every id",
            details=[f"known: {', '.join(RULES)}"],
            hint="give --tokenizer FOLDER of the original model",
        )
    rule = RULES[name]
    merges = [tuple(merge.split(" ")) for merge in file.fields.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(model)
    if rule == GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
        if rule != DIGITS:
            split = pre_tokenizers.Split(Regex(rule), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule == DIGITS)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if rule == QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE with byte fallback: Llama 2, Mistral. The file has scores and no merges."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = file.fields.get("tokenizer.ggml.scores")
    if not scores:
        raise UserError(f"{file.path}: tokenizer.ggml.scores is missing; the file is broken")
    merges = []
    for index, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], left, right, token[:cut], token[cut:]))
    merges.sort()
    unknown = tokens[file.fields.get("tokenizer.ggml.unknown_token_id", 0)]
    pairs = [(left, right) for *_, left, right in merges]
    model = models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def add_whole_tokens(tokenizer: Tokenizer, file: GgufFile, tokens: list[str]) -> None:
    """Control and user-defined tokens are matched whole in a text; only control tokens count as special."""
    types = file.fields.get("tokenizer.ggml.token_type") or []
    whole = [(token, kind) for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
    added = [AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in whole]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def special_tokens(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those that the file names."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: file.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    wrong = {name: index for name, index in found.items() if index is not None and index >= len(tokens)}
    if wrong:
        raise UserError(f"{file.path}: special tokens outside the vocabulary: {wrong}; the file is broken")
    return {f"{name}_token": tokens[index] for name, index in found.items() if index is not None}


def add_bos(tokenizer: Tokenizer, file: GgufFile, special: dict[str, str]) -> None:
    """Put the begin token before every text, where the file says so (SentencePiece: unless it says no)."""
    spm = file.fields.get("tokenizer.ggml.model") == "llama"
    token = special.get("bos_token")
    if token and file.fields.get("tokenizer.ggml.add_bos_token", spm):
        identity = tokenizer.token_to_id(token)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, identity)]
        )
