"""A student that learns greys from a teacher: what the tests of distillation, of teachers and of few steps share."""

from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.recipes._teacher import TeacherConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from tests.recipes_for_tests import GREY_TOKENS, ByPosition, greys

GREYS = ByPosition("8x8", greys)
MMDIT = MMDiTConfig.preset("smoke", latent_channels=12, depth=2, dual=0)  # of all networks the quickest to compile
CAPTIONS = CaptionsConfig(
    image_sizes=((8, 8),),
    text=ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, layers=1),
    codec=CodecConfig(patch=2),
)
STUDENT = {
    "batch_size": 8,
    "train_steps": 40,
    "network": MMDIT,
    "inputs": CAPTIONS,
    "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
}
TEACHER = TeacherConfig(network=MMDIT)
