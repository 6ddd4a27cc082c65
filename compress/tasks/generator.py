"""Continuations of the same prompts through the packed cache and through an unquantised one."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from kvfold.compress.tasks.task import Prompt, cut_at
from kvfold.errors import KvfoldError
from kvfold.runtime.load import plain_cache

CacheName = Literal["16bit", "packed"]
# columns of longer prompts that go through the model at a time: bounds masks and activations
PREFILL_CHUNK = 4096
BATCH_TOKENS = (
    1 << 18
)  # columns of a batch, answers included, so that long prompts come in smaller batches


class StopTexts(StoppingCriteria):
    """Ends a row once one of the texts stands in what is new in it.

    transformers' own `stop_strings` needs a vocabulary whose pieces join into text, which not every
    tokenizer has.

    Args:
        tokenizer: decodes.
        stops: the texts.
        prompt_tokens: columns of the prompt.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> None:
        self.tokenizer, self.stops, self.prompt_tokens = tokenizer, tuple(stops), prompt_tokens
        self.tail = (
            max(map(len, stops)) + 1
        )  # tokens: none but parts of one character decode to nothing
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool)
        tails = input_ids[:, max(self.prompt_tokens, input_ids.shape[1] - self.tail) :].tolist()
        texts = self.tokenizer.batch_decode(tails)
        self.done |= torch.tensor([any(stop in text for stop in self.stops) for text in texts])
        return self.done.to(input_ids.device)


class PairedGenerator:
    """Continues batches of prompts with either cache: same tokens, same padding, same steps.

    Args:
        model: from load_pretrained.
        tokenizer: the artifact's.
        temperature: of sampling from the whole vocabulary; 0 for greedy text.
        seed: of sampling, with the batch's first prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 0.0, seed: int = 0) -> None:
        self.model, self.tokenizer, self.temperature, self.seed = (
            model,
            tokenizer,
            temperature,
            seed,
        )
        ends = model.generation_config.eos_token_id
        found = {
            *(ends if isinstance(ends, list) else [ends]),
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        }
        self.ends = sorted(i for i in found if i is not None)
        self.pad = next(
            (
                i
                for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.ends)
                if i is not None
            ),
            0,
        )

    def generate(
        self,
        prompts: Sequence[Prompt],
        cache: CacheName,
        max_new_tokens: int,
        stops: Sequence[str] = (),
    ) -> list[tuple[str, int]]:
        """(text, number of new tokens) for each prompt, up to an end-of-text token or a stop.

        Args:
            cache: "packed", or "16bit" for transformers' own cache in the type that the model
                computes in.
            stops: texts that end a continuation and are not part of it.
        Raises:
            KvfoldError: the device has not enough memory.
        """
        longest = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, longest - len(prompt.ids) :] = 1
        if self.temperature:
            # both caches draw alike, and part only where probabilities do
            name = f"{self.seed} {prompts[0].id}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
        try:
            out = self._continue(ids, mask, cache, max_new_tokens, stops)
        except torch.OutOfMemoryError as error:
            raise KvfoldError(
                f"{len(prompts)} prompts of up to {longest} tokens need more memory than {self.model.device} has; "
                "give a smaller --batch-size, and --resume to keep what is done."
            ) from error
        return [self._text(row[longest:], stops) for row in out.tolist()]

    def _continue(
        self, ids: Tensor, mask: Tensor, cache: CacheName, max_new_tokens: int, stops: Sequence[str]
    ) -> Tensor:
        place, longest = self.model.device, ids.shape[1]
        # the model's own generation config may ask for sampling or a repetition penalty
        config = GenerationConfig(
            do_sample=self.temperature > 0,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=self.temperature or 1.0,
            top_p=1.0,
            top_k=0 if self.temperature else 50,
            no_repeat_ngram_size=0,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.ends or None,
            prefill_chunk_size=PREFILL_CHUNK if longest > PREFILL_CHUNK else None,
        )
        criteria = StoppingCriteriaList(
            [StopTexts(self.tokenizer, stops, longest)] if stops else []
        )
        inputs = {"input_ids": ids.to(place), "attention_mask": mask.to(place)}
        with torch.inference_mode():
            if cache == "packed":
                return self.model.generate(
                    **inputs, generation_config=config, stopping_criteria=criteria
                )
            plain = DynamicCache(config=self.model.config)
            with plain_cache(self.model):
                return self.model.generate(
                    **inputs,
                    generation_config=config,
                    stopping_criteria=criteria,
                    past_key_values=plain,
                )

    def _text(self, new: list[int], stops: Sequence[str]) -> tuple[str, int]:
        count = next(
            (i for i, token in enumerate(new) if token in self.ends or token == self.pad), len(new)
        )
        return cut_at(self.tokenizer.decode(new[:count], skip_special_tokens=True), stops), count


def batches_of(prompts: Sequence[Prompt], batch_size: int, new_tokens: int) -> list[list[Prompt]]:
    """Prompts of like length together: at most `batch_size`, and at most BATCH_TOKENS columns
    unless one alone passes them."""
    batches: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda p: (len(p.ids), p.id)):
        columns = len(prompt.ids) + new_tokens
        if (
            batches
            and len(batches[-1]) < batch_size
            and (len(batches[-1]) + 1) * columns <= BATCH_TOKENS
        ):
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches
