"""Generation from the caches of a model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wmkernels.checks import shown


@dataclass
class InferenceParams:
    """What blocks keep between calls.

    Attributes:
        max_seqlen: of a sequence.
        max_batch_size: rows.
        seqlen_offset: tokens before the next call; 0 starts anew.
        key_value_memory_dict: states by ``layer_idx``.
        lengths_per_sample: tokens per row.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """For new sequences."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class Generated:
    """Token numbers (batch, length), and the logits of each new token if asked for."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Token numbers (batch,) of ``logits`` (batch, vocabulary).

    Args:
        logits: unnormalised log-probabilities.
        top_k: sample among the most likely; 1 takes the most likely, 0 samples among all.
        top_p: then among the most likely that have this probability together; 0 or 1 for all.
        min_p: with ``top_k`` of 0, then among those at least this share of the greatest probability.
        temperature: divides the logits.
    """
    if top_k == 1:
        return logits.argmax(-1)
    values, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), -1)  # most likely first
    probabilities = (values / temperature).softmax(-1)
    if min_p > 0 and not top_k:
        probabilities = probabilities.masked_fill(probabilities < min_p * probabilities[:, :1], 0)
    if 0 < top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return tokens.gather(-1, probabilities.multinomial(1)).squeeze(-1)


def penalise_repetition(logits: Tensor, previous: Tensor, repetition_penalty: float) -> Tensor:
    """The logits, those of ``previous`` tokens (batch, length) lowered (Keskar et al. 2019, arXiv 1909.05858)."""
    score = logits.gather(1, previous)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter(1, previous, score)


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> Generated:
    """Appends tokens until ``max_length``, or until all rows have ``eos_token_id``.

    Args:
        input_ids: (batch, time), the same length for all.
        model: with ``inference_params`` and ``num_last_tokens``, as ``MambaLMHeadModel``.
        max_length: of prompt and new tokens.
        top_k: as the next three, of ``sample``.
        top_p: likewise.
        min_p: likewise.
        temperature: likewise.
        repetition_penalty: divides positive logits of tokens that were there.
        eos_token_id: end of a sequence.
        teacher_outputs: (batch, time), taken instead of samples as far as it reaches.
        vocab_size: tokens that may be sampled; None for all.
        cg: False; there are no CUDA graphs.
        enable_timing: False; nothing is timed.
        output_scores: also return the logits.
        streamer: its ``put`` gets the prompt and each token, on the CPU; ``end`` is called last.

    Raises:
        ValueError: ``cg`` or ``enable_timing``.
    """
    for name, value in (("cg", cg), ("enable_timing", enable_timing)):
        if value:
            raise ValueError(
                f"decode: {name} is {shown(value)}, expected False: there are no CUDA graphs and no timing"
            )
    params = InferenceParams(max_seqlen=max_length, max_batch_size=input_ids.shape[0])
    sequences, scores, newest = input_ids, [], input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while sequences.shape[1] < max_length or params.seqlen_offset == 0:
        logits = model(newest, inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]
        scores.append(logits)
        params.seqlen_offset += newest.shape[1]
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            token = teacher_outputs[:, params.seqlen_offset]
        else:
            if repetition_penalty != 1.0:
                logits = penalise_repetition(logits, sequences, repetition_penalty)
            token = sample(logits, top_k, top_p, min_p, temperature)
        newest = token[:, None]
        sequences = torch.cat([sequences, newest], 1)
        if streamer is not None:
            streamer.put(newest.cpu())
        if eos_token_id is not None and bool((token == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    return Generated(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Adds ``generate``."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | Generated:
        """Token numbers (batch, length), or ``Generated``; arguments as of ``decode``."""
        found: Generated = decode(
            input_ids, self, max_length, top_k, top_p, min_p, temperature, output_scores=output_scores, **kwargs
        )
        return found if return_dict_in_generate else found.sequences
