import functools
import hashlib
import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.configuration_openvla import VICUNA_PROMPT
from openvla.processing_openvla import OpenVLAImageProcessor, to_pil
from openvla.tf_image_ops import center_crop, jpeg_round_trip, lanczos3_resize

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)


def pixels(processor: OpenVLAImageProcessor, image, **options) -> np.ndarray:
    return processor.preprocess(image, return_tensors="np", **options)["pixel_values"][0]


# --- Parity with the original ---
def test_pixel_values_are_bit_equal_to_the_original(recorded, images, processor):
    # RGB, gray, RGBA; wide, tall, tiny, already 224
    for entry, image in zip(recorded["inputs"], images):
        values = processor(entry["prompt"], image)["pixel_values"]
        assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == entry["pixel_values_sha256"], entry["image"]


def test_input_ids_are_the_original_ones_with_placeholders_and_trailing_space_token(recorded, golden, processor):
    for entry in recorded["inputs"]:
        ids = processor(entry["prompt"], Image.new("RGB", (8, 8)))["input_ids"][0].tolist()
        original = golden[f"{entry['index']:02d}.input_ids"].tolist()
        assert ids == original[:1] + [32001] * 256 + original[1:] + [29871]


def test_training_text_is_the_prompt_and_the_action_tokens(recorded, processor):
    for entry in recorded["inputs"]:
        ids = processor(entry["train_text"])["input_ids"][0].tolist()
        assert ids == entry["train_ids"]


