"""Crops of images on the host: where they lie, how large and how often mirrored; and decoding."""

import io

import numpy as np
import pytest
from PIL import Image

from ist_jax.data.images import Transform, cut_out, random_box

TRANSFORM = Transform(size=8, resize=10, area=(0.2, 1.0), aspect=(0.75, 1.3333), flip=True)


def encode(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def test_random_boxes_have_the_areas_and_aspects_asked_for():
    width, height, area, aspect = 500, 375, (0.08, 1.0), (3 / 4, 4 / 3)
    draws = np.random.default_rng(0).random((4000, 10, 4))
    boxes = np.array([random_box(width, height, d, area, aspect) for d in draws])
    left, top, across, down = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + across <= width).all() and (top + down <= height).all()
    # of boxes that fit at the first try, by the same formula: area uniform, log aspect uniform
    areas, ratios = across * down / (width * height), across / down
    assert areas.min() > 0.075 and 0.95 < areas.max() <= 1
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    small = areas < 0.5  # all of these fit, whatever their aspect
    assert abs(areas[small].mean() - (0.08 + 0.5) / 2) < 0.01
    assert abs(np.log(ratios[small]).mean()) < 5 * np.log(4 / 3) / np.sqrt(3 * small.sum())
    assert abs(np.log(ratios[small]).std() - np.log(4 / 3) / np.sqrt(3)) < 0.01
    room = (width - across + 1)[small]
    assert abs(((left[small] + 0.5) / room).mean() - 0.5) < 0.02  # anywhere across


@pytest.mark.parametrize(("size", "wanted"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))])
def test_where_no_box_fits_it_is_the_middle(size, wanted):
    draws = np.full((10, 4), 0.999)
    assert random_box(*size, draws, (0.9, 1.0), (0.75, 1.3333)) == wanted


def test_half_of_the_crops_are_mirrored_if_asked_for():
    ramp = np.broadcast_to(np.arange(0, 256, 4, np.uint8)[None, :, None], (64, 64, 3))
    data = encode(ramp)
    for flip in (True, False):
        crops = TRANSFORM._replace(flip=flip).training(np.random.default_rng(0), 400)
        pixels = np.stack([crop(data) for crop in crops]).astype(int)
        falling = pixels[:, :, 0].mean((1, 2)) > pixels[:, :, -1].mean((1, 2))
        assert abs(falling.mean() - (0.5 if flip else 0)) < (0.125 if flip else 1e-9)  # 5 deviations


def test_a_crop_is_the_box_resized():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((200, 160), Image.Resampling.BICUBIC)
    data = encode(np.asarray(image), quality=95)
    plain = Image.open(io.BytesIO(data)).convert("RGB")
    got = cut_out(Image.open(io.BytesIO(data)), (20, 30, 80, 60), 32)
    wanted = np.asarray(plain.crop((20, 30, 100, 90)).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - wanted)[1:-1, 1:-1].max() <= 2
    small = Image.open(io.BytesIO(data))
    got = cut_out(small, (20, 30, 80, 60), 16)
    assert small.size == (100, 80)  # decoded at half its size
    wanted = np.asarray(plain.crop((20, 30, 100, 90)).resize((16, 16), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - wanted).mean() < 3


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (256, 256)])
def test_evaluation_cuts_out_the_centre_after_resizing(shape):
    transform = Transform(size=224, resize=256, area=(0.08, 1.0), aspect=(0.75, 1.3333), flip=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC)
    scale = 256 / min(shape)
    sides = [round(s * scale) for s in image.size]
    left, top = ((s - 224) // 2 for s in sides)
    wanted = np.asarray(
        image.resize(sides, Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    )
    got = transform.centre(image)
    assert np.abs(got.astype(int) - wanted).mean() < 1
    assert np.array_equal(transform.evaluation(encode(np.asarray(image), quality=95)).shape, (224, 224, 3))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_become_rgb(mode):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (90, 90, 90)).convert(mode).save(file, "JPEG")
    np.testing.assert_allclose(TRANSFORM.evaluation(file.getvalue()), 90, atol=3)
