"""The fixed features: the same today as when an old report was written, one image at a time."""

import numpy as np
import pytest

from snapgen_jax.evaluation.features import FEATURES, image_features


def test_features_of_an_image_depend_on_that_image_alone():
    images = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    features = image_features(images)
    assert features.shape == (70, FEATURES) and features.dtype == np.float32
    np.testing.assert_allclose(image_features(images[60:68]), features[60:68], atol=1e-5)
    np.testing.assert_allclose(image_features(images[::-1]), features[::-1], atol=1e-5)


def test_every_feature_tells_some_images_apart():
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)
    assert np.all(image_features(images).std(axis=0) > 1e-3)


def test_features_never_change():
    # Recorded numbers: scores in old reports compare with new ones only while these hold.
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, :, None, None], (1, 32, 32, 3))
    recorded = [0.706930, 0.159914, 0.158112, 0.109793, 0.214332, 0.111655, 0.458378, 0.038728]
    np.testing.assert_allclose(image_features(ramp)[0, ::16], recorded, atol=1e-5)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match="uint8 images"):
        image_features(images)
