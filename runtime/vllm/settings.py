"""From the model that vLLM is asked for to the settings that an artifact needs, and what is
refused."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import architecture_of
from kvfold.exports.files import INDEX
from kvfold.exports.reader import Artifact, is_artifact, read_artifact
from kvfold.exports.schema import METADATA_NAME
from kvfold.pretrained import config_from_pretrained
from kvfold.runtime.load import resolve_artifact
from kvfold.runtime.vllm.blocks import BlockLayout, block_layout
from kvfold.runtime.vllm.families import SERVED

log = logging.getLogger("kvfold")

KEY = "kvfold"  # in vLLM's additional_config, which every process gets: the artifact's folder
STEP_TOKENS = (
    2048  # of a step, unless asked for: until it is over, a chunk's rows are all in 16 bits
)
# of 16-bit tokens on a GPU, where one launch stores the step's rows and packs pages of older ones
LEAST_WINDOW = 2


@dataclass(frozen=True)
class Refusal:
    """Something that vLLM can be asked for and that is not right over a packed cache.

    Attributes:
        name: what the sentence calls it.
        option: of the command line.
    """

    name: str
    option: str


REFUSED = {  # field of vLLM's configuration, and what it says where it is not asked for
    ("parallel_config", "pipeline_parallel_size", 1): Refusal("Pipeline parallelism", "--pipeline-parallel-size"),
    ("parallel_config", "decode_context_parallel_size", 1): Refusal(
        "Decode context parallelism", "--decode-context-parallel-size"),
    ("parallel_config", "prefill_context_parallel_size", 1): Refusal(
        "Prefill context parallelism", "--prefill-context-parallel-size"),
    ("parallel_config", "enable_dbo", False): Refusal("Dual batch overlap", "--enable-dbo"),
    ("", "kv_transfer_config", None): Refusal("A KV connector", "--kv-transfer-config or --kv-offloading-size"),
    ("scheduler_config", "disable_hybrid_kv_cache_manager", False): Refusal(
        "A single KV cache group", "--disable-hybrid-kv-cache-manager"),
    ("", "lora_config", None): Refusal("LoRA", "--enable-lora"),
}  # fmt: skip


def find_artifact(model: str, revision: str | None, **hub: Any) -> Path | None:
    """The folder of the artifact that a model's name stands for; None for any other model, and for
    what can't be reached, which vLLM has its own words for.

    Args:
        model: a folder or a Hub id.
        hub: `token` and `cache_dir` of huggingface_hub.
    Raises:
        KvfoldError: the Hub has the artifact, but it can't be downloaded whole.
    """
    if Path(model).exists():
        return Path(model) if is_artifact(Path(model)) else None
    try:
        hf_hub_download(model, METADATA_NAME, revision=revision, **hub)
    except Exception:  # no such file, repository, name, network: a dozen kinds
        return None
    return resolve_artifact(model, revision, **hub)


def layout_of(artifact: Artifact, block_tokens: int | None) -> BlockLayout:
    """Where an artifact's caches lie in blocks of so many tokens; see `block_layout`."""
    return block_layout(artifact.geometry, artifact.formats, block_tokens)


def prepare(args: Any, folder: Path) -> Artifact:
    """Checks an artifact and changes vLLM's EngineArgs, before vLLM makes its configuration of
    them.

    Raises:
        KvfoldError: the artifact is damaged, or an argument is not for a packed cache.
    """
    artifact = read_artifact(folder)
    check_model(artifact)
    if not (folder / INDEX).is_file():
        raise KvfoldError(
            f"'{folder}' lacks {INDEX}, without which vLLM takes kv_cache.safetensors for weights; "
            f"run `kvfold validate --fix '{folder}'`."
        )
    if args.kv_cache_dtype != "auto":
        raise KvfoldError(
            f"--kv-cache-dtype {args.kv_cache_dtype} is not for an artifact, whose formats are its own; leave it out."
        )
    if args.attention_backend is not None or args.attention_config.backend is not None:
        raise KvfoldError(
            "--attention-backend is not for an artifact, whose packed cache one backend reads; leave it out."
        )
    args.block_size = layout_of(artifact, args.block_size).block_tokens
    if args.max_num_batched_tokens is None and args.enable_chunked_prefill is not False:
        args.max_num_batched_tokens = max(STEP_TOKENS, args.max_num_seqs or 0)
    args.additional_config = {**(args.additional_config or {}), KEY: str(folder.resolve())}
    if not Path(args.model).is_dir():  # of the Hub: what is served is what was checked
        args.served_model_name = args.served_model_name or args.model
        args.model = str(folder)
    return artifact


def check_model(artifact: Artifact) -> None:
    """Refuses models whose other parts vLLM computes and nobody has compared.

    Raises:
        KvfoldError: naming the family.
    """
    family = architecture_of(config_from_pretrained(artifact.path))
    if family.tower or family.model_type not in SERVED:
        kind = ", a model of images and text," if family.tower else ""
        raise KvfoldError(
            f"'{artifact.path}' is of the family '{family.model_type}'{kind} which was not compared under vLLM; "
            "generate with kvfold.runtime.load_pretrained, or serve one of docs/serving.md."
        )


def check_config(config: Any, artifact: Artifact) -> None:
    """Refuses a configuration that vLLM has made for an artifact.

    Raises:
        KvfoldError: what is not right over a packed cache, by name.
    """
    for (part, field, usual), refusal in REFUSED.items():
        value = getattr(getattr(config, part) if part else config, field)
        if value != usual:
            raise KvfoldError(
                f"{refusal.name} is not supported with a packed cache; leave out {refusal.option}."
            )
    window = artifact.geometry.window
    if config.device_config.device_type == "cuda" and window < LEAST_WINDOW:
        raise KvfoldError(
            f"This artifact has a window of {window} tokens, but on a GPU requests that share a block need one of at "
            f"least {LEAST_WINDOW}; compress the model with a larger window."
        )
    ranks, heads = config.parallel_config.tensor_parallel_size, artifact.geometry.num_kv_heads
    if heads % ranks and ranks % heads:
        raise KvfoldError(
            f"--tensor-parallel-size {ranks} divides the {heads} KV heads of this model into no equal parts; give a "
            f"divisor or a multiple of {heads}."
        )
    fused, served = artifact.metadata.provenance.fused_dtype, config.model_config.dtype
    if fused == "float32" and served != torch.float32:
        log.warning(
            "weights with a basis folded in are stored as float32, and rounded to %s they cost "
            "quality; --dtype float32 keeps them",
            served,
        )
    drafts = drafted(config)
    method = config.speculative_config.method if config.speculative_config else "ngram"
    if method != "ngram":
        raise KvfoldError(
            f"Speculation by '{method}' is not supported with a packed cache; use method ngram, or leave out "
            "--speculative-config."
        )
    if drafts > artifact.geometry.window:
        raise KvfoldError(
            f"num_speculative_tokens is {drafts}, but drafts must fit in the window, which has "
            f"{artifact.geometry.window} tokens in this artifact; give a smaller number."
        )


def drafted(config: Any) -> int:
    """The most tokens that a step of a request may draft."""
    speculative = config.speculative_config
    return speculative.num_speculative_tokens or 0 if speculative else 0


def folder_of(config: Any) -> str | None:
    """The folder of the artifact that a configuration is for; None for any other model."""
    settings = config.additional_config
    return settings.get(KEY) if isinstance(settings, dict) else None
