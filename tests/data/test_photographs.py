"""The folder of photographs for who has none."""

from PIL import Image

from snapgen_jax.data.photographs import write_photographs


def test_each_has_a_caption_and_all_shapes_are_there(tmp_path):
    write_photographs(tmp_path / "a", count=16)
    images = sorted((tmp_path / "a").glob("*.jpg"))
    assert len(images) == 16 and all(path.with_suffix(".txt").read_text().strip() for path in images)
    ratios = [width / height for width, height in (Image.open(path).size for path in images)]
    assert min(ratios) < 0.8 and max(ratios) > 1.25
    write_photographs(tmp_path / "b", count=16)
    assert all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes() for path in images)
