"""Wrong input, the exact line and the exit code: one table. Its lines are a part of the program that people read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import get_args

import h5py
import pytest

from deltaclip.cli import command_names, main
from deltaclip.features.data.table import SUFFIXES
from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.settings import Against

MANIFESTS = {
    "no_prompt_column.csv": "image,promptt,quality\na.png,a red circle,0.5\n",
    "no_image_column.csv": "prompt,quality\na red circle,0.5\n",
    "no_rows.csv": "image,prompt\n",
    "no_prompts.csv": "image,consistency\na.png,1\na.png,2\n",
    "empty_image.jsonl": '{"image": "a.png", "prompt": "x"}\n{"prompt": "y"}\n',
    "label_too_large.csv": "image,prompt,quality\na.png,x,0.5\na.png,y,1.5\n",
    "label_beyond_all.csv": "image,prompt,quality\na.png,x,0.5\na.png,y,150\n",
    "label_no_number.csv": "image,prompt,mos_align\na.png,x,good\n",
    "negative_std.csv": "image,prompt,quality,quality_std\na.png,x,0.5,-0.1\n",
    "ragged.csv": "image,prompt\na.png,x\na.png,y,z\n",
    "broken.jsonl": '{"image": "a.png"\n',
    "missing_image.csv": "image,prompt\na.png,x\ngone.png,y\n",
    "no_image_at_all.csv": "image,prompt\ngone.png,x\n",
    "broken_image.csv": "image,prompt\na.png,x\nbroken.png,y\n",
    "outside.csv": "image,prompt\n../a.png,x\n",
    "wrong.txt": "image,prompt\n",
    "broken.xlsx": "no workbook",
    "good.csv": "image,prompt\na.png,x\n",
    "pair_of_one.csv": "image_a,image_b,preferred\na.png,copy.png,a\n",
    "pair_perhaps.csv": "image_a,image_b,preferred\na.png,broken.png,perhaps\n",
    "pair_torn.csv": "image_a,image_b,preferred\na.png,gone.png,b\n",
    "pair_half.csv": "image_a,image_b,preferred\na.png,,b\n",
    "pair_mixed.csv": "image,quality,image_a,image_b,preferred\na.png,0.5,a.png,broken.png,b\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_folder, demo_cache, tiny_backbone):
    """Folder with every wrong thing, a good cache, and a run."""
    folder = tmp_path_factory.mktemp("errors")
    images = sorted((demo_folder / "images").iterdir())[:6]
    shutil.copyfile(images[0], folder / "a.png")
    shutil.copyfile(images[0], folder / "copy.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name, text in MANIFESTS.items():
        (folder / name).write_text(text)
    (folder / "text.h5").write_text("no cache\n")
    (folder / "loop.h5").symlink_to("loop.h5")
    (folder / "empty").mkdir()
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = 1
    lines = ["image,prompt,quality,group,split"]
    lines += [f"{image},{i % 2},0.{i + 1},one,half" for i, image in enumerate(images)]
    (folder / "one_group.csv").write_text("\n".join(lines) + "\n")
    common = ["--backbone", tiny_backbone, "--allow-outside", "--out", str(folder / "one_group.h5")]
    assert run("extract", str(folder / "one_group.csv"), *common) == 0
    one_of_two = ["--shard", "1/2", "--out", str(folder / "set.h5"), "--backbone", tiny_backbone]
    assert run("extract", str(folder / "good.csv"), *one_of_two) == 0
    shutil.copyfile(demo_cache, folder / "demo.h5")
    assert run("train", str(folder / "demo.h5"), "--epochs", "1", "--out", str(folder / "run")) == 0
    other = folder / "run_of_another_backbone"
    shutil.copytree(folder / "run", other)
    config = json.loads((other / "config.json").read_text())
    config["request"]["weights_sha256"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


REPAIR = "repair or remove it, or give --on-error skip"
RANGE = "correct the label or give --label-range quality=LO,HI"
ANEW = "give another path, or remove it and extract again"
FRACTIONS = "give train,val,test that sum to 1, train above 0, for example 0.7,0.1,0.2"

# {at} is the folder of the place; every line starts with 'deltaclip: '.
TABLE = [
    # The manifest.
    ("extract {at}/gone.csv", "{at}/gone.csv: no such file; check the path of the manifest"),
    (
        "extract {at}/wrong.txt",
        "{at}/wrong.txt: unknown suffix '.txt'; use one of .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow, .xlsx",
    ),
    (
        "extract {at}/empty",
        "{at}/empty: holds no pictures: it is empty; give a table, or ADAPTER:{at}/empty for a public set",
    ),
    (
        "extract koniq-10k:{at}/empty",
        "{at}/empty: koniq10k_scores_and_distributions.csv is missing (the table of images and scores); "
        "expected koniq10k_scores_and_distributions.csv or koniq10k_scores_and_distributions.xlsx or "
        "koniq10k_scores.csv; give the folder of the set as it was unpacked",
    ),
    (
        "extract {at}/broken.xlsx",
        "{at}/broken.xlsx: is no readable Excel workbook (File is not a zip file); save it again, as .xlsx or .csv",
    ),
    ("extract demos", "demos: no such file; did you mean 'demo'?"),
    ("extract agiqa-3:x", "agiqa-3:x: unknown adapter 'agiqa-3'; did you mean 'agiqa-3k'?"),
    ("extract agiqa-3k:{at}/gone", "{at}/gone: no such folder; give agiqa-3k:DIR with the folder of the set"),
    ("extract {at}/no_rows.csv", "{at}/no_rows.csv: has no rows; a manifest needs a header and at least one row"),
    (
        "extract {at}/no_prompt_column.csv",
        "{at}/no_prompt_column.csv: missing column 'prompt'; rename 'promptt' to 'prompt'",
    ),
    ("extract {at}/no_image_column.csv", "{at}/no_image_column.csv: missing column 'image'; found: prompt, quality"),
    (
        "extract {at}/no_prompts.csv",
        "{at}/no_prompts.csv: has 2 labels of consistency and no prompts to go with them; add a column prompt",
    ),
    (
        "extract {at}/empty_image.jsonl",
        "{at}/empty_image.jsonl, line 2, column image: empty image; fill it in or remove the row",
    ),
    (
        "extract {at}/label_too_large.csv --label-range 0,1",
        "{at}/label_too_large.csv, line 3, column quality: label 1.5 is outside 0 to 1 (given); " + RANGE,
    ),
    (
        "extract {at}/label_beyond_all.csv",
        "{at}/label_beyond_all.csv, line 3, column quality: label 150 fits none of the usual ranges; "
        "give --label-range LO,HI",
    ),
    (
        "extract {at}/label_no_number.csv",
        "{at}/label_no_number.csv, line 2, column mos_align: 'good' is no number; leave a missing label empty",
    ),
    (
        "extract {at}/negative_std.csv",
        "{at}/negative_std.csv, line 2, column quality_std: standard deviation -0.1 is negative; correct it",
    ),
    (
        "extract {at}/ragged.csv",
        "{at}/ragged.csv, line 3: 3 fields where the header has 2; quote fields that hold the delimiter",
    ),
    (
        "extract {at}/broken.jsonl",
        "{at}/broken.jsonl, line 1: broken JSON (Expecting ',' delimiter); one object a line",
    ),
    (
        "extract {at}/missing_image.csv --on-error fail",
        "{at}/missing_image.csv, line 3: image 'gone.png': no such file; " + REPAIR,
    ),
    (
        "extract {at}/pair_of_one.csv",
        "{at}/pair_of_one.csv, line 2: 'a.png' and 'copy.png' hold one image, which is paired with itself; "
        "give two images, or remove the pair",
    ),
    (
        "extract {at}/pair_perhaps.csv",
        "{at}/pair_perhaps.csv, line 2, column preferred: 'perhaps' is neither of the two images, no tie and no "
        "probability; give a, b, tie, or the probability that the first is preferred",
    ),
    (
        "extract {at}/pair_torn.csv --on-error fail",
        "{at}/pair_torn.csv, line 2: image 'gone.png': no such file; " + REPAIR,
    ),
    (
        "extract {at}/pair_half.csv",
        "{at}/pair_half.csv, line 2, column image_b: is empty: of two images only one is there; "
        "fill it in or remove the row",
    ),
    (
        "extract {at}/pair_mixed.csv",
        "{at}/pair_mixed.csv: mixes pairs (image_a, image_b) with single images (image); "
        "put pairs into a table of their own, and give it to --pairs",
    ),
    (
        "extract {at}/good.csv --pairs {at}/good.csv",
        "{at}/good.csv: holds no pairs; give columns image_a, image_b and preferred; see docs/pairs.md",
    ),
    (
        "extract {at}/no_image_at_all.csv",
        "{at}/no_image_at_all.csv: none of the 1 images can be read (no such file); "
        "check the paths or give --image-root (now {at})",
    ),
    (
        "extract {at}/outside.csv",
        "{at}/outside.csv, line 2, column image: image '../a.png' lies outside {at}; "
        "give --image-root, or --allow-outside to permit it",
    ),
    ("data check {at}/gone.csv", "{at}/gone.csv: no such file; check the path of the manifest"),
    (
        "data check {at}/good.csv --images all",
        "--images: 'all' is not one of 'header', 'full', 'none'; see `deltaclip data check --help`",
    ),
    ("data chek x", "'data chek' is no command; did you mean 'data check'?"),
    # What cannot be, whatever the data.
    (
        "extract {at}/good.csv --label-range 5,1",
        "--label-range: '5,1' is no range; give two rising numbers such as 1,5, or quality=1,10 for one label",
    ),
    (
        "extract {at}/good.csv --label-range 1-5",
        "--label-range: '1-5' is no range; give two rising numbers such as 1,5, or quality=1,10 for one label",
    ),
    ("extract {at}/good.csv --batch-size 0", "--batch-size: 0 is out of range; give a value at least 1"),
    ("extract {at}/good.csv --workers -1", "--workers: -1 is out of range; give a value at least 1"),
    (
        "extract {at}/good.csv --decode gpu --device cpu",
        "--decode gpu: needs a CUDA GPU, not --device cpu; give --decode fast, or --device cuda",
    ),
    ("extract {at}/good.csv --backbone ViT-B-23", "--backbone: unknown model 'ViT-B-23'; did you mean 'ViT-B-32'?"),
    ("extract {at}/good.csv --backbone qqq", "--backbone: unknown model 'qqq'; see open_clip.list_models()"),
    (
        "extract {at}/good.csv --backbone local-dir:{at}/empty",
        "{at}/empty: has no open_clip_config.json, and no config.json of transformers; "
        "write one with model_cfg and preprocess_cfg",
    ),
    (
        "extract {at}/good.csv --precision fp8",
        "--precision: 'fp8' is not one of 'auto', 'fp32', 'bf16', 'fp16'; see `deltaclip extract --help`",
    ),
    ("extract {at}/good.csv --shard 0/4", "--shard: '0/4' is no shard; give I/N from 1/N to N/N, or auto"),
    ("extract {at}/good.csv --shard 5/4", "--shard: '5/4' is no shard; give I/N from 1/N to N/N, or auto"),
    (
        "extract {at}/good.csv --shard auto",
        "--shard: auto finds no shard in the environment (looked for RANK and WORLD_SIZE; "
        "SLURM_PROCID and SLURM_NTASKS); give I/N",
    ),
    ("extract {at}/good.csv --shard 1/2 --ray local", "--shard: --ray makes all shards; give one of the two"),
    (
        "extract {at}/good.csv --ray-workers 3",
        "--ray-workers: has no effect without --ray; give --ray local, or leave it out",
    ),
    (
        "extract {at}/good.csv --ray-shards 3",
        "--ray-shards: has no effect without --ray; give --ray local, or leave it out",
    ),
    (
        "train {at}/set.h5",
        "{at}/set.shard-2-of-2.h5: shard 2/2 is missing; make it by the same `deltaclip extract` with --shard 2/2",
    ),
    # Training.
    ("train {at}/gone.h5", "{at}/gone.h5: no such cache; make it with `deltaclip extract`"),
    ("train {at}/other.h5", "{at}/other.h5: is no deltaclip cache; " + ANEW),
    ("train {at}/good.csv", "{at}/good.csv: is a text, no cache; make a cache of it: deltaclip extract {at}/good.csv"),
    ("train {at}/text.h5", "{at}/text.h5: is a text, no cache; make a cache of it: deltaclip extract {at}/text.h5"),
    ("ablate {at}/a.png", "{at}/a.png: is a picture, no cache; give the file that belongs here"),
    ("sweep {at}/empty", "{at}/empty: is a folder, no cache; make a cache of it: deltaclip extract {at}/empty"),
    ("finetune {at}/run", "{at}/run: is a run, no cache; give the cache that it was trained on"),
    (
        "train {at}/demo.h5 {at}/loop.h5",
        "{at}/loop.h5: is a link that leads nowhere, no cache; give the place itself",
    ),
    ("evaluate {at}/loop.h5", "{at}/loop.h5: is a link that leads nowhere, no run directory; give the place itself"),
    ("evaluate {at}/demo.h5", "{at}/demo.h5: is a file, no run directory; make one with `deltaclip train`"),
    (
        "predict {at}/run/residual_frozen_best.safetensors {at}/a.png",
        "{at}/run/residual_frozen_best.safetensors: is a file, no run directory; "
        "give the folder that it lies in: {at}/run",
    ),
    ("sweep {at}/demo.h5 --lr 1e-4..1e-2", "--lr: a range has no grid; give --samples, or values"),
    ("ablate {at}/demo.h5 --against full", "--against: 'full' trains CLIP; add --finetune"),
    ("train {at}/demo.h5 --out {at}/run", "{at}/run: already exists; give another --out or remove it first"),
    ("train {at}/demo.h5 --fractions 0.7,0.3", f"--fractions: fractions 0.7,0.3 do not fit; {FRACTIONS}"),
    ("train {at}/demo.h5 --fractions 0.7,0.2,0.2", f"--fractions: fractions 0.7,0.2,0.2 do not fit; {FRACTIONS}"),
    (
        "train {at}/demo.h5 --fractions 70%,10%,20%",
        "--fractions: '70%,10%,20%' are no numbers; give train,val,test such as 0.7,0.1,0.2",
    ),
    (
        "train {at}/demo.h5 --split column",
        "{at}/demo.h5: has no split column; add one to the manifest and extract again, or give --split grouped",
    ),
    (
        "train {at}/one_group.h5 --split column",
        "--split column: unknown split 'half' in row 1; known: train, val, test",
    ),
    ("train {at}/demo.h5 --lr -0.001", "--lr: -0.001 is out of range; give a value at least 0"),
    ("train {at}/demo.h5 --lr inf", "--lr: inf is no finite number; give one"),
    ("train {at}/demo.h5 --lr 1e300", "--lr: 1e+300 is out of range; give a value at most 3e+38"),
    ("train {at}/demo.h5 --out=", "--out: is blank; give a value, or leave it out"),
    ("extract {at}/good.csv --image_root=", "--image-root: is blank; give a value, or leave it out"),
    ("sweep {at}/demo.h5 --lr 1e-3,nan", "--lr: nan is out of range; give a value at least 0"),
    (
        "sweep {at}/demo.h5 --lr 1e-2..1e-3 --samples 3",
        "--lr: '1e-2..1e-3' is no range; give LO..HI with LO below HI and above 0",
    ),
    ("sweep {at}/demo.h5 --loss mse,huberr", "--loss: 'huberr' is not a choice; did you mean 'huber'?"),
    ("train {at}/demo.h5 --lr nan", "--lr: nan is out of range; give a value at least 0"),
    ("train {at}/demo.h5 --epochs 0", "--epochs: 0 is out of range; give a value at least 1"),
    ("train {at}/demo.h5 --dropout 1", "--dropout: 1.0 is out of range; give a value below 1"),
    ("train {at}/demo.h5 --residual-scale-q 2", "--residual-scale-q: 2.0 is out of range; give a value at most 1"),
    ("train {at}/demo.h5 --scale 2", "--scale: 2 is out of range; give a value from 0 to 1"),
    ("train {at}/demo.h5 --scale nan", "--scale: nan is out of range; give a value from 0 to 1"),
    ("train {at}/demo.h5 --scale quality=fast", "--scale: 'fast' is no number; give 0.2, or quality=0.2"),
    ("train {at}/demo.h5 --scale quality=", "--scale: '' is no number; give 0.2, or quality=0.2"),
    ("train {at}/demo.h5 --scale 0.1,0.2", "--scale: 2 values for all targets; give 0.2, or quality=0.2"),
    ("train {at}/demo.h5 --scale quality=0.1,0.2", "--scale: 2 values for quality; give 0.2, or quality=0.2"),
    ("train {at}/demo.h5 --scale qualty=0.1", "--scale: the cache has no target 'qualty'; did you mean 'quality'?"),
    (
        "train {at}/demo.h5 --scale quality=0.1 --residual-scale-q 0.1",
        "--scale: quality is given twice; give one of --scale and the option for it",
    ),
    ("train {at}/demo.h5 --weight -1", "--weight: -1 is out of range; give a value from 0 to 3e+38"),
    ("train {at}/demo.h5 --weight inf", "--weight: inf is out of range; give a value from 0 to 3e+38"),
    ("train {at}/demo.h5 --weight 1e300", "--weight: 1e300 is out of range; give a value from 0 to 3e+38"),
    ("train {at}/demo.h5 --weight quality:1", "--weight: 'quality:1' is no number; give 0.5, or quality=0.5"),
    (
        "train {at}/demo.h5 --weight colour=1",
        "--weight: the cache has no target 'colour'; known: quality, consistency",
    ),
    (
        "train {at}/demo.h5 --weight quality=0,consistency=0",
        "--weight: is 0 for every target that the cache has labels of; give one above 0",
    ),
    ("sweep {at}/demo.h5 --scale qualty=0.1,0.2", "--scale: the cache has no target 'qualty'; did you mean 'quality'?"),
    ("sweep {at}/demo.h5 --scale quality=0.1,fast", "--scale: 'fast' is no number; give values such as 0.1,0.2"),
    ("sweep {at}/demo.h5 --weight 0.5,-1", "--weight: -1.0 is out of range; give a value from 0 to 3e+38"),
    (
        "sweep {at}/demo.h5 --residual-scale-q 0.1,x",
        "--residual-scale-q: 'x' is no number; give values such as 0.1,0.2",
    ),
    (
        "sweep {at}/demo.h5 --residual-scale-q 0.1..0.3",
        "--residual-scale-q: a range has no grid; give --samples, or values",
    ),
    (
        "sweep {at}/demo.h5 --scale quality=0.1..0.3",
        "--scale: a range has no grid; give --samples, or values",
    ),
    (
        "sweep {at}/demo.h5 --scale quality=0.1 --residual-scale-q 0.1,0.2",
        "--residual-scale-q: quality is given twice; give one of --scale and --residual-scale-q",
    ),
    ("sweep {at}/demo.h5 --residual-scale-c 2", "--residual-scale-c: 2.0 is out of range; give a value at most 1"),
    (
        "sweep {at}/demo.h5 --weight decay=1,2",
        "--weight: weight_decay is a setting of its own; sweep that of all targets, or give the target another name",
    ),
    ("ablate {at}/demo.h5 --scale qualty=0.1", "--scale: the cache has no target 'qualty'; did you mean 'quality'?"),
    ("ablate {at}/demo.h5 --weight fast", "--weight: 'fast' is no number; give 0.5, or quality=0.5"),
    ("finetune {at}/demo.h5 --scale qualty=0.1", "--scale: the cache has no target 'qualty'; did you mean 'quality'?"),
    ("train {at}/demo.h5 --seed -1", "--seed: -1 is out of range; give a value at least 0"),
    (
        "train {at}/demo.h5 --seed 4294967296",
        "--seed: 4294967296 is out of range; give a value at most 4294967295",
    ),
    (
        "train {at}/demo.h5 --data-seed 99999999999999999999",
        "--data-seed: 99999999999999999999 is out of range; give a value at most 4294967295",
    ),
    (
        "train {at}/demo.h5 --w-q 0 --w-c 0",
        "--weight: is 0 for every target that the cache has labels of; give one above 0",
    ),
    (
        "train {at}/one_group.h5 --w-q 0",
        "--weight: is 0 for every target that the cache has labels of; give one above 0",
    ),
    ("train {at}/demo.h5 --device gpu", "--device: 'gpu' is no device; give auto, cpu, cuda or cuda:N"),
    ("ablate {at}/gone.h5", "{at}/gone.h5: no such cache; make it with `deltaclip extract`"),
    (
        "ablate {at}/demo.h5 --against ridgee",
        f"--against: 'ridgee' is not one of {', '.join(map(repr, get_args(Against)))}; see `deltaclip ablate --help`",
    ),
    (
        "ablate {at}/demo.h5 --seed 4294967295 --repeats 2",
        "--seed: 4294967296 is out of range; give a value at most 4294967295",
    ),
    (
        "ablate {at}/demo.h5 --fractions 0.8,0,0.2",
        "{at}/demo.h5: too few labelled rows: a label needs three, not all equal, on each side of every split; "
        "add rows, or give other --fractions",
    ),
    # Runs.
    ("evaluate {at}/gone", "{at}/gone: no such run directory; make one with `deltaclip train`"),
    (
        "evaluate {at}/empty",
        "{at}/empty: holds 0 checkpoints, not one; give a directory made by `deltaclip train`",
    ),
    ("evaluate {at}/run --cache {at}/other.h5", "{at}/other.h5: is no deltaclip cache; " + ANEW),
    (
        "evaluate {at}/run_of_another_backbone",
        "{at}/demo.h5: was made by another backbone: weights_sha256 {sha} there, 000000000000 here; "
        "extract the data with the run's backbone, or train on this cache",
    ),
    (
        "predict {at}/run_of_another_backbone {at}/a.png --prompt x",
        "{at}/run_of_another_backbone: was trained on another backbone: weights_sha256 000000000000 there, {sha} here; "
        "give --backbone and --pretrained of the run's own backbone",
    ),
    ("evaluate {at}/run --out {at}/other.h5", "--out: unknown suffix '.h5'; give NAME.json"),
    ("compare {at}/run {at}/run --out {at}/run.csv", "--out: unknown suffix '.csv'; give NAME.json"),
    ("compare {at}/run", "RUNS: one run is nothing to compare; give two or more"),
    ("compare {at}/run {at}/gone", "{at}/gone: no such run directory; make one with `deltaclip train`"),
    ("compare", "RUNS: is missing; see `deltaclip compare --help`"),
    ("report {at}/gone", "{at}/gone: no such run directory; make one with `deltaclip train`"),
    (
        "report {at}/run --out {at}/run/config.json",
        "{at}/run/config.json: unknown suffix '.json'; use one of .html, .htm",
    ),
    (
        "report {at}/good.csv",
        "{at}/good.csv: is no table of scores; give a run, or what `deltaclip predict RUN DATA --out FILE` wrote",
    ),
    ("report {at}/run --gallery -1", "--gallery: -1 is out of range; give a value at least 0"),
    ("predict {at}/run {at}/a.png", "{at}/a.png: has no prompt to be scored against; give --prompt 'TEXT'"),
    (
        "predict {at}/run {at}/gone.png --prompt x",
        "{at}/gone.png: no such file or folder; give an image, a folder, a manifest, demo or ADAPTER:DIR",
    ),
    (
        "predict {at}/run {at}/broken.png --prompt x",
        "{at}/broken.png: not an image in a known format; give an image that can be read",
    ),
    (
        "predict {at}/run {at}/empty --prompt x",
        "{at}/empty: holds no pictures: it is empty; give a table, or ADAPTER:{at}/empty for a public set",
    ),
    (
        "predict {at}/run {at}/good.csv --out {at}/x.xlsx",
        "{at}/x.xlsx: unknown suffix '.xlsx'; use one of .csv, .jsonl, .parquet",
    ),
    ("share {at}/run {at}/empty", "{at}/empty: already exists; give another OUT or remove it first"),
    (
        "share {at}/run {at}/new --license my/own",
        "--license: 'my/own' is no name of a licence; give one word, such as apache-2.0, or other",
    ),
    ("push {at}/gone a/b", "{at}/gone: no such run directory; make one with `deltaclip train`"),
    (
        "push {at}/run a/b",
        "{at}/run: is a run with the rows of its training; make a folder without them: deltaclip share {at}/run OUT",
    ),
    ("push {at}/run ab", "REPO: 'ab' is no name of a repository; give ORG/NAME or ORG/NAME@REVISION"),
    ("pull a/b@ {at}/new", "REPO: 'a/b@' is no name of a repository; give ORG/NAME or ORG/NAME@REVISION"),
    ("pull a/b {at}/empty", "{at}/empty: already exists; give another OUT or remove it first"),
    ("predict hf://a/b {at}/a.png", "hf:/a/b: is no folder here; fetch it first: deltaclip pull ORG/NAME DIR"),
    # Caches.
    ("inspect {at}/gone.h5", "{at}/gone.h5: no such cache; make it with `deltaclip extract`"),
    ("inspect {at}/gone.h5 --verify", "{at}/gone.h5: no such cache; make it with `deltaclip extract`"),
    ("inspect {at}/other.h5", "{at}/other.h5: is no deltaclip cache; " + ANEW),
    ("inspect {at}/demo.h5 {at}/other.h5", "{at}/other.h5: is no deltaclip cache; " + ANEW),
    ("extract {at}/good.csv --views center,flop", "--views: 'flop' is no view; did you mean 'flip'?"),
    # The command line itself.
    ("trainn x", "'trainn' is no command; did you mean 'train'?"),
    ("zzz", f"'zzz' is no command; known: {', '.join(command_names())}"),
    ("train", "CACHE: is missing; see `deltaclip train --help`"),
    (
        "import {at}/gone --out {at}/x.h5 --backbone B --precision fp32",
        "{at}/gone: no such file or folder; give a folder with img_emb/, an .npy or a .safetensors file",
    ),
    (
        "import {at}/empty --out {at}/demo.h5 --backbone B --precision fp32",
        "{at}/demo.h5: already exists; give another --out or remove it first",
    ),
    ("import {at}/empty --out {at}/x.h5 --precision fp32", "--backbone: is missing; see `deltaclip import --help`"),
    ("import {at}/empty --out {at}/x.h5 --backbone B", "--precision: is missing; see `deltaclip import --help`"),
    (
        "inspect {at}/demo.h5 --export {at}/empty",
        "{at}/empty: already exists; give another --export or remove it first",
    ),
    ("inspect --verify", "CACHES: is missing; see `deltaclip inspect --help`"),
    # Generators.
    (
        "rank {at}/run a={at}/good.csv",
        "a={at}/good.csv: one generator is nothing to rank; "
        "give NAME=DATA of each generator, or one DATA whose column source names them",
    ),
    (
        "rank {at}/run a={at}/good.csv a={at}/empty",
        "DATA: 'a' is the name of two; give each generator its own name",
    ),
    ("rank {at}/run {at}/good.csv {at}/empty", "{at}/good.csv: has no name; give NAME=DATA of each generator"),
    (
        "rank {at}/run =x b=y",
        "DATA: '=x' is no NAME=DATA; give NAME=DATA of each generator, or one DATA whose column source names them",
    ),
    (
        "rank {at}/run old={at}/good.csv new={at}/good.csv --baseline odl",
        "--baseline: 'odl' is none of the generators; did you mean 'old'?",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --max-drop 0.1",
        "--max-drop: has nothing to drop below; give --baseline NAME too",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --junit {at}/x.xml",
        "--junit: needs a drop that is allowed; give --baseline and --max-drop",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --strict",
        "--strict: needs a drop that is allowed; give --baseline and --max-drop",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --page {at}/x.pdf",
        "{at}/x.pdf: unknown suffix '.pdf'; use one of .html, .htm",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/gone.csv",
        "{at}/gone.csv: no such file or folder; give a folder, a manifest, demo or ADAPTER:DIR",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --only beauty",
        "--only: 'beauty' is no target of {at}/run; known: quality, consistency",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --prompts {at}/good.csv",
        "--prompts: would not be used; leave it out: no DATA is a folder",
    ),
    (
        "rank {at}/run a={at}/empty b={at}/empty --image-root {at}",
        "--image-root: would not be used; leave it out: every DATA is a folder",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv --no-labels --label-range 1,5",
        "--label-range: would not be used; leave it out: --no-labels reads no scores",
    ),
    (
        "rank {at}/run {at}/good.csv",
        "{at}/good.csv: has no column source with generators; fill in the column, or give NAME=DATA of each generator",
    ),
    (
        "rank {at}/run a={at}/good.csv b={at}/good.csv",
        "DATA: the run was trained on every picture of a; give pictures that it has not seen",
    ),
    (
        "rank {at}/run a={at}/no_prompts.csv b={at}/good.csv --no-labels",
        "{at}/no_prompts.csv: has no prompts to be scored against; "
        "give a table with a column prompt, for a folder --prompts TABLE (" + "/".join(SUFFIXES) + ")",
    ),
    ("predict {at}/run", "TARGET: is missing; see `deltaclip predict --help`"),
    ("predict", "RUN: is missing; see `deltaclip predict --help`"),
    (
        "predict {at}/run --zero-shot demo",
        "RUN: would not be used with --zero-shot; give either a run, or --zero-shot TARGET alone",
    ),
    ("predict --zero-shot demo --coverage 0.8", "--coverage: would not be used with --zero-shot; leave it out"),
    (
        "predict --zero-shot {at}/none",
        "{at}/none: no such file or folder; give an image, a folder, a manifest, demo or ADAPTER:DIR",
    ),
    ("predict {at}/run demo --top 3", "--top: needs --sort; give the column that says which are first"),
    ("evaluate x y", "got unexpected extra argument(s) (y); see `deltaclip evaluate --help`"),
    ("train x --epoch 3", "--epoch: no such option; did you mean '--epochs'?"),
    ("train x --residual_scaleq 0.1", "--residual-scaleq: no such option; did you mean '--residual-scale-q'?"),
    ("train x --zzz", "--zzz: no such option; see `deltaclip train --help`"),
    ("train x -e 3", "-e: no such option; see `deltaclip train --help`"),
    ("--version2", "--version2: no such option; see `deltaclip --help`"),
    ("train x --freeze-text-layers 3", "--freeze-text-layers: no such option; it is one of `deltaclip finetune`"),
    (
        "extract x --lr 3",
        "--lr: no such option; it is one of `deltaclip train` and `deltaclip sweep` and `deltaclip finetune`",
    ),
    ("help trainn", "'trainn' is no command; did you mean 'train'?"),
    (
        "train {at}/demo.h5 --no-freeze-clip",
        "--no-freeze-clip: would train all of CLIP; use `deltaclip finetune --freeze-layers 0`",
    ),
    (
        "ablate {at}/demo.h5 --partial-freeze",
        "--partial-freeze: would train the later blocks of CLIP; use `deltaclip finetune --freeze-layers N`",
    ),
    (
        "finetune {at}/demo.h5 --freeze_clip",
        "--freeze-clip: leaves nothing of CLIP to train; "
        "use `deltaclip train`, which trains heads with all of CLIP frozen",
    ),
    ("train x --epochs", "--epochs: requires an argument; see `deltaclip train --help`"),
    ("train x --json=1", "--json: does not take a value; see `deltaclip train --help`"),
    ("train x --epochs 2.5", "--epochs: '2.5' is no whole number; see `deltaclip train --help`"),
    ("train x --lr fast", "--lr: 'fast' is no number; see `deltaclip train --help`"),
    (
        "train x --preset large",
        "--preset: 'large' is not one of 'quick', 'small', 'balanced', 'auto'; see `deltaclip train --help`",
    ),
    (
        "train x --schedule cosin",
        "--schedule: 'cosin' is not one of 'cosine', 'linear', 'constant'; see `deltaclip train --help`",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), TABLE, ids=[arguments for arguments, _ in TABLE])
def test_wrong_input_is_one_exact_line_and_exit_code_2(arguments, line, *, place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FeatureStore.open(place / "demo.h5") as store:
        sha = store.header["request"]["weights_sha256"][:12]
    capsys.readouterr()
    assert run(*(part.format(at=place) for part in arguments.split())) == 2
    printed = capsys.readouterr()
    assert printed.err == f"deltaclip: {line.format(at=place, sha=sha)}\n"
    assert printed.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_image_that_is_no_image_stops_a_strict_extraction(place, capsys, tiny_backbone, tmp_path):
    manifest = place / "broken_image.csv"
    options = ("--backbone", tiny_backbone, "--out", str(tmp_path / "x.h5"), "--on-error", "fail")
    assert run("extract", str(manifest), *options) == 2
    line = f"deltaclip: {manifest}: image 'broken.png': not an image in a known format; {REPAIR}\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize("name", ["x.h5", "x.safetensors", "x.pt"])
def test_a_pointer_in_place_of_the_file(tmp_path, capsys, name):
    """As a clone without Git LFS leaves it: a text of three lines under the name of a cache or of weights."""
    path, what = tmp_path / name, "cache" if name == "x.h5" else "file of weights"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    backbone = ["--backbone", "ViT-B-32", "--pretrained", str(path), "--out", str(tmp_path / "c.h5")]
    assert run(*(["train", str(path)] if name == "x.h5" else ["extract", "demo", *backbone])) == 2
    line = f"is a Git LFS pointer, not the file itself, no {what}; run `git lfs pull` where it came from"
    assert capsys.readouterr().err.splitlines()[-1] == f"deltaclip: {path}: {line}"


def test_one_group_cannot_be_split(place, capsys):
    assert run("train", str(place / "one_group.h5")) == 2
    assert capsys.readouterr().err == (
        "deltaclip: --split grouped: only one group in 6 rows, 3 are needed; "
        "use --split random, or name a column with more groups\n"
    )


def test_a_long_prompt_is_cut_and_counted_not_refused(place, capsys, tiny_backbone, tmp_path):
    (tmp_path / "long.csv").write_text("image,prompt\na.png," + "a red circle and " * 60 + "a blue square\n")
    options = ("--backbone", tiny_backbone, "--out", str(tmp_path / "x.h5"), "--image-root", str(place))
    assert run("extract", str(tmp_path / "long.csv"), *options) == 0
    with FeatureStore.open(tmp_path / "x.h5") as store:
        length = store.facts["context_length"]
    assert f"1 texts were cut at {length} tokens" in capsys.readouterr().out.splitlines()


def test_a_file_on_the_way_to_the_result_is_found_before_the_work(place, capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run("train", str(place / "demo.h5"), "--epochs", "1", "--out", str(blocked / "run")) == 2
    assert capsys.readouterr().err == f"deltaclip: {blocked}: is no folder; give another --out\n"


def test_debug_shows_the_traceback_and_the_same_line(place, capsys):
    assert run("train", str(place / "gone.h5"), "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("check_cache" in line for line in lines)
    assert lines[-1] == f"deltaclip: {place / 'gone.h5'}: no such cache; make it with `deltaclip extract`"


# What needs no model, by command: all of it is found before torch, which takes seconds to import.
EARLY = """
extract {at}/gone.csv | extract {at}/good.csv --out {at} | extract {at}/good.csv --backbone qqq
extract {at}/good.csv --backbone local-dir:{at}/gone | extract {at}/good.csv --device gpu
extract {at}/good.csv --views x | extract {at}/good.csv --image-root {at}/gone
extract {at}/good.csv --backbone RN50 --pretrained {at}/gone.pt | extract {at}/good.csv --label-range 5,1
extract {at}/good.csv --shard 5/4 | extract {at}/good.csv --on-error stop | data check {at}/gone.csv
data check {at}/good.csv --image-root {at}/gone | data check {at}/good.csv --label-range 5,1 | train {at}/gone.h5
train {at}/demo.h5 --out {at}/run | train {at}/demo.h5 --out {at}/good.csv/run | train {at}
train {at}/demo.h5 --fractions 1,1,1 | train {at}/demo.h5 --device gpu | train {at}/demo.h5 --lr inf
train {at}/demo.h5 --zzz | sweep {at}/gone.h5 | sweep {at}/demo.h5 --out {at}/run | sweep {at}/demo.h5 --lr fast
train {at}/demo.h5 --scale fast | sweep {at}/demo.h5 --weight fast | extract {at}/good.csv --target colour
train {at}/good.csv | sweep {at}/a.png | ablate {at}/empty | evaluate {at}/run --cache {at}/text.h5 | train {at}/loop.h5
sweep {at}/demo.h5 --lr 1e-4..1e-2 | ablate {at}/demo.h5 --against full | predict {at}/demo.h5 {at}/a.png
predict {at}/run {at}/a.png | predict {at}/run {at}/empty | predict {at}/run {at}/demo.h5 | predict {at}/run x:{at}
predict {at}/run {at}/good.csv --prompt x | predict {at}/run {at}/good.csv --prompts {at}/good.csv
predict {at}/run {at}/good.csv --out {at}/good.csv | predict {at}/run {at}/good.csv --out {at}/run/x.csv
predict --zero-shot {at}/empty | predict --zero-shot {at}/no_rows.csv | predict {at}/run {at}/no_prompts.csv
evaluate {at}/run --out {at}/run/x.json | compare {at}/run {at}/run --out {at}/run/x.json
export {at}/run --out {at}/run/x.onnx | rank {at}/run a={at}/good.csv b={at}/empty --page {at}/run/x.html
push {at}/run a/b | push {at}/run ab | pull ab {at}/new | pull a/b@ {at}/new | serve {at}/run --host 999.1.1.1
sweep {at}/demo.h5 --loss x | finetune {at}/gone.h5 | finetune {at}/demo.h5 --out {at}/run
finetune {at}/demo.h5 --init-heads {at}/gone | finetune {at}/demo.h5 --image-root {at}/gone
finetune {at}/demo.h5 --backbone local-dir:{at}/gone | ablate {at}/gone.h5 | ablate {at}/demo.h5 --out {at}/run
ablate {at}/demo.h5 --against x | evaluate {at}/gone | evaluate {at}/empty | evaluate {at}/run --cache {at}/gone.h5
evaluate {at}/run --out {at}/a.csv | evaluate {at}/run --pretrained {at}/gone.pt
evaluate {at}/run --out {at}/good.csv/a.json | compare {at}/run {at}/gone | compare {at}/run
compare {at}/run {at}/run --out {at}/a.csv | predict {at}/gone {at}/a.png
predict {at}/run {at}/gone.png --prompt x | predict {at}/run {at}/good.csv --out {at}/x.xlsx
predict {at}/run {at}/empty --prompts {at}/gone.csv | predict {at}/run {at}/good.csv --device gpu | report {at}/gone
report {at}/run --out {at}/x.json | report {at}/run --out {at}/good.csv/x.html | report
export {at}/gone --out {at}/x.onnx | export {at}/run --out {at}/x.csv | export {at}/run --out {at}/good.csv/x.onnx
share {at}/gone {at}/new | share {at}/run {at}/empty | share {at}/run {at}/new --license my/own
push {at}/gone a/b | pull a/b {at}/empty
rank {at}/run a={at}/good.csv | rank {at}/run a={at}/gone b={at}/good.csv | rank {at}/gone a={at}/empty b={at}/empty
rank {at}/run a={at}/good.csv b={at}/empty --baseline c | rank {at}/run a={at}/good.csv b={at}/empty --only beauty
rank {at}/run a={at}/good.csv b={at}/empty --max-drop 0.1 | rank {at}/run a={at}/good.csv a={at}/empty
serve {at}/gone | serve {at}/run --root {at}/gone | serve {at}/run --device gpu | demo --out {at}/good.csv
inspect {at}/gone.h5 | inspect {at}/demo.h5 --merge {at}/other.h5 | inspect {at}/demo.h5 --export {at}/empty
import {at}/gone --out {at}/x.h5 --backbone B --precision fp32
import {at}/empty --out {at}/demo.h5 --backbone B --precision fp32 | trainn x | data
"""
EARLY_PROGRAM = """
import json, sys
from deltaclip.cli import main
for arguments in json.loads(sys.stdin.read()):
    try:
        main(arguments)
    except SystemExit as end:
        print(json.dumps([" ".join(arguments), end.code, "torch" in sys.modules]), flush=True)
"""


def test_what_needs_no_model_is_said_before_torch_is_imported(place, tmp_path):
    calls = [call.format(at=place).split() for line in EARLY.strip().splitlines() for call in line.split("|")]
    assert {call[0] for call in calls} >= {name.split()[0] for name in command_names()}
    done = subprocess.run(
        [sys.executable, "-c", EARLY_PROGRAM],
        input=json.dumps(calls), capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(calls)
    assert [entry for entry in found if entry[1:] != [2, False]] == []
    assert len([line for line in done.stderr.splitlines() if line.startswith("deltaclip: ")]) >= len(calls) - 1


def test_what_is_not_there_is_said_before_numpy_is_imported(tmp_path):
    """Then a slip of the pen costs less than half a second."""
    given = ["extract gone.csv", "data check gone.csv", "train gone.h5", "predict gone a.png", "rank a=gone b=gone"]
    given += ["evaluate gone", "report gone", "share gone out", "serve gone", "extract gone.csv --out gone/gone/x.h5"]
    done = subprocess.run(
        [sys.executable, "-c", EARLY_PROGRAM.replace('"torch"', '"numpy"')],
        input=json.dumps([call.split() for call in given]), capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [[call, 2, False] for call in given]