def test_statistics_of_the_released_file_win_over_the_exact_ones():
    # openvla-7b was released with ImageNet statistics rounded to bfloat16
    rounded = {"mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]}
    released = {"means": [[0.485, 0.456, 0.406]], "stds": [[0.229, 0.224, 0.225]], "tvf_normalize_params": [rounded]}
    processor = OpenVLAImageProcessor(image_resize_strategy="resize-naive", **released)
    values = pixels(processor, np.full((224, 224, 3), 51, dtype=np.uint8))  # 51 / 255 = 0.2
    np.testing.assert_allclose(values[:, 0, 0], (0.2 - np.array(rounded["mean"])) / rounded["std"], rtol=1e-6)


def test_released_file_is_read_and_written_back_unchanged(checkpoint, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    before = json.loads((checkpoint / "preprocessor_config.json").read_text())
    after = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert after.pop("image_processor_type") == "OpenVLAImageProcessor"
    for key in before.keys() - {"auto_map", "image_processor_type", "processor_class"}:
        assert after.get(key) == before[key], key


# --- Resizing ---
def squares(image: np.ndarray) -> np.ndarray:
    """Undoes the normalisation with mean and std 0.5: pixel values in [0, 255], `(H, W, 3)`."""
    return np.round((image * 0.5 + 0.5) * 255).astype(np.uint8).transpose(1, 2, 0)


def test_letterbox_pads_with_the_mean_of_the_last_tower():
    processor = OpenVLAImageProcessor(means=[(0.5, 0.5, 0.5)], stds=[(0.5, 0.5, 0.5)])
    white = np.full((100, 300, 3), 255, dtype=np.uint8)
    image = squares(pixels(processor, white))
    assert (image[:70] == 127).all() and (image[-70:] == 127).all()  # (300 - 100) / 2 rows of 300, minus filter reach
    assert (image[80:144] == 255).all()


def test_letterbox_of_two_towers_takes_the_fill_of_the_last():
    means = [(0.1, 0.2, 0.3), (0.5, 0.25, 0.0)]
    processor = OpenVLAImageProcessor(True, "letterbox", [(3, 28, 28)] * 2, means=means, stds=[(1.0, 1.0, 1.0)] * 2)
    values = pixels(processor, np.full((10, 28, 3), 255, dtype=np.uint8))
    corner = np.array([127, 63, 0]) / 255  # int(mean * 255)
    np.testing.assert_allclose(values[:, 0, 0], np.concatenate([corner - means[0], corner - means[1]]), atol=1e-6)


def test_letterbox_of_an_odd_difference_stays_224():
    assert pixels(OpenVLAImageProcessor(), np.zeros((20, 21, 3), np.uint8)).shape == (3, 224, 224)
    assert pixels(OpenVLAImageProcessor(), np.zeros((300, 451, 3), np.uint8)).shape == (3, 224, 224)


def test_resize_crop_keeps_the_middle_and_resize_naive_squashes():
    stripes = np.zeros((224, 448, 3), dtype=np.uint8)
    stripes[:, 112:336] = PHOTO[0, 0]
    cropped = squares(pixels(OpenVLAImageProcessor(image_resize_strategy="resize-crop"), stripes))
    assert (cropped == PHOTO[0, 0]).all()
    squashed = squares(pixels(OpenVLAImageProcessor(image_resize_strategy="resize-naive"), stripes))
    assert (squashed[:, :50] == 0).all() and (squashed[:, 62:162] == PHOTO[0, 0]).all()


def test_two_towers_see_one_image_with_their_own_statistics():
    sizes, means = [(3, 28, 28)] * 2, [(0.0, 0.0, 0.0), (0.5, 0.25, 0.0)]
    stds = [(1.0, 1.0, 1.0), (0.5, 0.5, 2.0)]
    processor = OpenVLAImageProcessor(True, "resize-naive", sizes, means=means, stds=stds)
    values = pixels(processor, PHOTO)
    expected = np.asarray(Image.fromarray(PHOTO).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(values[:3].transpose(1, 2, 0), expected, atol=1e-6)
    np.testing.assert_allclose(values[3:].transpose(1, 2, 0), (expected - means[1]) / stds[1], atol=1e-6)


def test_the_evaluation_path_is_jpeg_then_lanczos3_then_crop():
    options = {"jpeg_quality": 95, "lanczos3_size": 224, "center_crop_area": 0.9}
    processor = OpenVLAImageProcessor(image_resize_strategy="resize-naive", **options)
    frame = np.asarray(Image.fromarray(PHOTO).resize((256, 256)))
    expected = center_crop(lanczos3_resize(jpeg_round_trip(frame, 95), 224, 224), 0.9, 224, 224)
    assert (squares(pixels(processor, frame)) == expected).all()
    plain = OpenVLAImageProcessor(image_resize_strategy="resize-naive")
    assert (pixels(plain, frame, **options) == pixels(processor, frame)).all()  # declared or for one call
    assert OpenVLAImageProcessor(**processor.to_dict()).center_crop_area == 0.9


# --- What counts as an image ---
@pytest.mark.parametrize(
    "image",
    [
        PHOTO,
        PHOTO.transpose(2, 0, 1),
        torch.from_numpy(PHOTO),
        torch.from_numpy(PHOTO).permute(2, 0, 1),
        Image.fromarray(PHOTO),
        np.dstack([PHOTO, np.full((60, 90), 128, np.uint8)]),
    ],
    ids=["HWC", "CHW", "tensor HWC", "tensor CHW", "PIL", "RGBA"],
)
def test_accepted_kinds_of_images_are_the_same_picture(image):
    assert (np.asarray(to_pil(image)) == PHOTO).all()


def test_gray_images_and_paths(tmp_path):
    gray = PHOTO[..., 0]
    assert (np.asarray(to_pil(gray)) == gray[..., None]).all()
    assert (np.asarray(to_pil(gray[..., None])) == gray[..., None]).all()
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    assert (np.asarray(to_pil(str(tmp_path / "photo.png"))) == PHOTO).all()
    assert (np.asarray(to_pil(tmp_path / "photo.png")) == PHOTO).all()


def test_urls(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert (np.asarray(to_pil(f"http://127.0.0.1:{server.server_port}/photo.png")) == PHOTO).all()
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    "image, message",
    [
        (PHOTO / 255.0, "Expected uint8 pixels.*float64"),
        (torch.zeros(3, 8, 8), "Expected uint8 pixels.*float32"),
        (PHOTO.astype(np.int64), "Expected uint8 pixels.*int64"),
        (PHOTO[None], r"got shape \(1, 60, 90, 3\)"),
        (np.zeros((5, 8, 8), np.uint8), r"got shape \(5, 8, 8\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got shape \(0, 8, 3\)"),
        (42, "got int"),
        (Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)), "8-bit pixels, got an image of mode 'I;16'"),
        (Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "8-bit pixels, got an image of mode 'F'"),
    ],
)
def test_bad_images_raise(image, message):
    with pytest.raises(ValueError, match=message):
        to_pil(image)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match=r"Unknown image options \['centre_crop'\]"):
        pixels(OpenVLAImageProcessor(), PHOTO, centre_crop=True)
    with pytest.raises(ValueError, match="image_resize_strategy"):
        OpenVLAImageProcessor(image_resize_strategy="stretch")


def test_16_bit_files_raise(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="8-bit pixels"):
        to_pil(tmp_path / "depth.png")


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.fromarray(PHOTO).save(tmp_path / "sideways.png", exif=exif)
    assert (np.asarray(to_pil(tmp_path / "sideways.png")) == np.rot90(PHOTO, -1)).all()


# --- Prompts and batches ---
def test_prompts(processor):
    assert processor.build_prompt("Pick up the CUP") == (
        "In: What action should the robot take to pick up the cup?\nOut:"
    )
    for bad in ("", "  ", None, "put <image> there", "go </s>", "<s>"):
        with pytest.raises(ValueError):
            processor.build_prompt(bad)


