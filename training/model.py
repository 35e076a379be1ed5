"""The pocket model's shape, and its weights as a GGUF file that llama.cpp's gemma4 loader takes.

Geometry rules of that loader (src/models/gemma4.cpp): row lengths are multiples of the quantisation block (32 for
Q8_0); `tokenizer.ggml.merges` must exist; norms are stored raw. Proportional RoPE with a quarter of the
dimensions is expressed by `rope_freqs`: 1 for those that turn, 1e30 for those that do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from transformers.models.gemma4 import Gemma4ForCausalLM, Gemma4TextConfig

from training import vocabulary

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, WIDTH, FEED_FORWARD, HEADS, HEAD, PER_LAYER, WINDOW, CONTEXT = 6, 256, 640, 4, 64, 32, 512, 4096
QUARTER_ROPE = 0.25


def config(vocabulary_size: int) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        vocab_size=vocabulary_size,
        vocab_size_per_layer_input=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD,
        global_head_dim=HEAD,
        hidden_size_per_layer_input=PER_LAYER,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": QUARTER_ROPE, "rope_theta": 1e6},
        },
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        use_double_wide_mlp=False,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


GLOBAL = {
    "embed_tokens": "token_embd",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
    "norm": "output_norm",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_per_layer_input_norm": "post_norm",
}


def save(model: Gemma4ForCausalLM, path: Path, tokens: list[str], merges: list[str]) -> None:
    """Write `model` as a Q8_0 GGUF file."""
    writer = gguf.GGUFWriter(path, "gemma4")
    _hyperparameters(writer)
    vocabulary.write(writer, tokens, merges)
    state = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    for name, target in GLOBAL.items():
        _tensor(writer, f"{target}.weight", state[f"{name}.weight"])
    turning = int(HEAD * QUARTER_ROPE / 2)
    frequencies = np.full(HEAD // 2, 1e30, np.float32)
    frequencies[:turning] = 1
    writer.add_tensor("rope_freqs.weight", frequencies)
    for i in range(LAYERS):
        for name, target in LAYER.items():
            _tensor(writer, f"blk.{i}.{target}.weight", state[f"layers.{i}.{name}.weight"])
        scale = state[f"layers.{i}.layer_scalar"].float().cpu().numpy().reshape(1)
        writer.add_tensor(f"blk.{i}.layer_output_scale.weight", scale)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(model: Gemma4ForCausalLM, path: Path) -> None:
    """Read the weights of a file that `save` wrote back into `model`, as exact as Q8_0 has kept them."""
    read = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    names = {f"{name}.weight": f"{target}.weight" for name, target in GLOBAL.items()}
    for i in range(LAYERS):
        names |= {f"layers.{i}.{name}.weight": f"blk.{i}.{target}.weight" for name, target in LAYER.items()}
        names[f"layers.{i}.layer_scalar"] = f"blk.{i}.layer_output_scale.weight"
    state = model.state_dict()
    for name, target in names.items():
        kept = state[f"model.{name}"]
        kept.copy_(torch.from_numpy(read[target].copy()).reshape(kept.shape))


def _hyperparameters(writer: gguf.GGUFWriter) -> None:
    writer.add_name("agentd pocket")
    writer.add_description("A stand-in for tests and demos: knows only agentd's bundled tools.")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_key_length_swa(HEAD)
    writer.add_value_length_swa(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_dimension_count_swa(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_float32("gemma4.rope.freq_base_swa", 1e4)
    writer.add_sliding_window(WINDOW)
    writer.add_sliding_window_pattern([i % 2 == 0 for i in range(LAYERS)])
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(PER_LAYER)
    writer.add_final_logit_softcapping(30.0)


def _tensor(writer: gguf.GGUFWriter, name: str, weight: torch.Tensor) -> None:
    array = weight.detach().float().cpu().numpy()
    if array.ndim == 2 and array.shape[1] % 32 == 0:
        writer.add_tensor(name, gguf.quants.quantize(array, Q.Q8_0), raw_dtype=Q.Q8_0)
    else:
        writer.add_tensor(name, array)
