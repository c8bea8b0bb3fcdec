"""Generate answers: greedily, in batches of similar length. A prefix that all prompts share is computed once.

How sure the model was of an answer is recorded while it generates. The answer does not change.

Shapes: B rows of a batch, K new tokens, V vocabulary, U distinct first tokens of the labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from deal_core.base_model.language_model import LanguageModel, device_of
from deal_core.base_model.turn_ends import stop_ids, tokens_before_end
from deal_core.data.collate import can_be_continued, common_prefix, counts_padding, pad_batch, read_cache
from deal_core.data.prompts import answer_text, encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema, label_key
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.batches import in_batches, rows_with_logits

OnProgress = Callable[[int], None]
"""Called with the number of rows just read or answered."""
OnCount = Callable[[int, int], None]
"""Called with the number of rows read or answered so far, and the number of all."""


def counting(on_progress: OnCount, total: int, done: int = 0) -> OnProgress:
    """Return an `OnProgress` that reports how many of `total` rows are done so far, if `done` are at first."""

    def report(num_rows: int) -> None:
        nonlocal done
        done += num_rows
        on_progress(done, total)

    return report


class Confidence(NamedTuple):
    """How sure a model was of one answer, 0 to 1. The numbers are not calibrated."""

    confidence: float
    """Task with labels: the share of the answer's label among the labels' first tokens, at the first answer token. An
    answer that is no label has the largest share. Labels with the same first token share one number. Free text: the
    mean probability of the answer's tokens, with its end token."""
    label_mass: float | None
    """Probability of all labels' first tokens together, at the first answer token; None: the task has no labels."""


class ConfidenceRecorder(LogitsProcessor):
    """Looks at the scores of each new token in greedy generation, and returns them unchanged.

    It has to be the last processor, so that the largest score is that of the chosen token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: TaskSchema) -> None:
        first = first_tokens(tokenizer, task)
        self._tokens = sorted(set(first.values()))
        self._place = {label: self._tokens.index(token) for label, token in first.items()}
        self._stops = stop_ids(tokenizer)
        self.begin()

    def begin(self) -> None:
        """Forget the batch before."""
        self._log_probs_BU: Tensor | None = None
        self._chosen_B: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record one step; scores has shape (B, V)."""
        del input_ids
        if not self._tokens:
            self._chosen_B.append((scores.amax(-1).float() - scores.float().logsumexp(-1)).exp())
        elif self._log_probs_BU is None:
            tokens = torch.tensor(self._tokens, device=scores.device)
            self._log_probs_BU = scores[:, tokens].float() - scores.float().logsumexp(-1, keepdim=True)
        return scores

    def confidences(self, tokens: Sequence[Sequence[int]], answers: Sequence[str]) -> list[Confidence]:
        """Return the confidence of every row of the batch, from its new tokens and its answer as text."""
        if not self._tokens:
            chosen = torch.stack(self._chosen_B, 1).tolist()
            return [self._of_text(shares, new) for shares, new in zip(chosen, tokens, strict=True)]
        assert self._log_probs_BU is not None
        shares = self._log_probs_BU.softmax(-1).tolist()
        masses = self._log_probs_BU.exp().sum(-1).tolist()
        return [
            Confidence(
                _share(row[self._place[key]] if (key := label_key(answer)) in self._place else max(row)), _share(mass)
            )
            for row, mass, answer in zip(shares, masses, answers, strict=True)
        ]

    def _of_text(self, shares: Sequence[float], new: Sequence[int]) -> Confidence:
        num_tokens = tokens_before_end(new, self._stops)
        own = shares[: len(new) if num_tokens is None else num_tokens + 1]
        return Confidence(_share(math.fsum(own) / len(own)), None)


def first_tokens(tokenizer: PreTrainedTokenizerBase, task: TaskSchema) -> dict[str, int]:
    """Return the first token of an answer with each label, by the label's key; empty for a task without labels."""
    # the first token does not depend on the limit, which must only leave room for the end token
    return {label_key(label): encode_answer(tokenizer, task, label, 2)[0] for label in task.labels}


def confidence_of(
    first: Mapping[str, int], answer: str, log_probs: Sequence[float], first_top: Mapping[int, float]
) -> Confidence:
    """Return the confidence of an answer as `ConfidenceRecorder` does, from what an engine says of its tokens.

    Args:
        first: What `first_tokens` returns.
        answer: The answer.
        log_probs: Log-probability of each of its tokens, with the end token.
        first_top: At its first token, log-probabilities by token. A label's token that is not there counts as 0.
    """
    if not first:
        return Confidence(_share(math.fsum(map(math.exp, log_probs)) / max(1, len(log_probs))), None)
    masses = {token: math.exp(first_top[token]) for token in {*first.values()} if token in first_top}
    label_mass = math.fsum(masses.values())
    own = masses.get(first[key], 0.0) if (key := label_key(answer)) in first else max(masses.values(), default=0.0)
    return Confidence(_share(own / label_mass if label_mass else 0.0), _share(label_mass))


def _share(value: float) -> float:
    """A number from 0 to 1. A damaged model's NaN is 0."""
    return 0.0 if math.isnan(value) else min(1.0, max(0.0, value))


class GivenAnswer(NamedTuple):
    """One answer, and how sure the model was of it."""

    text: str
    confidence: Confidence
    is_cut: bool
    """Whether the answer reached its longest length before its end."""
    num_tokens: int = 0
    """Its tokens, with the end token; 0: not counted."""


def answer_inputs(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    inputs: Sequence[str],
    on_progress: OnProgress | None = None,
) -> list[GivenAnswer]:
    """Generate one greedy answer per input with its confidence, in the inputs' order.

    A prompt of more than `task.max_prompt_tokens` loses the end of its text.
    """
    prompts = [encode_prompt(tokenizer, task.schema, text, task.max_prompt_tokens) for text in inputs]
    return answer_prompts(model, tokenizer, task, prompts, on_progress)


