"""The kinds of example there are: what the field `inputs` of a recipe's config may be. A new one is a clause here."""

from __future__ import annotations

from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.inputs.clip_captions import ClipCaptionsConfig
from snapgen_jax.inputs.encoders import EncodersConfig
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.sd3_encoders import SD3EncodersConfig
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.inputs.stored_clip_captions import StoredClipCaptionsConfig
from snapgen_jax.inputs.stored_encodings import StoredEncodingsConfig

# Told apart by `kind`; each has `build(batch_size, platform) -> Inputs`.
InputsConfig = (
    CaptionsConfig
    | EncodersConfig
    | SD3EncodersConfig
    | StoredConfig
    | StoredEncodingsConfig
    | ClipCaptionsConfig
    | StoredClipCaptionsConfig
    | ClassLabelsConfig
    | ImagesConfig
)
