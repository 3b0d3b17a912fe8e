"""The groups of a run's settings: the base, the data, the training, and what is measured meanwhile.

Each field has its default and the words that `--help` and the docs show. raises  ValidationError of pydantic for a key
that a group does not have, or a value out of bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A group of settings; a key that it does not have is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    """The frozen base."""

    id: str = Field(description="a folder with a transformers model, or a Hugging Face id")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="the base's number format; auto: bfloat16 on hardware that computes in it, else float32",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto: the first GPU, else the CPU")
    attention: Literal["auto", "varlen", "sdpa", "eager"] = Field(
        "auto",
        description="varlen: each document by itself, by the fastest kernel for its length; sdpa and eager are "
        "transformers' own; auto: varlen on a GPU where the model can, else sdpa",
    )
    allow_pickle: bool = Field(
        False, description="read .bin weights, which can run code when loaded; safetensors cannot"
    )
    quantize: Literal["none", "nf4", "fp4", "e2m1", "fp8"] = Field(
        "none",
        description="keep the linear layers in 4 bits: nf4 (QLoRA), fp4 (bitsandbytes' table) or e2m1 (the OCP "
        "format), or in 8: fp8 (e4m3); embeddings, head and norms stay as dtype says",
    )
    fp8: bool | Auto = Field(
        "auto",
        description="multiply with quantised weights in 8-bit floats, forward and backward; auto: where the GPU "
        "has the instructions",
    )
    double_quant: bool = Field(True, description="keep the scales of 4-bit blocks in 8 bits")
    quant_block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights that share a scale in 4 bits"
    )

    @model_validator(mode="after")
    def blocks_are_of_4_bits(self) -> ModelConfig:
        if self.quantize == "fp8" and self.quant_block != 64:
            raise ValueError("quant_block is for 4 bits: fp8 has one scale an output channel")
        return self


class Source(Section):
    """One data set among several."""

    path: str = Field(description="a file, or hf:ID of a Hugging Face data set")
    split: str = Field("train", description="the split of a Hugging Face data set, also train[:1000]")
    repeat: Positive = Field(1, description="how many times its rows stand in one epoch")


class DataConfig(Section):
    """What is trained on."""

    train: list[Source] = Field(description="a file, hf:ID, or a list of {path, split, repeat}")
    eval: str | Annotated[float, Field(ge=0)] = Field(
        0.05, description="the validation set: a share of the rows, a number of rows, or a file; 0 for none"
    )
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"] = Field(
        "auto", description="the shape of the rows; auto: seen from their fields"
    )
    map: dict[str, str] = Field(
        {},
        description="our field: your column, such as prompt: question; for labels the fields are text, pair, label",
    )
    labels: Literal["auto", "classes", "numbers"] = Field(
        "auto",
        description="for labels: classes, or numbers to come close to; auto: numbers where a label has a fraction",
    )
    prompt: Literal["auto", "chat", "alpaca", "plain"] = Field(
        "auto",
        description="how a prompt is written: the tokenizer's chat template, Alpaca's style, or as it is; "
        "auto: chat if the tokenizer has a template, else alpaca for Alpaca rows, else plain",
    )
    system: str | None = Field(None, description="a system message for rows that bring none")
    loss_on: Literal["completion", "last_turn", "all"] = Field(
        "completion", description="which tokens carry loss: every answer, only the last answer, or all tokens"
    )
    max_length: Positive | Auto = Field(
        "auto", description="tokens per example; auto: the 99.5th percentile, at most what the model takes"
    )
    too_long: Literal["drop", "error", "truncate", "split"] = Field(
        "drop", description="what to do with examples over max_length"
    )
    max_lost: Fraction = Field(
        0.05,
        description="stop if a larger share of the rows is dropped or cut; raise it to go on all the same",
    )
    packing: bool = Field(True, description="several examples share a row, and do not see each other")
    encoding: str = Field("auto", description="of text files; auto: utf-8, or what the byte order mark says")
    limit: Positive | None = Field(None, description="use only the first so many rows")
    duplicates: Literal["drop", "keep"] = Field("drop", description="rows that stand in the set twice")

    @model_validator(mode="before")
    @classmethod
    def one_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "train" in value:
            train = value["train"]
            train = train if isinstance(train, list) else [train]
            return {**value, "train": [{"path": item} if isinstance(item, str) else item for item in train]}
        return value


class TrainConfig(Section):
    """How it is trained."""

    epochs: Annotated[float, Field(gt=0)] = Field(1, description="passes over the training set")
    max_steps: Positive | None = Field(None, description="optimizer steps, whatever `epochs` says")
    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="of the first parameter group; auto: the method's own default"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup: Annotated[float, Field(ge=0)] = Field(
        0.03, description="steps of linear warm-up; below 1 a share of all steps"
    )
    batch_size: Positive | None = Field(
        None, description="examples per optimizer step (16 if neither is set)"
    )
    batch_tokens: Positive | None = Field(
        None, description="tokens per optimizer step, instead of batch_size"
    )
    micro_tokens: Positive | Literal["auto", "fit"] = Field(
        "auto",
        description="tokens per forward pass; changes memory and speed, not the result; auto: 2,048 on a CPU, 8,192 "
        "on a GPU, 16,384 where usual steps are longer than 8,192, train.recompute=auto predicts that 16,384 take at "
        "most 90 % of the GPU with nothing computed again, and the method does not start from batches; fit: the most "
        "that `loraloom plan` says the GPU holds",
    )
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = Field(
        "adamw", description="adamw8bit keeps AdamW's moments in 8 bits"
    )
    paged: bool = Field(
        False, description="keep AdamW's moments in the host's memory and copy them to the GPU piece by piece"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="on matrices, not on vectors")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="of AdamW")
    momentum: Fraction = Field(0.9, description="of SGD")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="clipping; null: none")
    recompute: Literal["auto", "none", "gate_up", "full", "offload"] = Field(
        "auto",
        description="what the backward pass computes again, for less memory: nothing, the MLP's inner width, whole "
        "layers, or whole layers with their inputs kept on the host; auto: the least that fits the GPU",
    )
    fast: bool | Auto = Field(
        "auto", description="fused decoder layers where the model has Llama-like ones; auto: on a GPU"
    )
    compile: bool = Field(False, description="torch.compile for the decoder layers that are not fused")
    graphs: bool | Auto = Field(
        "auto",
        description="replay passes as one CUDA graph each; auto: of up to 2,048 tokens, or of 8,192 where nothing "
        "need be added to them, and where the run allows it",
    )
    seed: int = Field(0, description="of the initial adapter, the order of the data and dropout")
    save_every: Positive | None = Field(None, description="steps between checkpoints; null: by save_minutes")
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(10, description="minutes between checkpoints")
    keep: Positive = Field(2, description="how many checkpoints are kept")
    early_stop: Positive | None = Field(
        3, description="stop after so many evaluations without a better loss; null: never"
    )

    @model_validator(mode="after")
    def one_batch(self) -> TrainConfig:
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens are two ways to say one thing: set one of them")
        return self


class EvalConfig(Section):
    """What is measured while training."""

    every: Positive | Auto = Field("auto", description="steps between evaluations; auto: ten in a run")
    prompts: list[str] = Field(
        [], description="prompts to answer at each evaluation; empty: three held-out ones"
    )
    max_new_tokens: Positive = Field(64, description="length of an answer")
    best: Literal["auto", "loss", "accuracy", "f1", "matthews", "pearson", "spearman"] = Field(
        "auto",
        description="what the best adapter is best in, on the held-out rows; auto: the loss, for labels the accuracy, "
        "or Pearson's correlation for numbers, or the metric of the GLUE task",
    )