def test_the_prompt_of_v01_comes_from_its_config(checkpoint, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    # as released: everything that equals the class defaults is left out
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    image = {"image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    processor = openvla.OpenVLAProcessor.from_pretrained(tmp_path)
    assert processor.prompt_template == VICUNA_PROMPT
    ids = processor(processor.build_prompt("go"), PHOTO)["input_ids"][0].tolist()
    assert ids[-2:] == [29901, 29871] and ids.count(32001) == 256  # "ASSISTANT" ":" "▁"


def test_batches_are_padded_left_and_hold_the_single_rows(recorded, images, processor):
    prompts = [entry["prompt"] for entry in recorded["inputs"][:4]]
    batch = processor(prompts, images[:4])
    assert batch["pixel_values"].shape == (4, 6, 224, 224)
    for row, prompt in enumerate(prompts):
        single = processor(prompt, images[row])
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][kept].tolist() == single["input_ids"][0].tolist()
        assert (batch["input_ids"][row][~kept] == 32000).all()
        assert kept.tolist() == sorted(kept.tolist())  # padding first
        assert torch.equal(batch["pixel_values"][row], single["pixel_values"][0])
    right = processor(prompts, images[:4], padding_side="right")
    assert right["attention_mask"][1].tolist() == batch["attention_mask"][1].flip(0).tolist()


def test_padding_to_a_fixed_length(processor):
    prompt = processor.build_prompt("go")
    fixed = processor(prompt, PHOTO, padding="max_length", max_length=40)
    assert fixed["input_ids"].shape == (1, 296) and fixed["attention_mask"].sum() == 256 + 16
    with pytest.raises(ValueError, match="has 16 tokens, more than 10"):
        processor(prompt, PHOTO, max_length=10)


def test_a_placeholder_in_the_text_changes_nothing(processor):
    prompt = processor.build_prompt("go")
    expected = processor(prompt, PHOTO)["input_ids"]
    assert torch.equal(processor("<image>" + prompt, PHOTO)["input_ids"], expected)
    assert torch.equal(processor("<s><image>" + prompt, PHOTO, add_special_tokens=False)["input_ids"], expected)


def test_several_cameras(processor, checkpoint):
    two = openvla.OpenVLAProcessor.from_pretrained(checkpoint)
    two.num_cameras = 2
    prompt, other = two.build_prompt("go"), PHOTO[::-1].copy()
    inputs = two(prompt, [PHOTO, other])
    assert inputs["pixel_values"].shape == (1, 12, 224, 224) and inputs["input_ids"][0].tolist().count(32001) == 512
    assert torch.equal(inputs["pixel_values"][:, 6:], processor(prompt, other)["pixel_values"])
    batch = two([prompt, prompt], [[PHOTO, other], [other, PHOTO]])
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][0].roll(6, dims=0))
    with pytest.raises(ValueError, match=r"2 observation\(s\) of 2 image\(s\), one per prompt"):
        two([prompt, prompt], [PHOTO, other])


def test_bad_calls_raise(processor):
    prompt = processor.build_prompt("go")
    with pytest.raises(ValueError, match="images come second"):
        processor(PHOTO, prompt)
    with pytest.raises(ValueError, match=r"1 observation\(s\) of 1 image\(s\)"):
        processor(prompt, [PHOTO, PHOTO])
    with pytest.raises(TypeError, match=r"Got \['center_crop'\] but no images"):
        processor(prompt, center_crop=True)


def test_a_foreign_tokenizer_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "mixed", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((checkpoint / "tokenizer.json").read_text())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] != "<PAD>"]
    (tmp_path / "mixed" / "tokenizer.json").write_text(json.dumps(config))
    for name in ("added_tokens.json", "special_tokens_map.json"):
        (tmp_path / "mixed" / name).unlink()
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]["32000"], settings["pad_token"]
    (tmp_path / "mixed" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="gives '<image>' the id 32000, the model expects 32001"):
        openvla.OpenVLAProcessor.from_pretrained(tmp_path / "mixed")


def test_image_settings_have_one_owner(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "center_crop_area": 0.9}))
    assert openvla.OpenVLAProcessor.from_pretrained(tmp_path).image_processor.center_crop_area == 0.9


def test_what_a_vocabulary_does_not_have_stays_away(processor, tmp_path):
    plain = openvla.OpenVLAProcessor(processor.image_processor, processor.tokenizer)
    assert plain.prompt_template is None and plain.prompt_end_token_id is None
    with pytest.raises(ValueError, match="does not say which prompt"):
        plain.build_prompt("go")
    plain.save_pretrained(tmp_path)
    again = openvla.OpenVLAProcessor.from_pretrained(tmp_path)  # transformers 5 leaves None out of its files
    assert again.prompt_template is None and again.prompt_end_token_id is None
    assert again("Out:", PHOTO)["input_ids"][0, -1] != 29871


def test_the_image_token_decodes_and_saving_keeps_every_id(processor, tmp_path, recorded):
    ids = processor(recorded["inputs"][7]["prompt"], PHOTO)["input_ids"][0]
    assert processor.tokenizer.decode(ids[1:3]).replace(" ", "") == "<image><image>"
    processor.save_pretrained(tmp_path)
    again = openvla.OpenVLAProcessor.from_pretrained(tmp_path)
    for entry in recorded["inputs"]:
        assert torch.equal(again(entry["prompt"], PHOTO)["input_ids"], processor(entry["prompt"], PHOTO)["input_ids"])
    assert again.prompt_template == processor.prompt_template and again.image_token_id == 32001
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
