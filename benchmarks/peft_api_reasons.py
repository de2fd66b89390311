"""Why a public name of PEFT is different here, or absent. The table's test fails for a name that is not the same and not here."""

_OTHER_METHOD = "a method that is not here; get_peft_config lists those that are, register_method adds one"
_ONE_TUNER = "PEFT has a class per method; here one Tuner serves all, as PeftModel.base_model"
_INITIAL = "an initial value computed from data or from the quantisation error; adapters started so load"
_LORA_OPTION = "refused by name: an adapter that uses it is not loaded as something else"
_ENCODER = "the trained vectors are in fastpeft.layers, beside their method"
_MEMORY = "the base model is loaded by transformers; an adapter's tensors are made where its module is"

ABSENT: dict[str, tuple[str, ...]] = {
    _OTHER_METHOD: (
        "AdamssConfig", "AdaptionPromptConfig", "BeftConfig", "C3AConfig", "CPTConfig", "CartridgeConfig", "DeftConfig",
        "DeloraConfig", "FourierFTConfig", "FrodConfig", "GloraConfig", "GraloraConfig", "HRAConfig", "HiraConfig", "LilyConfig",
        "LoHaConfig", "LoKrConfig", "MissConfig", "OSFConfig", "PeanutConfig", "PolyConfig", "PsoftConfig", "PveraConfig",
        "RandLoraConfig", "RoadConfig", "ShadowConfig", "ShiraConfig", "SupertuningConfig", "TinyLoraConfig",
        "TrainableTokensConfig", "UniLoraConfig", "VBLoRAConfig", "VeraConfig", "WaveFTConfig", "XLoraConfig",
        "CPTEmbedding", "CartridgeEncoder", "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text", "prompt_embeddings_from_past_key_values", "create_arrow_model",
        "find_kappa_target_modules",
    ),
    _ONE_TUNER: (
        "AdaLoraModel", "AdamssModel", "AdaptionPromptModel", "BOFTModel", "BeftModel", "C3AModel", "DeftModel", "DeloraModel",
        "FourierFTModel", "FrodModel", "GloraModel", "GraloraModel", "HRAModel", "HiraModel", "IA3Model", "LNTuningModel",
        "LilyModel", "LoHaModel", "LoKrModel", "LoraModel", "MissModel", "OFTModel", "OSFModel", "PeanutModel", "PolyModel",
        "PsoftModel", "PveraModel", "RandLoraModel", "RoadModel", "ShadowModel", "ShiraModel", "SupertuningModel",
        "TinyLoraModel", "TrainableTokensModel", "UniLoraModel", "VBLoRAModel", "VeraModel", "WaveFTModel", "XLoraModel",
        "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "base_model.get_model_config", "base_model.inject_adapter", "base_model.prefix", "base_model.target_module_mapping",
        "base_model.tuner_layer_cls", "base_model.uses_shared_state", "base_model.subtract_mutated_init",
    ),
    _INITIAL: (
        "LoraGAConfig", "get_eva_state_dict", "preprocess_loraga",
        "corda_config", "lora_ga_config",
    ),
    _LORA_OPTION: (
        "ArrowConfig", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig",
        "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens", "use_qalora",
        "monteclora_config", "layer_replication", "use_bdlora", "arrow_config", "kasa_config",
    ),
    _ENCODER: (
        "PrefixEncoder", "PromptEmbedding", "PromptEncoder", "PromptLearningConfig",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        "bloom_model_postprocess_past_key_value", "shift_tokens_right", "PeftModel.get_prompt",
        "PeftModel.get_prompt_embedding_to_save",
    ),
    "goes with an option that is refused or only sets initial values": ("megatron_core", "qalora_group_size"),
    "offloading while initialising; PEFT does not save it either": ("LoraRuntimeConfig", "runtime_config"),
    "tied modules to save are copied as one where both are named; else a warning says so": ("ensure_weight_tying",),
    "a class variable of the config class; in the file as in PEFT": ("peft_type",),
    "written by PEFT for models without a task type; read over": ("auto_mapping",),
    "the run's versions are in run.json": ("peft_version",),
    "ValueError, TypeError and NotImplementedError with one line; NoTargetError where no module matches": (
        "PeftError", "PeftWarning", "NoMatchingPeftModuleError",
    ),
    "adapters of different methods join one model where they wrap different modules": ("PeftMixedModel",),
    "autocast, or autocast_adapter_dtype, gives float32 adapters over a half-precision base": ("cast_mixed_precision_params",),
    "merge_and_unload().state_dict(), or get_base_model()": ("get_base_model_state_dict", "set_base_model_state_dict"),
    "no conversion of other methods into LoRA": (
        "convert_to_lora", "save_as_lora", "PeftModel.supports_lora_conversion", "base_model.supports_lora_conversion",
    ),
    "get_base_model().dtype": ("PeftModel.base_model_torch_dtype",),
    "no model card is written; run.json and report.html say what a run did": ("PeftModel.create_or_update_model_card",),
    "active_adapters and get_model_status().enabled": ("PeftModel.has_active_enabled_adapter",),
    "peft_config[...].modules_to_save": ("PeftModel.modules_to_save",),
    "prepare_for_training, or gradient_checkpointing_enable": ("PeftModel.prepare_model_for_gradient_checkpointing",),
    "set_adapter(names, inference_mode=...)": ("PeftModel.set_requires_grad", "base_model.set_requires_grad"),
    "PeftModel.add_weighted_adapter, with the same arguments": ("base_model.add_weighted_adapter",),
}  # fmt: skip

DIFFERENT: dict[str, tuple[str, ...]] = {
    "takes a name and options, or PEFT's mapping": ("get_peft_config",),
    "without mixed, revision (a field of the config) and low_cpu_mem_usage: " + _MEMORY: ("get_peft_model",),
    "without low_cpu_mem_usage: " + _MEMORY: ("PeftModel.add_adapter", "inject_adapter_in_model"),
    "without the base model's embeddings, which the adapter does not train; a state_dict is not taken, the model has one": (
        "get_peft_model_state_dict",
    ),
    "other shapes are always an error; missing_keys has the adapter's names alone": ("set_peft_model_state_dict",),
    "copies no weight to float32, and clears no cache": ("prepare_model_for_kbit_training",),
    "a config comes from the folder; " + _MEMORY: ("PeftModel.from_pretrained", "PeftModel.load_adapter"),
    "safetensors only, the adapter alone; PEFT's other arguments are accepted and unused": ("PeftModel.save_pretrained",),
    "argument names of its own; PeftModel's method of the name takes PEFT's": (
        "base_model.delete_adapter", "base_model.merge_and_unload", "base_model.set_adapter",
    ),
    "tensors on the CPU, safetensors only": ("load_peft_weights",),
    "one process; a batch reaches the model through forward_fn alone": ("initialize_lora_eva_weights",),
}  # fmt: skip


def by_name(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """The reason of every name. Raises ValueError for a name with two."""
    reasons: dict[str, str] = {}
    for reason, names in table.items():
        for name in names:
            if name in reasons:
                raise ValueError(f"peft_api: {name} has two reasons: {reasons[name]!r} and {reason!r}")
            reasons[name] = reason
    return reasons