@torch.inference_mode()
def answer_prompts(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    prompts: Sequence[Sequence[int]],
    on_progress: OnProgress | None = None,
) -> list[GivenAnswer]:
    """Generate one greedy answer per prompt (token ids) with its confidence, in the prompts' order."""
    answers: dict[int, GivenAnswer] = {}
    limit = answer_limit(tokenizer, task.schema, task.max_new_tokens)
    recorder, stops = ConfidenceRecorder(tokenizer, task.schema), stop_ids(tokenizer)
    for batch, tokens, _ in generate(model, tokenizer, prompts, limit, recorder=recorder):
        lengths = [tokens_before_end(new, stops) for new in tokens]
        own = [new[:length] for new, length in zip(tokens, lengths, strict=True)]
        texts = [text.strip() for text in tokenizer.batch_decode(own, skip_special_tokens=True)]
        is_cut = [length is None for length in lengths]
        counts = [len(new) if length is None else length + 1 for new, length in zip(tokens, lengths, strict=True)]
        of_batch = map(GivenAnswer, texts, recorder.confidences(tokens, texts), is_cut, counts)
        answers.update(zip(batch, of_batch, strict=True))
        if on_progress is not None:
            on_progress(len(batch))
    return [answers[place] for place in range(len(prompts))]


class Generated(NamedTuple):
    """The answers to a batch of prompts."""

    batch: list[int]
    """Numbers of the prompts."""
    tokens: list[list[int]]
    """New tokens of each prompt; an end token and padding may follow the answer."""
    logits_BKV: Tensor | None
    """The logits of each new token, if they were requested."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    with_logits: bool = False,
    recorder: ConfidenceRecorder | None = None,
) -> Iterator[Generated]:
    """Continue prompts (token ids) greedily, in batches of similar length. A prefix that all share is computed once.

    With `with_logits` the logits are kept: they take 8·V bytes per new token of a batch (two fp32 copies), within
    the limit of `rows_with_logits`. `recorder` sees the scores of each new token; it holds those of the batch that was
    yielded last. The model is in evaluation mode afterwards.
    """
    model.eval()
    prefix = read_prefix(model, prompts)
    is_seq2seq, device = model.config.is_encoder_decoder, device_of(model)
    pad, side = int(tokenizer.pad_token_id or 0), "right" if is_seq2seq else "left"

    def read(batch: list[int]) -> Generated:
        if recorder is not None:
            recorder.begin()
        input_ids, mask = pad_batch([prompts[i][prefix.length :] for i in batch], pad, side=side)
        # an index tensor instead of generate's default number: see answer_logits
        more: dict[str, Any] = {} if is_seq2seq else {"logits_to_keep": torch.tensor([-1], device=device)}
        if prefix.cache is not None:  # generate reads whole rows, and skips what the cache holds
            shared = torch.tensor([prompts[0][: prefix.length]]).expand(len(batch), -1)
            input_ids, mask = torch.cat([shared, input_ids], 1), torch.cat([torch.ones_like(shared), mask], 1)
            more["cache"] = prefix.repeated(len(batch))
        output = cast(GenerationMixin, model).generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop_ids(tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([] if recorder is None else [recorder]),
            output_logits=with_logits,
            return_dict_in_generate=True,
            **more,
        )
        assert isinstance(output, (GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput))
        tokens: list[list[int]] = output.sequences[:, 1 if is_seq2seq else input_ids.shape[1] :].tolist()
        return Generated(batch, tokens, None if output.logits is None else torch.stack(output.logits, dim=1))

    max_rows = rows_with_logits(model, max_new_tokens, num_bytes=8) if with_logits else None
    for _, generated in in_batches(model, [len(prompt) for prompt in prompts], read, max_rows=max_rows):
        yield generated


@torch.inference_mode()
def first_answer_logits(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, task: TaskSchema, text: str, *, max_prompt_tokens: int
) -> Tensor:
    """Logits of the first answer token, shape (vocabulary,), as fp32."""
    model.eval()
    input_ids = torch.tensor([encode_prompt(tokenizer, task, text, max_prompt_tokens)], device=device_of(model))
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]], device=input_ids.device)
        logits: Tensor = model(input_ids=input_ids, decoder_input_ids=start).logits
    else:
        logits = model(input_ids=input_ids, logits_to_keep=1).logits  # with one row, a number causes no copy
    return logits[0, -1].float()


def answer_limit(tokenizer: PreTrainedTokenizerBase, task: TaskSchema, max_new_tokens: int) -> int:
    """Most new tokens of an answer: for a labelled task, one token more than its longest label.

    The extra token shows whether an answer ends after the label. If it is white space, the answer counts as ended.
    """
    if not task.labels:
        return max_new_tokens
    texts = [answer_text(task, label) for label in task.labels]
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return min(max_new_tokens, longest + 1)


class Prefix(NamedTuple):
    """Length of the prefix that all prompts share, with its keys and values; length 0 if nothing is shared."""

    length: int
    cache: Cache | None

    def repeated(self, num_rows: int) -> Cache | None:
        """Return a copy of the cache for several rows."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(num_rows)
        return cache


def read_prefix(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Prefix:
    """Compute the prefix that all prompts share, such as a task's instruction and options."""
    shared = 0 if model.config.is_encoder_decoder or counts_padding(model) else common_prefix(prompts)
    cache = read_cache(model, torch.tensor([prompts[0][:shared]], device=device_of(model))) if shared else None
    return Prefix(shared, cache) if can_be_continued(cache) else Prefix(0, None)
