"""Small pictures with captions, written in each form that people have."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

SIZES = ((96, 64), (64, 64), (72, 100), (128, 70), (64, 96), (80, 80), (100, 75))


def png(seed: int, size=None) -> bytes:
    width, height = size or SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def good(count: int) -> list[tuple[str, tuple[str, ...], bytes]]:
    """(name, captions, file) of each."""
    return [(f"{i:03d}", (f"picture {i}", f"number {i} again"), png(i)) for i in range(count)]


def bad() -> list[tuple[str, str | None, bytes, str]]:
    """(name, caption, file, reason) of pictures that cannot be used, after the good ones."""
    whole = png(0)
    return [
        ("x_blank", " \n", png(91), "no caption"),
        ("x_broken", "noise", b"no picture at all", "unreadable"),
        ("x_cut", "half of one", whole[: len(whole) // 2], "unreadable"),
        ("x_same", "picture 0\nnumber 0 again", whole, "duplicate"),
        ("x_tiny", "too small", png(92, (63, 200)), "too small"),
    ]


def rows(count: int) -> list[tuple[str, list[str], bytes]]:
    """All of them."""
    broken = [(name, caption.splitlines(), data) for name, caption, data, _ in bad()]
    return [(name, list(captions), data) for name, captions, data in good(count)] + broken


def write_folder(folder: pathlib.Path, count: int) -> pathlib.Path:
    for number, (name, captions, data) in enumerate(rows(count)):
        place = folder / ("inner" if number % 3 == 1 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.png").write_bytes(data)
        if number % 2:
            (place / f"{name}.json").write_text(json.dumps({"captions": captions}))
        else:
            (place / f"{name}.txt").write_text("\n".join(captions))
    return folder


def write_lines(file: pathlib.Path, count: int) -> pathlib.Path:
    lines = []
    (file.parent / "files").mkdir(parents=True)
    for name, captions, data in rows(count):
        (file.parent / "files" / f"{name}.png").write_bytes(data)
        lines.append({"image": f"files/{name}.png", "captions": captions, "id": name})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def write_parquet(folder: pathlib.Path, count: int) -> pathlib.Path:
    folder.mkdir()
    for number, part in enumerate((rows(count)[:5], rows(count)[5:])):
        table = pyarrow.table({
            "image_bytes": [data for _, _, data in part], "other": [1] * len(part),
            "text": [captions for _, captions, _ in part],
        })
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=3)
    return folder


def write_tars(folder: pathlib.Path, count: int) -> pathlib.Path:
    folder.mkdir()
    for number, part in enumerate((rows(count)[:4], rows(count)[4:])):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for name, captions, data in part:
                text = json.dumps(captions).encode()
                for suffix, content in (("png", data), ("json", text)):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def write_tfds(folder: pathlib.Path, count: int) -> pathlib.Path:
    """A prepared dataset of the pictures that can be decoded, which TFDS insists on."""
    folder.mkdir()
    features = tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "caption": tfds.features.Sequence(tfds.features.Text()),
    })
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    file = folder / "own-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for _, captions, data in good(count):
        fields = {"image": io.BytesIO(data), "caption": list(captions)}
        writer.write(serializer.serialize_example(features.encode_example(fields)))
    writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[count], num_bytes=0,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="own", split="train", filetype_suffix="array_record",
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], version="1.0.0",
        description="", check_data=False,
    )
    return folder


WRITERS = {
    "folder": write_folder, "lines.jsonl": write_lines, "parquet": write_parquet,
    "tars": write_tars, "own": write_tfds,
}
