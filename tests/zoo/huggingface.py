"""Models of `transformers` at random initialization, from configurations alone: nothing is fetched.

The library is imported where a model is built, because that takes a second and most tests need none of it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]

SMALL: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def library() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


def gpt2() -> nn.Module:
    t = library()
    config = t.GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return t.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def llama() -> nn.Module:
    t = library()
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=1))  # type: ignore[no-any-return]


def bert() -> nn.Module:
    t = library()
    return t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3))  # type: ignore[no-any-return]


def vit() -> nn.Module:
    t = library()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.ViTForImageClassification(t.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))  # type: ignore[no-any-return]


def t5() -> nn.Module:
    t = library()
    config = t.T5Config(
        vocab_size=17, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]


def mixtral(experts: str) -> nn.Module:
    """Experts as stacked weights: a loop over those that are hit ("eager"), or one product in groups."""
    t = library()
    config = t.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, experts_implementation=experts
    )
    return t.MixtralForCausalLM(config)  # type: ignore[no-any-return]


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 17, (4, 9)), "use_cache": False}


def masked_tokens() -> dict[str, Any]:
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, 17, (4, 9)), "attention_mask": mask}


def two_sequences() -> dict[str, Any]:
    inputs, outputs = torch.randint(3, 17, (3, 7)), torch.randint(3, 17, (3, 5))
    return {"input_ids": inputs, "decoder_input_ids": outputs, "use_cache": False}


def logits_alone(output: Any) -> Tensor:
    return (output.logits - 1.0).square().mean()  # type: ignore[no-any-return]


EXPERTS = {"*.experts.gate_up_proj": "MixtralExperts.forward cannot be traced"}

SPECIMENS = (
    Specimen("GPT-2", "transformers", gpt2, tokens, logits_alone),
    Specimen("Llama", "transformers", llama, tokens, logits_alone),
    Specimen("BERT", "transformers", bert, masked_tokens, logits_alone),
    Specimen("ViT", "transformers", vit, lambda: {"pixel_values": torch.randn(3, 3, 8, 8)}, logits_alone),
    Specimen("T5", "transformers", t5, two_sequences, logits_alone),
    Specimen(
        "Mixtral",
        "transformers",
        lambda: mixtral("eager"),
        tokens,
        logits_alone,
        exempt="fused",
        declined=EXPERTS,
    ),
    Specimen(
        "Mixtral, grouped_mm",
        "transformers",
        lambda: mixtral("grouped_mm"),
        tokens,
        logits_alone,
        exempt="fused",
        dtype=torch.float32,
        declined=EXPERTS,
    ),
)
