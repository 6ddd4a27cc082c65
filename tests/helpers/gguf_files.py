"""GGUF files of a tiny Llama, as llama.cpp writes them."""

from pathlib import Path

import gguf
import torch
from conftest import SHAPE, tiny_model
from transformers.convert_slow_tokenizer import bytes_to_unicode


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A q or k matrix in llama.cpp's row order: the two halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    dtype: torch.dtype,
    arch: str = "llama",
    head: torch.Tensor | None = None,
    without="",
):
    """Writes a tiny Llama as llama.cpp would, matrices in `dtype`, and returns the model that it
    was made from."""
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_rope_dimension_count(SHAPE["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(SHAPE["vocab_size"])
    alphabet = bytes_to_unicode()
    tokens = ["<|endoftext|>", "th", "in", *(alphabet[i] for i in range(3, 128))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 127)
    writer.add_token_merges(["t h", "i n"])  # older readers take a list of one for a string
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        weight = tensor.float()
        if name == "lm_head.weight" and head is not None:
            weight = head
        if "q_proj" in name or "k_proj" in name:
            weight = interleave(
                weight, SHAPE["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        stored = weight.to(dtype if weight.dim() > 1 else torch.float32)
        if name != without:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
