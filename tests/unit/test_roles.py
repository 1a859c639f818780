"""Roles of tensors: real names of many models, and agreement with the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.errors import RecipeError
from merging.roles import Role, describe_tensor, touch_filter

GPT2 = {"model_type": "gpt2"}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8}
NO_CONFIG: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("name", "shape", "kind", "layer", "is_linear"),
    [
        # Llama, Qwen, Mistral, Gemma
        ("model.embed_tokens.weight", (256, 64), "embedding", -1, False),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "attention.q", 0, True),
        ("model.layers.1.self_attn.k_proj.weight", (32, 64), "attention.k", 1, True),
        ("model.layers.10.self_attn.v_proj.weight", (32, 64), "attention.v", 10, True),
        ("model.layers.3.self_attn.o_proj.weight", (64, 64), "attention.o", 3, True),
        ("model.layers.3.self_attn.q_proj.bias", (64,), "bias", 3, False),
        ("model.layers.3.self_attn.q_norm.weight", (16,), "norm", 3, False),
        ("model.layers.3.self_attn.rotary_emb.inv_freq", (8,), "position", 3, False),
        ("model.layers.3.mlp.gate_proj.weight", (128, 64), "mlp.gate", 3, True),
        ("model.layers.3.mlp.up_proj.weight", (128, 64), "mlp.up", 3, True),
        ("model.layers.3.mlp.down_proj.weight", (64, 128), "mlp.down", 3, True),
        ("model.layers.3.input_layernorm.weight", (64,), "norm", 3, False),
        ("model.layers.3.pre_feedforward_layernorm.weight", (64,), "norm", 3, False),
        ("model.norm.weight", (64,), "norm", -1, False),
        ("lm_head.weight", (256, 64), "head", -1, False),
        ("score.weight", (2, 64), "head", -1, False),
        # Cohere's norm of queries is a matrix
        ("model.layers.0.self_attn.q_norm.weight", (4, 16), "norm", 0, False),
        # Llama in Meta's own names
        ("tok_embeddings.weight", (256, 64), "embedding", -1, False),
        ("layers.7.attention.wq.weight", (64, 64), "attention.q", 7, True),
        ("layers.7.attention.wo.weight", (64, 64), "attention.o", 7, True),
        ("layers.7.feed_forward.w2.weight", (64, 128), "mlp.down", 7, True),
        ("output.weight", (256, 64), "head", -1, False),
        # Phi-3, Phi-2, Falcon, GPT-J, MPT, OPT
        ("model.layers.0.self_attn.qkv_proj.weight", (192, 64), "attention.qkv", 0, True),
        ("model.layers.0.mlp.gate_up_proj.weight", (256, 64), "mlp.gate_up", 0, True),
        ("model.layers.0.self_attn.dense.weight", (64, 64), "attention.o", 0, True),
        ("model.layers.0.mlp.fc1.weight", (256, 64), "mlp.fc_in", 0, True),
        ("transformer.word_embeddings.weight", (256, 64), "embedding", -1, False),
        (
            "transformer.h.2.self_attention.query_key_value.weight",
            (192, 64),
            "attention.qkv",
            2,
            True,
        ),
        ("transformer.h.2.mlp.fc_in.weight", (256, 64), "mlp.fc_in", 2, True),
        ("transformer.blocks.5.attn.Wqkv.weight", (192, 64), "attention.qkv", 5, True),
        ("model.decoder.layers.4.fc2.weight", (64, 256), "mlp.fc_out", 4, True),
        ("model.decoder.embed_positions.weight", (130, 64), "position", -1, False),
        # Mixtral, by expert and fused; Qwen-MoE and DeepSeek
        (
            "model.layers.0.block_sparse_moe.experts.7.w1.weight",
            (128, 64),
            "mlp.experts.gate",
            0,
            True,
        ),
        (
            "model.layers.0.block_sparse_moe.experts.7.w2.weight",
            (64, 128),
            "mlp.experts.down",
            0,
            True,
        ),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), "router", 0, False),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 256, 64), "mlp.experts.gate_up", 0, False),
        ("model.layers.0.mlp.experts.down_proj", (8, 64, 128), "mlp.experts.down", 0, False),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 256), "bias", 0, False),
        (
            "model.layers.9.block_sparse_moe.input_linear.weight",
            (8, 256, 64),
            "mlp.experts.gate_up",
            9,
            False,
        ),
        ("model.layers.0.mlp.gate.weight", (8, 64), "router", 0, False),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), "bias", 0, False),
        ("model.layers.0.mlp.router.weight", (8, 64), "router", 0, False),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), "router", 0, False),
        (
            "model.layers.0.mlp.shared_expert.up_proj.weight",
            (128, 64),
            "mlp.shared_experts.up",
            0,
            True,
        ),
        (
            "model.layers.0.mlp.shared_experts.down_proj.weight",
            (64, 128),
            "mlp.shared_experts.down",
            0,
            True,
        ),
        ("model.layers.0.self_attn.q_a_proj.weight", (24, 64), "attention.q_a", 0, True),
        (
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            (24, 64),
            "attention.kv_a",
            0,
            True,
        ),
        ("model.layers.0.self_attn.q_a_layernorm.weight", (24,), "norm", 0, False),
        ("model.layers.61.eh_proj.weight", (64, 128), "other", 61, True),
        ("model.layers.61.shared_head.head.weight", (256, 64), "head", 61, False),
        ("model.layers.0.self_attn.q_a_proj.weight_scale_inv", (1, 1), "attention.other", 0, False),
        # Mamba
        ("backbone.layers.0.mixer.conv1d.weight", (128, 1, 4), "conv", 0, False),
        ("backbone.layers.0.mixer.A_log", (128, 16), "other", 0, False),
        ("backbone.layers.0.mixer.in_proj.weight", (256, 64), "other", 0, True),
        # GPT-NeoX
        ("gpt_neox.embed_in.weight", (256, 64), "embedding", -1, False),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (192, 64), "attention.qkv", 0, True),
        ("gpt_neox.layers.0.attention.dense.weight", (64, 64), "attention.o", 0, True),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", (256, 64), "mlp.fc_in", 0, True),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", (64, 256), "mlp.fc_out", 0, True),
        ("embed_out.weight", (256, 64), "head", -1, False),
        # BERT, RoBERTa, DistilBERT, DeBERTa
        ("bert.embeddings.word_embeddings.weight", (256, 64), "embedding", -1, False),
        ("bert.embeddings.token_type_embeddings.weight", (2, 64), "embedding", -1, False),
        ("roberta.embeddings.position_embeddings.weight", (130, 64), "position", -1, False),
        ("bert.embeddings.LayerNorm.gamma", (64,), "norm", -1, False),
        ("bert.encoder.layer.1.attention.self.query.weight", (64, 64), "attention.q", 1, True),
        ("bert.encoder.layer.1.attention.output.dense.weight", (64, 64), "attention.o", 1, True),
        ("bert.encoder.layer.1.attention.output.LayerNorm.weight", (64,), "norm", 1, False),
        ("bert.encoder.layer.1.intermediate.dense.weight", (128, 64), "mlp.fc_in", 1, True),
        ("bert.encoder.layer.1.output.dense.weight", (64, 128), "mlp.fc_out", 1, True),
        ("bert.pooler.dense.weight", (64, 64), "other", -1, True),
        ("cls.predictions.transform.dense.weight", (64, 64), "head", -1, False),
        ("cls.predictions.transform.LayerNorm.weight", (64,), "norm", -1, False),
        ("classifier.dense.weight", (64, 64), "head", -1, False),
        ("qa_outputs.weight", (2, 64), "head", -1, False),
        ("distilbert.transformer.layer.0.attention.out_lin.weight", (64, 64), "attention.o", 0, 1),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", (128, 64), "mlp.fc_in", 0, True),
        ("pre_classifier.weight", (64, 64), "head", -1, False),
        ("deberta.encoder.rel_embeddings.weight", (128, 64), "position", -1, False),
        ("deberta.encoder.layer.0.attention.self.pos_key_proj.weight", (64, 64),
         "attention.other", 0, True),
        ("albert.encoder.embedding_hidden_mapping_in.weight", (64, 32), "other", -1, True),
        # T5
        ("shared.weight", (256, 64), "embedding", -1, False),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", (64, 64), "attention.q", 2, True),
        ("decoder.block.2.layer.1.EncDecAttention.o.weight", (64, 64), "attention.o", 2, True),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", (128, 64), "mlp.fc_in", 2, True),
        ("encoder.block.2.layer.1.DenseReluDense.wi_0.weight", (128, 64), "mlp.gate", 2, True),
        ("encoder.block.2.layer.1.DenseReluDense.wo.weight", (64, 128), "mlp.fc_out", 2, True),
        ("encoder.block.2.layer.1.layer_norm.weight", (64,), "norm", 2, False),
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (32, 4),
            "position",
            0,
            False,
        ),
        # ViT, Swin
        ("vit.embeddings.cls_token", (1, 1, 64), "other", -1, False),
        ("vit.embeddings.position_embeddings", (1, 17, 64), "position", -1, False),
        ("vit.embeddings.patch_embeddings.projection.weight", (64, 3, 4, 4), "conv", -1, False),
        (
            "vit.encoder.layer.3.attention.attention.key.weight",
            (64, 64),
            "attention.k",
            3,
            True,
        ),
        ("vit.encoder.layer.3.layernorm_before.weight", (64,), "norm", 3, False),
        ("blocks.3.attn.proj.weight", (64, 64), "attention.o", 3, True),
        ("head.weight", (1000, 64), "head", -1, False),
        (
            "swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table",
            (169, 4),
            "position",
            1,
            False,
        ),
        # CLIP of transformers and of OpenCLIP
        ("vision_model.pre_layrnorm.weight", (64,), "norm", -1, False),
        ("vision_model.embeddings.class_embedding", (64,), "embedding", -1, False),
        ("vision_model.embeddings.position_embedding.weight", (17, 64), "position", -1, False),
        (
            "text_model.encoder.layers.0.self_attn.out_proj.weight",
            (64, 64),
            "attention.o",
            0,
            True,
        ),
        ("text_model.encoder.layers.0.mlp.fc2.weight", (64, 128), "mlp.fc_out", 0, True),
        ("text_projection.weight", (32, 64), "projection", -1, True),
        ("visual_projection.weight", (32, 64), "projection", -1, True),
        ("logit_scale", (), "other", -1, False),
        ("visual.conv1.weight", (64, 3, 4, 4), "conv", -1, False),
        ("visual.class_embedding", (64,), "embedding", -1, False),
        ("visual.positional_embedding", (17, 64), "position", -1, False),
        ("visual.ln_pre.weight", (64,), "norm", -1, False),
        (
            "visual.transformer.resblocks.11.attn.in_proj_weight",
            (192, 64),
            "attention.qkv",
            11,
            True,
        ),
        ("visual.transformer.resblocks.11.attn.in_proj_bias", (192,), "bias", 11, False),
        (
            "visual.transformer.resblocks.11.attn.out_proj.weight",
            (64, 64),
            "attention.o",
            11,
            True,
        ),
        ("transformer.resblocks.0.mlp.c_fc.weight", (256, 64), "mlp.fc_in", 0, True),
        ("transformer.resblocks.0.mlp.c_proj.weight", (64, 256), "mlp.fc_out", 0, True),
        ("token_embedding.weight", (256, 64), "embedding", -1, False),
        ("ln_final.weight", (64,), "norm", -1, False),
        # vision-language models
        (
            "model.visual.blocks.4.attn.qkv.weight",
            (192, 64),
            "attention.qkv",
            4,
            True,
        ),
        ("model.visual.merger.mlp.2.weight", (64, 256), "mlp.other", -1, True),
        ("model.multi_modal_projector.linear_1.weight", (64, 32), "other", -1, True),
        ("model.language_model.layers.6.mlp.up_proj.weight", (128, 64), "mlp.up", 6, True),
        # nothing to go by
        ("weight", (3, 3), "other", -1, True),
        ("", (), "other", -1, False),
    ],
)  # fmt: skip
def test_real_names(
    name: str, shape: tuple[int, ...], kind: str, layer: int, is_linear: bool
) -> None:
    expected = Role(
        kind, layer, is_linear=bool(is_linear), transposed=False, is_matrix=len(shape) == 2
    )
    assert describe_tensor(name, shape, NO_CONFIG) == expected


def test_gate_is_told_from_router_by_the_number_of_experts() -> None:
    name = "model.layers.0.mlp.gate.weight"
    assert describe_tensor(name, (8, 16), MIXTRAL).kind == "router"
    assert describe_tensor(name, (64, 16), MIXTRAL).kind == "mlp.gate"
    assert describe_tensor(name, (64, 16), NO_CONFIG).kind == "mlp.gate"
    nested = {"text_config": {"num_experts": 64}}
    assert describe_tensor(name, (64, 16), nested).kind == "router"


@pytest.mark.parametrize("part", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
def test_conv1d_is_transposed_only_in_models_that_use_it(part: str) -> None:
    name = f"transformer.h.0.{part}.weight"
    for model_type in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"):
        assert describe_tensor(name, (64, 192), {"model_type": model_type}).transposed
    for config in (NO_CONFIG, {"model_type": "gpt_bigcode"}, {"model_type": "clip"}):
        assert not describe_tensor(name, (192, 64), config).transposed
    assert not describe_tensor(f"transformer.h.0.{part}.bias", (192,), GPT2).transposed
    assert not describe_tensor("transformer.wte.weight", (256, 64), GPT2).transposed
    composed = {"model_type": "vision-encoder-decoder", "decoder": GPT2, "encoder": {}}
    assert describe_tensor(f"decoder.{name}", (64, 192), composed).transposed
    assert not describe_tensor(f"encoder.{name}", (64, 192), composed).transposed


@pytest.mark.parametrize("name", ["visual.proj", "text_projection"])
def test_plain_projections_of_clip_are_linear_and_transposed(name: str) -> None:
    role = describe_tensor(name, (64, 32), NO_CONFIG)
    assert role == Role("projection", -1, is_linear=True, transposed=True, is_matrix=True)


@settings(deadline=None)  # other work on the machine is no fault of ours
@given(
    name=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["layers", "0", "9" * 5000, "²", "mlp", "gate", "experts", "dense",
                         "weight", "output", "attn", "", "moe", "head"]),
        max_size=6,
    ).map(".".join),
    shape=st.lists(st.integers(0, 2**40), max_size=5),
    config=st.dictionaries(
        st.sampled_from(["model_type", "num_experts", "layers", "mlp"]),
        st.none() | st.integers() | st.text(max_size=3) | st.lists(st.none(), max_size=2)
        | st.dictionaries(st.sampled_from(["model_type", "num_experts"]), st.integers()),
    ),
)  # fmt: skip
def test_any_name_has_a_role(name: str, shape: list[int], config: dict[str, Any]) -> None:
    role = describe_tensor(name, shape, config)
    assert role.layer >= -1
    assert role.is_matrix or not role.is_linear
    assert role.is_linear or not role.transposed


Q = "model.layers.0.self_attn.q_proj.weight"
NAMES = {
    Q: (64, 64),
    "model.embed_tokens.weight": (256, 64),
    "model.norm.weight": (64,),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (192, 64),
    "visual.transformer.resblocks.0.attn.in_proj_bias": (192,),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (64, 64),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (256, 64),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": (64, 256),
    "visual.proj": (64, 32),
}


def touched(spec: Any) -> list[str]:
    matches = touch_filter(spec)
    return [
        name for name, shape in NAMES.items() if matches(name, describe_tensor(name, shape, {}))
    ]


def test_presets_touch_what_they_say() -> None:
    names = list(NAMES)
    assert touched("all") == names
    assert touched("linear") == [names[0], names[3], *names[5:]]
    assert touched("matrices") == [names[0], names[1], names[3], *names[5:]]
    assert touched("wudi-vit") == [names[3], *names[5:8]]


def test_expressions_are_searched_for_anywhere_in_the_name() -> None:
    assert touched(["q_proj"]) == [Q]
    assert touched([r"^model\.", r"\.c_fc\."]) == [*list(NAMES)[:3], list(NAMES)[6]]
    assert touched([r"resblocks\.\d+\.attn\..*weight$"]) == [list(NAMES)[3], list(NAMES)[5]]
    assert touched(["nothing"]) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lineer", "touch is 'lineer'; expected all, linear, matrices, wudi-vit, or a list"),
        ("", "touch is ''"),
        ([], "touch lists 0 expressions; 1 to 100 are allowed"),
        (["a"] * 101, "touch lists 101 expressions"),
        ([""], "of 0 characters; 1 to 500 are allowed"),
        (["a" * 501], "of 501 characters; 1 to 500 are allowed"),
        ([5], "touch lists '5', which is not a regular expression"),
        (["q_proj", "("], "touch lists '(', which is not a regular expression that is understood:"
         " unclosed group"),
        (["(?!lm_head)"], "look-around, including look-ahead and look-behind, is not supported"),
        ([r"(a)\1"], "backreferences are not supported"),
        (["a{1000}{1000}{1000}"], "exceeds size limit"),
    ],
)  # fmt: skip
def test_bad_touch_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        touch_filter(spec)
    assert message in caught.value.detail
    assert caught.value.code == "bad_parameter"
    assert caught.value.context == {"field": "touch"}


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b$", "(.*a){20}$", ".*.*.*.*.*.*.*=x"])
def test_expression_that_would_hang_a_backtracking_engine_answers(pattern: str) -> None:
    """With Python's own engine each of these would outlast the test's time limit."""
    role = describe_tensor(Q, (64, 64), {})
    assert not touch_filter([pattern])("a" * 800 + "!", role)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "config_class", "options"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {}),
        ("LlamaForSequenceClassification", "LlamaConfig", {}),
        ("MistralForCausalLM", "MistralConfig", {}),
        ("Qwen2ForCausalLM", "Qwen2Config", {}),
        ("Qwen3ForCausalLM", "Qwen3Config", {}),
        ("Gemma2ForCausalLM", "Gemma2Config", {}),
        ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0}),
        ("PhiForCausalLM", "PhiConfig", {}),
        ("CohereForCausalLM", "CohereConfig", {"use_qk_norm": True}),
        ("FalconForCausalLM", "FalconConfig", {}),
        ("OPTForCausalLM", "OPTConfig", {"word_embed_proj_dim": 64}),
        ("GPT2LMHeadModel", "GPT2Config", {}),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
        ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {}),
        ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", {}),
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
        ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {"num_experts": 4}),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4}),
        ("DeepseekV3ForCausalLM", "DeepseekV3Config", {"n_routed_experts": 8, "n_group": 2}),
        ("BertForMaskedLM", "BertConfig", {}),
        ("BertModel", "BertConfig", {}),
        ("RobertaForSequenceClassification", "RobertaConfig", {}),
        ("DebertaV2ForSequenceClassification", "DebertaV2Config",
         {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("DistilBertForMaskedLM", "DistilBertConfig",
         {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}),
        ("ModernBertForMaskedLM", "ModernBertConfig", {"pad_token_id": 0}),
        ("ViTForImageClassification", "ViTConfig", {}),
        ("Dinov2Model", "Dinov2Config", {}),
        ("T5ForConditionalGeneration", "T5Config",
         {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
          "feed_forward_proj": "gated-gelu"}),
        ("BartForConditionalGeneration", "BartConfig",
         {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2}),
        ("WhisperForConditionalGeneration", "WhisperConfig",
         {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4}),
        ("CLIPModel", "CLIPConfig", {"text_config": {}, "vision_config": {}}),
    ],
)  # fmt: skip
def test_linear_tensors_are_the_linear_modules_of_the_model(
    model_class: str, config_class: str, options: dict[str, Any]
) -> None:
    """Built by transformers on the meta device; heads and routers are modules but not touched."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
    }
    nested = {
        key: sizes | value if isinstance(value, dict) else value for key, value in options.items()
    }
    config = getattr(transformers, config_class)(**({} if "d_model" in options else sizes) | nested)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    modules = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    roles = {
        name: describe_tensor(name, tuple(tensor.shape), config.to_dict())
        for name, tensor in model.state_dict().items()
    }
    linear = {name for name, role in roles.items() if role.is_linear}
    left_out = {name for name in modules if roles[name].kind in ("head", "router")}
    assert linear == modules.keys() - left_out
    assert len(left_out) <= 4
    assert {name for name in linear if roles[name].transposed} == {
        name for name in linear if isinstance(modules[name], Conv1D)
    }
    assert {role.layer for role in roles.values()} <= set(range(-1, 12))
    for name in linear:
        if roles[name].layer >= 0:
            assert roles[name].kind.startswith(("attention.", "mlp.")), name
