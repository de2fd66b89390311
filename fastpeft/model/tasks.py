"""PeftModel by task, with PEFT's names: get_peft_model and from_pretrained choose the class by the config's task_type.

They add nothing to PeftModel: the base model's own head knows its task. They are there for isinstance, and for code that
names them.
"""

from fastpeft.model.peft_model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """A PeftModel whose config says SEQ_CLS."""


class PeftModelForTokenClassification(PeftModel):
    """A PeftModel whose config says TOKEN_CLS."""


class PeftModelForCausalLM(PeftModel):
    """A PeftModel whose config says CAUSAL_LM."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A PeftModel whose config says SEQ_2_SEQ_LM."""


class PeftModelForQuestionAnswering(PeftModel):
    """A PeftModel whose config says QUESTION_ANS."""


class PeftModelForFeatureExtraction(PeftModel):
    """A PeftModel whose config says FEATURE_EXTRACTION."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
