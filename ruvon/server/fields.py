"""Request fields of OpenAI, vLLM, SGLang, llama.cpp and others that ruvon does not serve.

What would change the answer is refused by name, what changes nothing is reported and passed over.
docs/reference/api.md lists both; a test compares.
"""

from __future__ import annotations

from collections.abc import Mapping

EMPTY: tuple[object, ...] = (None, "", [], {})  # values that ask for nothing, whatever the field

UNSERVED: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "audio": (),
    "function_call": ("none",),
    "functions": (),
    "modalities": (["text"],),
    "moderation": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),  # of completions; a chat serves it
    "tools": (),  # likewise
    "web_search_options": (),
    # constraints on the answer, as all call them
    "format": (),
    "grammar_lazy": (False,),
    "grammar_triggers": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    # drawing
    "adaptive_decay": (),
    "adaptive_target": (-1, -1.0),
    "best_of": (1,),  # of a chat; completions serve it
    "custom_logit_processor": (),
    "custom_params": (),
    "do_sample": (True,),
    "dry_allowed_length": (),
    "dry_base": (),
    "dry_multiplier": (0, 0.0),
    "dry_penalty_last_n": (),
    "dry_sequence_breakers": (),
    "dynatemp_exponent": (),
    "dynatemp_range": (0, 0.0),
    "generation_config": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "min_keep": (0,),
    "mirostat": (0,),
    "mirostat_eta": (),
    "mirostat_tau": (),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "options": (),
    "penalize_nl": (False,),
    "repeat_last_n": (-1,),
    "repetition_detection": (),
    "repetition_ngram_size": (0,),
    "repetition_ngram_threshold": (0,),
    "samplers": (),
    "tfs_z": (1, 1.0),
    "top_n_sigma": (-1, -1.0),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "watermark": (False,),
    "xtc_probability": (0, 0.0),
    "xtc_threshold": (),
    # another model, prompt or length
    "adapter_id": (),
    "add_special_tokens": (False,),  # of a chat; completions serve it
    "chat_template": (),
    "context": (),
    "documents": (),  # of completions; a chat serves it
    "images": (),
    "input_extra": (),
    "input_prefix": (),
    "input_suffix": (),
    "lora": (),
    "lora_path": (),
    "lora_request": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "n_indent": (0,),
    "n_keep": (0,),
    "prompt_embeds": (),
    "raw": (False,),
    "session_params": (),
    "stop_regex": (),
    "system": (),
    "t_max_predict_ms": (-1, 0),
    "t_max_prompt_ms": (-1, 0),
    "template": (),
    "truncate": (),
    # another form of the answer
    "decoder_input_details": (False,),
    "details": (False,),
    "logprob_token_ids": (),  # of responses; completions and chats serve it
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "response_fields": (),
    "return_full_text": (False,),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_tokens": (False,),
    "stream_interval": (1,),
    "stream_reasoning": (True,),
    "timings_per_token": (False,),
    "top_n_tokens": (0,),
    # served under another name
    "think": (),
    "max_length": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
    "n_predict": (-1,),
    "no_stop_trim": (False,),
    "num_predict": (-1,),
    "repeat_penalty": (1, 1.0),
    "typical": (1, 1.0),
}
"""Fields that would change the answer but are not served: name → values that ask for nothing."""

INSTEAD: Mapping[str, str] = {
    "functions": "tools",
    "timings_per_token": "timings",
    "function_call": "tool_choice",
    "think": "enable_thinking",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "return_tokens": "return_token_ids",
    "typical": "typical_p",
}
"""The field of ours that says the same."""

HARMLESS = frozenset(
    {
        "cache_prompt", "client_metadata", "extra_key", "id_slot", "keep_alive",
        "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "rid", "safety_identifier",
        "service_tier", "session_id", "spaces_between_special_tokens", "store",
        "stream_options.include_obfuscation", "text.verbosity", "user", "verbosity",
    }
)  # fmt: skip
"""Fields of known clients that have no effect here: reported, and accepted even when strict."""

ECHOED = frozenset({"annotations", "index", "parsed", "parsed_arguments"})
"""What an answer holds besides, or an SDK adds to it, when it goes back as a message."""
