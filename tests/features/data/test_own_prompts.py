"""Prompts that pictures hold: as A1111, ComfyUI and InvokeAI write them, and what must not be taken for one."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from deltaclip.features.data.own_prompts import A1111, COMFYUI, INVOKEAI, own_prompt

SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965640371, Size: 512x512, Model: v1-5"
PROMPT = "a red cube,\n(masterpiece:1.2), na\u00efve"
PARAMETERS = f"{PROMPT}\nNegative prompt: blurry, Steps of stone\n{SETTINGS}"


def png(*notes, packed=False, international=False):
    info = PngInfo()
    for name, text in notes:
        if international:
            info.add_itxt(name, text, zip=packed)
        else:
            info.add_text(name, text, zip=packed)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def with_comment(kind, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def found(content):
    return own_prompt(io.BytesIO(content))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("international", [False, True])
def test_a1111_in_every_chunk_of_text(packed, international):
    assert found(png(("parameters", PARAMETERS), packed=packed, international=international)) == (PROMPT, A1111)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + PARAMETERS.encode("utf-16-be"),
        b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
        b"ASCII\0\0\0" + PARAMETERS.encode(),
        bytes(8) + PARAMETERS.encode(),
        PARAMETERS.encode(),
    ],
    ids=["big", "little", "ascii", "no code", "bare"],
)
def test_a1111_in_the_comment_of_exif(kind, comment):
    assert found(with_comment(kind, comment)) == (PROMPT, A1111)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"a cat\n{SETTINGS}", "a cat"),
        (f"a cat, 12 Steps: up\n{SETTINGS}", "a cat, 12 Steps: up"),
        (f"Negative prompt: dogs\n{SETTINGS}", None),
        (SETTINGS, None),
        ("taken with my phone", None),
        ("", None),
        (json.dumps({"sui_image_params": {"prompt": " a dog ", "seed": 1}}), "a dog"),
        (json.dumps({"prompt": "a fox", "negative_prompt": "x"}), "a fox"),
        ("{broken", None),
        ("[" * 100_000, None),
    ],
    ids=range(10),
)
def test_what_the_lines_say(text, wanted):
    assert found(png(("parameters", text))) == ((wanted, A1111) if wanted else None)


GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue ball ", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark", "clip": ["4", 1]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}
LINKED = GRAPH | {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["11", 0]}},
    "11": {"class_type": "StringFunction", "inputs": {"string": "of a node"}},
}
COMBINED = GRAPH | {
    "3": {"class_type": "KSamplerAdvanced", "inputs": {"positive": ["20", 0]}},
    "20": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["21", 0], "strength": 1.0}},
    "21": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["7", 0]}},
}
GUIDED = {
    "13": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["22", 0], "noise": ["25", 0]}},
    "22": {"class_type": "BasicGuider", "inputs": {"conditioning": ["26", 0]}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "6": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "ball", "t5xxl": "a blue ball"}},
}
CIRCLE = {
    "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}},
    "2": {"class_type": "A", "inputs": {"conditioning": ["3", 0]}},
    "3": {"class_type": "B", "inputs": {"conditioning": ["2", 0]}},
}


@pytest.mark.parametrize(
    ("graph", "wanted"),
    [
        (GRAPH, "a blue ball"),
        (LINKED, "of a node"),
        (COMBINED, "a blue ball"),
        (GUIDED, "a blue ball"),
        ({f"12:{name}": node for name, node in GRAPH.items()}, None),  # links lead to nodes that are not there
        (CIRCLE, None),
        ({"1": {"class_type": "LoadImage", "inputs": {"image": "x"}}}, None),
        ({"1": [], "2": {"class_type": "KSampler", "inputs": {"positive": []}}}, None),
        ([], None),
    ],
    ids=range(9),
)
def test_the_graph_of_comfyui(graph, wanted):
    workflow = ("workflow", json.dumps({"nodes": [{"widgets_values": ["not this one"]}]}))
    assert found(png(workflow, ("prompt", json.dumps(graph)))) == ((wanted, COMFYUI) if wanted else None)


def test_the_graph_of_comfyui_in_webp():
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "workflow:{}", f"prompt:{json.dumps(GRAPH)}"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", exif=exif)
    assert found(buffer.getvalue()) == ("a blue ball", COMFYUI)


def test_invokeai():
    text = json.dumps({"positive_prompt": "a green star", "negative_prompt": "", "seed": 3})
    assert found(png(("invokeai_metadata", text))) == ("a green star", INVOKEAI)
    assert found(png(("invokeai_metadata", json.dumps({"positive_prompt": None})))) is None


def test_notes_behind_the_pixels_and_broken_ones():
    content = png(("parameters", PARAMETERS))
    start = content.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    note, rest = content[start:end], content[:start] + content[end:]
    tail = rest.index(b"IEND") - 4
    assert found(rest[:tail] + note + rest[tail:]) == (PROMPT, A1111)
    for length in range(8, len(content), 7):  # cut anywhere: a prompt or none, never an error
        assert found(content[:length]) in {None, (PROMPT, A1111)}
    packed = png(("parameters", PARAMETERS), packed=True)
    place = packed.index(b"zTXt") + 4 + len(b"parameters\0\0")
    assert found(packed[:place] + b"\xff\xff\xff" + packed[place + 3 :]) is None


def test_a_bomb_is_no_prompt():
    assert found(png(("parameters", "a" * (40 << 20)), packed=True)) is None


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe1\0\x10Exif\0\0", b"no"])
def test_what_is_no_picture_has_no_prompt(content):
    assert found(content) is None
