"""Photographs with captions and columns, as the tests of preparation collect them."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

EVIL = '<script>alert("1")</script>'
TURNED = 6  # EXIF: the camera was held upright


def encoded(pixels, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photographs():
    """`{name: bytes of a JPEG}` of parts of two photographs, each 120 to 200 pixels high and wide."""
    found = {}
    for name, image in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for n in range(5):
            found[f"{name}_{n}"] = encoded(image[30 * n : 30 * n + 120 + 20 * n, 60 * n : 60 * n + 200])
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory, photographs) -> pathlib.Path:
    """The photographs below a folder, with metadata; and one example of everything that a filter looks for."""
    root = tmp_path_factory.mktemp("photographs")
    rows = {}

    def add(name, data, short="a photo", long="a photograph of something", aesthetic=6.5, **others):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
        rows[name] = {"short": short, "long": long, "aesthetic": aesthetic, "licence": "CC0", **others}

    for number, (name, data) in enumerate(photographs.items()):
        add(f"good/{name}.jpg", data, long=[f"{name}, said at length", f"{name}, in other words"], aesthetic=5 + number)
    temple, flower = load_sample_images().images
    add("good/evil.jpg", encoded(temple[200:330, 300:460]), short=EVIL)
    add("good/flat.bmp", encoded(flower[100:240, 300:460], "BMP"), short="once a bitmap")
    exif = Image.Exif()
    exif[0x0112] = TURNED
    add("good/turned.jpg", encoded(temple[250:380, 100:300], exif=exif.tobytes()))
    add("a_copy.jpg", photographs["temple_0"], short="the first by id, so it stays")
    add("z_like.png", encoded(flower[0:120, 0:200], "PNG"), short="flower_0 without the losses of JPEG")
    add("small.png", encoded(temple[:40, :60], "PNG"))
    add("wide.png", encoded(temple[:70, :400], "PNG"))
    add("ugly.jpg", encoded(temple[:130, 300:500]), aesthetic=1.5)
    add("unjudged.jpg", encoded(temple[:130, 310:510]), aesthetic=None)
    add("silent.jpg", encoded(temple[:130, 320:520]), short="", long=None)
    add("terse.jpg", encoded(temple[:130, 330:530]), short="x", long="")
    add("cut.jpg", encoded(flower[:200, :200])[:900])
    add("text.jpg", b"this is no image")
    lines = [json.dumps({"file_name": name, **row}) for name, row in rows.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def pixels():
    """Noise `[64, 64, 3]`, which has no duplicate."""
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
